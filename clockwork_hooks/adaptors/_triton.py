"""The kernel of `fused`, in Triton: imported where it is to run. `kernel` is None where there is no Triton."""

try:
    import triton
    import triton.language as tl
except Exception:  # it is not there, or broken
    kernel = None
else:

    @triton.jit
    def kernel(
        out,
        cached,
        total,
        trend,
        weights,  # a row each: low, high, bias, gain, the trend's gain
        columns,  # elements of a row of the exit
        channels,
        GAIN: tl.constexpr,  # rows of the weights; 0 where there is none
        TREND: tl.constexpr,
        TOTAL: tl.constexpr,  # is there a total?
        BY_ROW: tl.constexpr,  # is a row of the exit a channel's? Else a column is
        BLOCK: tl.constexpr,
    ):
        """A program makes a piece of a row."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, at = column < columns, row * columns + column
        if BY_ROW:
            channel, there = row % channels, None
        else:
            channel, there = column, inside
        exit = tl.load(cached + at, inside).to(tl.float32)
        if GAIN:
            exit *= tl.load(weights + GAIN * channels + channel, there).to(tl.float32)
        exit += tl.load(weights + 2 * channels + channel, there).to(tl.float32)
        if TOTAL:
            exit += tl.load(total + at, inside).to(tl.float32)
        if TREND:
            gain = tl.load(weights + TREND * channels + channel, there).to(tl.float32)
            exit += gain * tl.load(trend + at, inside).to(tl.float32)
        low = tl.load(weights + channel, there).to(tl.float32)
        high = tl.load(weights + channels + channel, there).to(tl.float32)
        exit = tl.where(exit < low, low, tl.where(exit > high, high, exit))  # NaN stays
        tl.store(out + at, exit.to(out.dtype.element_ty), inside)

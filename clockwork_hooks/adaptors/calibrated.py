"""`CalibratedAdaptor`: predicts the exit linearly, with weights for each position of the sampler that were solved for.

`clockwork_hooks.calibrate` makes one. Every weight stands for a change of the cached exit, so weights of zero are the
identity, and between two calibrated positions the weights are interpolated. `ResidualAdaptor` starts where it ends, and
is trained from there.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from clockwork_hooks._numbers import shape
from clockwork_hooks._tree import version
from clockwork_hooks.adaptors.ahead import ahead
from clockwork_hooks.adaptors.fused import finished, serves
from clockwork_hooks.adaptors.learned import LearnedAdaptor, ScaledResNetAdaptor, fit
from clockwork_hooks.errors import AdaptorError, ArgumentError, OtherStepsWarning, warn
from clockwork_hooks.regions.region import Layout, Region
from clockwork_hooks.regions.saved import described_region

FORMS = ("affine", "linear", "kernel", "low rank")
_ENDLESS = 3e38  # a bound that bounds nothing: the identity's
LONGEST = 2.0  # a step that is so many times longer than the calibrated one changes the exit no more than that
_FARTHEST = 4.0  # a trend is carried on no farther than so many times the way that it was seen over
_PIECES = 16  # straight ones between two calibrated positions
_STEPS = 64  # whose weights are kept


@dataclass(frozen=True, slots=True)
class Knot:
    """What was solved for at one calibrated position; C channels of the exit, p that the matrix reads.

    Attributes:
        position: the UNet's raw time; None where one knot serves all positions.
        before: that of the step before.
        low, high: (C,) bounds of the exit.
        bias: (C,).
        gain: (C,), how much of the cached exit is added to it; of the linear and the kernel form None.
        matrix: (p, C) of the linear and the kernel form, (p, rank) of the low-rank one; what is read, in order: the
            cached exit; the entry less the entry that came with the cached exit; and that one. Or the entry alone, in
            place of both. Of the kernel form, then the cached exit at each of the positions around (`around_of`).
        trend: (C,), how much of the trend is added, where it is read: of what a straight line in log-SNR through the
            last two full passes would add.
    """

    position: float | None
    before: float | None
    low: Tensor
    high: Tensor
    bias: Tensor
    gain: Tensor | None = None
    matrix: Tensor | None = None
    trend: Tensor | None = None


class _Weights(NamedTuple):
    """Those of one step; what has a value for each channel is laid out as the exit."""

    low: Tensor
    high: Tensor
    bias: Tensor
    gain: Tensor | None
    of_cached: tuple[Tensor, ...]  # what is multiplied with it, one after the other
    of_entry: tuple[Tensor, ...]
    of_before: tuple[Tensor, ...]
    kernel: Tensor | None
    trend: Tensor | None


class Prepared(NamedTuple):
    """The weights of a step in few tensors, as a captured pass copies each.

    Attributes:
        rows: low, high, bias, and then gain and the trend's gain, where there are such; each laid out as the exit.
        matrices: of the cached exit, the entry, the entry before, as far as they are read; of low rank, first factors.
        kernel: of the kernel form.
    """

    rows: Tensor
    matrices: tuple[Tensor, ...]
    kernel: Tensor | None

    @classmethod
    def of(cls, weights: _Weights) -> Prepared:
        """These weights."""
        free = (weights.low, weights.high, weights.bias, weights.gain, weights.trend)
        matrices = (weights.of_cached, weights.of_entry, weights.of_before)
        rows = torch.stack([one for one in free if one is not None])
        return cls(rows, tuple(one[0] for one in matrices if one), weights.kernel)


@dataclass(slots=True)
class _Kept:
    """What was made of one state of an adaptor's table: it lies outside of the module, which moves and is copied.

    Attributes:
        state: of table and grid.
        grid: on the host.
        prepared: times and layout of the exit → the weights of that step.
    """

    state: tuple[Any, ...]
    grid: Tensor
    prepared: dict[Any, Prepared] = field(default_factory=dict)


_KEPT: weakref.WeakKeyDictionary[CalibratedAdaptor, _Kept] = weakref.WeakKeyDictionary()


class Positions:
    """Where a time stands among the calibrated positions, and its log-SNR: piecewise linear, exact at times seen.

    Args:
        knots: the calibrated positions, ascending.
        strides: of each, how far in time the step before was.
        seen: all times that the calibration saw.
        log_snr: time → log-SNR, monotonic; None takes the time itself in its place.
    """

    def __init__(
        self,
        knots: Sequence[float],
        strides: Sequence[float],
        seen: Sequence[float],
        log_snr: Callable[[float], float] | None = None,
    ) -> None:
        self.knots = [single(time) for time in knots]
        self._first, self._last = single(min(*seen, *knots)), single(max(*seen, *knots))
        self._log_snr = log_snr or float
        self.low = single(knots[0] - abs(strides[0]) / 2)
        self.high = single(knots[-1] + abs(strides[-1]) / 2)
        ends = sorted({single(time) for time in (*seen, *knots, self.low, self.high)})
        between = (a + (b - a) * k / _PIECES for a, b in itertools.pairwise(ends) for k in range(1, _PIECES))
        after = single(torch.nextafter(torch.tensor(self.high), torch.tensor(torch.inf)).item())
        self.times = sorted({*ends, *(single(time) for time in between), after})

    def log_snr(self, time: float) -> float:
        """Log-SNR of a time; beyond those that the calibration saw, that of the last one."""
        return float(self._log_snr(min(max(time, self._first), self._last)))

    def place(self, time: float) -> float:
        """0 at the first knot, 1 at the second, and so on; the number of knots outside of them all.

        Half a stride beyond the first and the last one is still theirs.
        """
        if not self.low <= time <= self.high:
            return float(len(self.knots))
        if time <= self.knots[0] or time >= self.knots[-1]:
            return 0.0 if time <= self.knots[0] else float(len(self.knots) - 1)
        k = sum(knot <= time for knot in self.knots) - 1
        here, low, high = (self.log_snr(one) for one in (time, self.knots[k], self.knots[k + 1]))
        share = (here - low) / (high - low) if high != low else 0.0
        return k + min(max(share, 0.0), 1.0)

    def rows(self) -> Tensor:
        """(n, 5) float32; a straight piece a row: its first time, log-SNR and its slope there, place and its slope."""
        levels = [single(self.log_snr(time)) for time in self.times]
        places = [self.place(time) for time in self.times]
        pieces = [(-_ENDLESS, levels[0], 0.0, float(len(self.knots)), 0.0)]
        for k, time in enumerate(self.times):
            after = min(k + 1, len(self.times) - 1)
            width = self.times[after] - time or 1.0
            slope = (places[after] - places[k]) / width if places[after] < len(self.knots) > places[k] else 0.0
            pieces.append((time, levels[k], (levels[after] - levels[k]) / width, places[k], slope))
        return torch.tensor(pieces, dtype=torch.float32)


class CalibratedAdaptor(LearnedAdaptor):
    """The cached exit, changed linearly: by a gain and a bias for each channel, or by a matrix product.

    The weights are a table with a row for each calibrated position; a call takes the row of its own position, between
    two of them their mixture in log-SNR. A step that is longer or shorter than the calibrated one changes the exit so
    much more or less. Outside of the calibrated positions, and where it is told no time, it is the identity, and warns
    once. What it returns is bounded by what the region emitted in the calibration. Nothing waits for the device: it
    compiles, and is captured into CUDA graphs. A step's weights are made once where the times are known as numbers.

    Args:
        form: "affine" (gain and bias), "linear" (one matrix), "kernel" (a matrix, and a convolution of the cached exit
            with 3 positions an axis), or "low rank" (gain, bias, and a matrix of two factors).
        knots: number of calibrated positions.
        points: rows of the grid that places a position among them; 0 where one knot serves all positions.
        rank: of the factors.
        reads_before: the entry that came with the cached exit is read too.
        reads_trend: so is how the exit moved between the last two full passes, each channel by a gain of its own.
        **inputs: `exit` and `entry`, as in `LearnedAdaptor`.

    Attributes:
        needs: names of what it is called with beside the entry, the cached exit, time and text.
        report: the `Calibration` that it comes from; None after loading.
        tuning: the `Tuning` that chose it, if one did.

    Example:
        >>> adaptor = CalibratedAdaptor(form="affine", knots=2, points=8, exit=Layout(4, (8, 8)))
        >>> cached, time = torch.randn(1, 4, 8, 8), torch.tensor(900.0)
        >>> torch.equal(adaptor(None, cached, position=time), cached)  # nothing is calibrated yet
        True
    """

    def __init__(
        self,
        *,
        form: str,
        knots: int,
        points: int,
        rank: int = 0,
        reads_before: bool = False,
        reads_trend: bool = False,
        **inputs: Any,
    ) -> None:
        if form not in FORMS:
            raise ArgumentError("a form is one of " + ", ".join(FORMS), seen={"form": form}, do='e.g. form="linear"')
        own = {"form": form, "knots": knots, "points": points, "rank": rank, "reads_before": reads_before}
        own["reads_trend"] = reads_trend
        super().__init__(own=own, **{name: inputs[name] for name in ("exit", "entry") if name in inputs})
        self.form, self.rank, self.reads_before, self.reads_trend = form, rank, reads_before, reads_trend
        self.needs = frozenset({"entry_cached"} if reads_before else ()) | {"position", "position_cached", "prepared"}
        self.needs |= frozenset({"trend", "trend_positions"} if reads_trend else ())
        self.report: Any = None
        self.tuning: Any = None
        channels = self.exit.channels
        entries = [] if self.entry is None else [self.entry.channels] * (1 + reads_before)
        self._read = [channels, *entries]  # channels of what the matrix reads, in order
        gain = 0 if form in ("linear", "kernel") else channels
        matrix = {"affine": 0, "linear": self.reads * channels, "low rank": self.reads * rank}
        matrix["kernel"] = (self.reads + (3**self.exit.rank - 1) * channels) * channels
        along = channels if reads_trend else 0
        self._free = (channels, gain)  # bias and gain
        self._widths = (2 * channels, 1, along, sum(self._free) + matrix[form])  # what a row holds, in order
        table = torch.zeros(knots + 1, sum(self._widths))  # the last row is the identity
        table[:, :channels], table[:, channels : 2 * channels], table[:, 2 * channels] = -_ENDLESS, _ENDLESS, 1.0
        self.table = nn.Parameter(table, requires_grad=False)
        self.basis = nn.Parameter(torch.zeros(rank, channels), requires_grad=False) if form == "low rank" else None
        self.grid: Tensor
        self.register_buffer("grid", torch.zeros(points, 5))
        self._lookout = _Lookout()

    @classmethod
    def of(
        cls,
        region: Region,
        knots: Sequence[Knot],
        positions: Positions | None,
        *,
        form: str,
        basis: Tensor | None = None,
        reads: Sequence[str] = ("exit",),
    ) -> CalibratedAdaptor:
        """One with these weights.

        Args:
            region: what it stands in for.
            knots: in ascending order of their positions.
            positions: places positions among the knots; None where the one knot serves them all.
            form: as in the class.
            basis: (rank, C), the second factor of the low-rank matrices.
            reads: some of "exit", "entry", "entry_cached", "trend", in this order.
        """
        grid = torch.zeros(0, 5) if positions is None else positions.rows()
        adaptor = cls(
            form=form,
            knots=len(knots),
            points=len(grid),
            rank=0 if basis is None else len(basis),
            reads_before="entry_cached" in reads,
            reads_trend="trend" in reads,
            exit=Layout.of_boundary(region.exit),
            entry=Layout.of_boundary(region.entry) if "entry" in reads else None,
        )
        with torch.no_grad():
            adaptor.grid.copy_(grid)
            if adaptor.basis is not None and basis is not None:
                adaptor.basis.copy_(basis)
            for k, knot in enumerate(knots):
                if positions is not None and knot.position is not None and knot.before is not None:
                    here, before = (torch.tensor(positions.log_snr(single(t))) for t in (knot.position, knot.before))
                    adaptor.table[k, 2 * adaptor.exit.channels] = here - before
                adaptor.put(k, knot)
        adaptor.region = described_region(region)
        return adaptor.eval()

    @torch.no_grad()
    def put(self, k: int, knot: Knot) -> None:
        """Put weights into the table, at its k-th position."""
        stride = self.table[k, 2 * self.exit.channels].clone()
        parts = [knot.low, knot.high, stride, knot.trend, knot.bias, knot.gain, knot.matrix]
        self.table[k] = torch.cat([part.flatten().to(self.table) for part in parts if part is not None])

    @property
    def reads(self) -> int:
        """Channels that the matrix reads."""
        return sum(self._read)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CalibratedAdaptor:
        """Move it. Its numbers stay float32: log-SNR and strides would not survive float16; rows are cast when read."""
        tensors = {name: tensor.data for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in tensors.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                moved.data = tensor.float().to(moved.device)
        return self

    # -- a call --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        entry: Tensor | None,
        exit_cached: Tensor,
        *,
        time: Tensor | None = None,
        text: Tensor | None = None,
        entry_cached: Tensor | None = None,
        position: Tensor | None = None,
        position_cached: Tensor | None = None,
        trend: Tensor | None = None,
        trend_positions: Tensor | None = None,
        prepared: Prepared | None = None,
    ) -> Tensor:
        """Return the exit; see `Adaptor`.

        Args:
            entry, exit_cached, time, text: as there; time and text are not read.
            entry_cached: the entry that came with the cached exit.
            position: the UNet's raw time in this call, ().
            position_cached: and in the call that the cached exit comes from, (); None takes the calibrated one.
            trend: how the exit moved between the last two full passes; None adds nothing.
            trend_positions: the UNet's raw times in these two, (2,).
            prepared: what `prepare` returned for these times, in place of them.
        """
        axis = 1 if self.exit.order in ("channels first", "tokens last") else -1
        if exit_cached.shape[axis] != self.exit.channels:
            raise AdaptorError(
                "an adaptor fits exits with the number of channels that it was made for",
                seen={"adaptor": f"{self.exit.channels} channels", "exit": shape(exit_cached.shape)},
                do="calibrate one for this region",
            )
        if prepared is None:
            step = position, position_cached, trend_positions
            exit, weights = ahead(self._without_the_entry, exit_cached, entry_cached, trend, step, axis)
        else:
            weights = self._unpacked(prepared)
            fused = self._fused(prepared, weights, (exit_cached, entry_cached, entry), trend, axis)
            if fused is not None:
                return fused
            exit = self._apply_weights(weights, exit_cached, entry_cached, trend, axis)
        if weights.of_entry:
            exit = _add_product(exit, self._like_exit(entry, exit_cached), weights.of_entry, axis)
            exit = exit.clamp(weights.low, weights.high)
        return exit.to(exit_cached.dtype)

    def _without_the_entry(
        self,
        cached: Tensor,
        before: Tensor | None,
        trend: Tensor | None,
        step: tuple[Tensor | None, Tensor | None, Tensor | None],
        axis: int,
    ) -> tuple[Tensor, _Weights]:
        """The exit as far as it does not wait for this call's entry, and the weights.

        Args:
            cached: the cached exit.
            before: the entry that came with it.
            trend: how the exit moved between the last two full passes.
            step: the positions that tell the weights.
            axis: of the channels.
        """
        weights = self._weights(_sizes(cached.ndim, axis), cached.dtype, *step)
        return self._apply_weights(weights, cached, before, trend, axis), weights

    def _apply_weights(
        self, weights: _Weights, cached: Tensor, before: Tensor | None, trend: Tensor | None, axis: int
    ) -> Tensor:
        """The exit as far as it does not wait for this call's entry."""
        exit = cached + weights.bias if weights.gain is None else torch.addcmul(weights.bias, cached, weights.gain)
        if weights.of_cached:
            exit = _add_product(exit, cached, weights.of_cached, axis)
        if weights.of_before:
            exit = _add_product(exit, self._like_exit(before, cached), weights.of_before, axis)
        if weights.kernel is not None:
            exit = exit + self._convolution(cached, weights.kernel)
        if trend is not None and weights.trend is not None:
            exit = torch.addcmul(exit, trend, weights.trend)
        return exit if weights.of_entry else exit.clamp(weights.low, weights.high)

    def _fused(
        self,
        prepared: Prepared,
        weights: _Weights,
        read: tuple[Tensor, Tensor | None, Tensor | None],
        trend: Tensor | None,
        axis: int,
    ) -> Tensor | None:
        """The exit, where one kernel does all but products; `read` are cached exit, entry before, and entry."""
        cached, trend = read[0], trend if self.reads_trend else None
        if not serves(cached, prepared.rows, trend, read, axis):
            return None
        total: Tensor | None = None
        for one, matrices in zip(read, (weights.of_cached, weights.of_before, weights.of_entry), strict=True):
            if matrices:
                x = cached if one is cached else self._like_exit(one, cached)
                if total is None:
                    total = _products(x, matrices, axis).to(cached.dtype)  # not autocast's: more is added in place
                else:
                    total = _add_product(total, x, matrices, axis)
        if weights.kernel is not None:
            around = self._convolution(cached, weights.kernel).to(cached.dtype)
            total = around if total is None else total.add_(around)
        return finished(cached, prepared.rows, total, trend, gain=weights.gain is not None, axis=axis)

    def _convolution(self, cached: Tensor, kernel: Tensor) -> Tensor:
        """What the positions around add."""
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[self.exit.rank - 1]
        return self.exit.from_map(convolve(self.exit.to_map(cached), kernel, padding=1))

    def _like_exit(self, entry: Tensor | None, cached: Tensor) -> Tensor:
        """An entry, laid out as the exit is."""
        assert self.entry is not None  # asked only then
        if entry is None:
            raise AdaptorError(
                "this adaptor reads the region's entry",
                seen={"entry": None, "reads": "exit, entry" + ", entry_cached" * self.reads_before},
                do='calibrate one that does not: kind="affine" or kind="exit"',
            )
        return like_exit(entry, self.entry, cached, self.exit)

    # -- the weights of a step -------------------------------------------------------------------------------------

    def prepare(self, times: Sequence[float], exit_cached: Tensor) -> Prepared | None:
        """The weights of a step, made once and kept, so that a pass need not make them; see `Adaptor`.

        They are made anew when the table has been written to, but for writes through `.data`, which nobody counts.

        Args:
            times: `position`, `position_cached`, and, where the trend is read, the two of `trend_positions`.
            exit_cached: as in `forward`; its dtype and its number of axes count.

        Returns:
            What `forward` takes as `prepared`. None where nobody counts writes (made in inference mode), on the meta
            device, and while a CUDA graph is captured.
        """
        cuda, written = self.grid.is_cuda, (version(self.table), version(self.grid))
        if min(written) < 0 or self.grid.is_meta or (cuda and torch.cuda.is_current_stream_capturing()):
            return None
        axis = 1 if self.exit.order in ("channels first", "tokens last") else -1
        state = (self.table.device, self.table.data_ptr(), self.grid.data_ptr(), *written)
        kept = _KEPT.get(self)
        if kept is None or kept.state != state:
            kept = _KEPT[self] = _Kept(state, self.grid.detach().cpu())
        stream = torch.cuda.current_stream(self.grid.device).cuda_stream if cuda else 0  # on others it may come late
        key = (tuple(times), exit_cached.dtype, exit_cached.ndim, stream)
        prepared = kept.prepared.get(key)
        if prepared is None:
            self._look_at(times[0], kept.grid)
            with torch.inference_mode(False), torch.no_grad():  # passes with gradients may come later
                # kernels: a copy from the host would wait for the device
                like: dict[str, Any] = {"dtype": torch.float32, "device": self.table.device}
                position, before, *full = (torch.full((), float(time), **like) for time in times)
                trail = torch.stack(full) if full else None
                weights = self._weights(_sizes(exit_cached.ndim, axis), exit_cached.dtype, position, before, trail)
                prepared = Prepared.of(weights)
            if len(kept.prepared) >= _STEPS:
                kept.prepared.clear()
            kept.prepared[key] = prepared
        return prepared

    def _unpacked(self, prepared: Prepared) -> _Weights:
        rows = prepared.rows.unbind()
        low, high, bias = rows[:3]
        gain, trend = rows[3] if self._free[1] else None, rows[-1] if self.reads_trend else None
        shared = () if self.basis is None else (self.basis.to(low.dtype),)
        made: list[tuple[Tensor, ...]] = [(matrix, *shared) for matrix in prepared.matrices]
        of_cached, of_entry, of_before = made + [()] * (3 - len(made))
        return _Weights(low, high, bias, gain, of_cached, of_entry, of_before, prepared.kernel, trend)

    def _weights(
        self,
        sizes: Sequence[int],
        dtype: torch.dtype,
        position: Tensor | None,
        before: Tensor | None,
        full: Tensor | None,
    ) -> _Weights:
        """The weights of a step, as the exit needs them: of times alone.

        Args:
            sizes: of a value for each channel, to be added to the exit.
            dtype: of the exit.
            position: of this call.
            before: of the call that the cached exit comes from.
            full: (2,), of the last two full passes.
        """
        bounds, stretch, farther, along, solved = self._row(position, before, full)
        low, high = bounds.to(dtype).reshape(2, *sizes)
        free, solved = solved.split([sum(self._free), len(solved) - sum(self._free)])
        free = free * stretch
        if self._free[1]:
            free[self.exit.channels :].add_(1.0)  # the cached exit itself
        bias, *gains = free.to(dtype).reshape(-1, self.exit.channels, *sizes[1:])
        own = self.reads * self.exit.channels if self.form == "kernel" else len(solved)
        matrix, around = solved[:own], solved[own:]
        of_cached, of_entry, of_before = self._matrices(matrix, stretch, dtype) if len(matrix) else ((), (), ())
        return _Weights(
            low=low,
            high=high,
            bias=bias,
            gain=gains[0] if gains else None,
            of_cached=of_cached,
            of_entry=of_entry,
            of_before=of_before,
            kernel=self._kernel(around * stretch, dtype) if len(around) else None,
            trend=(along if farther is None else along * farther).to(dtype).reshape(sizes) if len(along) else None,
        )

    def _matrices(self, matrix: Tensor, stretch: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """What is multiplied, one after the other, with the cached exit, the entry, and the entry before."""
        solved = matrix.reshape(self.reads, -1)
        parts = list((solved * stretch).split(self._read))
        if len(parts) > 2:  # b·(entry - before) + c·before, as the table has it; what changes needs no stretch
            inner = solved.split(self._read)[1]
            parts[1:] = inner, parts[2] - inner
        shared = () if self.basis is None else (self.basis.to(dtype),)
        made: list[tuple[Tensor, ...]] = [(part.to(dtype), *shared) for part in parts]
        return made + [()] * (3 - len(made))

    def _kernel(self, around: Tensor, dtype: torch.dtype) -> Tensor:
        """Of a convolution whose middle is zero."""
        channels = self.exit.channels
        weights = around.reshape(-1, channels, channels)
        before, after = weights.chunk(2)
        kernel = torch.cat([before, torch.zeros_like(weights[:1]), after]).permute(2, 1, 0)
        return kernel.reshape(channels, channels, *(3,) * self.exit.rank).to(dtype)

    def _row(
        self, position: Tensor | None, before: Tensor | None, full: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Bounds, stretch, how far a trend goes on, the trend's gain, and bias, gain and matrix at a position.

        Args:
            position: of this call.
            before: of the call that the cached exit comes from.
            full: (2,), of the last two full passes.
        """
        if not len(self.grid):
            return self._split(self.table[0])
        if position is None:
            self._say_that_no_time_is_told()
            return self._split(self.table[-1])
        asked = [position, *([] if before is None else [before]), *([] if full is None else [full])]
        times = torch.cat([one.reshape(-1) for one in asked]).to(self.grid)
        pieces = self.grid[torch.searchsorted(self.grid[1:, 0].contiguous(), times, right=True)]
        past = (times - pieces[:, 0]).unsqueeze(1)
        levels, places = torch.addcmul(pieces[:, 1::2], past, pieces[:, 2::2]).unbind(1)
        place = places[:1]  # an index of no axis would be read on the host
        self._look(places[0])
        below = place.clamp(max=len(self.table) - 2).long()  # the identity's row, the last one, has none above it
        rows = self.table.unfold(0, 2, 1)[below][0]  # (width, 2): both rows in one kernel
        row = torch.lerp(rows[:, 0], rows[:, 1], place - below)  # at a whole place that row bit for bit
        stride = None if before is None else levels[0] - levels[1]
        return self._split(row, stride, None if full is None else levels[-2:])

    def _split(
        self, row: Tensor, stride: Tensor | None = None, full: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        bounds, calibrated, along, weights = row.split(self._widths)
        stretch = torch.ones_like(calibrated) if stride is None else (stride / calibrated).clamp(0.0, LONGEST)
        farther = None if full is None else carried(calibrated if stride is None else stride, full[0] - full[1])
        return bounds, stretch, farther, along, weights

    def _look(self, row: Tensor) -> None:
        """Warn once of a call outside of the calibrated positions; of one on a GPU when that happens to be known."""
        if not torch.compiler.is_compiling() and self._lookout.sees(row, len(self.table) - 1):
            self._say_that_it_is_outside()

    def _look_at(self, time: float, grid: Tensor) -> None:
        """Warn once of a call outside of them whose time is known, as is the grid."""
        if len(grid) and not self._lookout.said and _distance(time, grid, len(self.table) - 1) is None:
            self._lookout.said = True
            self._say_that_it_is_outside()

    def _say_that_it_is_outside(self) -> None:
        inner = self.grid[self.grid[:, 3] < len(self.table) - 1, 0]
        warn(
            "a calibrated adaptor works at the times that it was calibrated at; outside them it is the identity\n"
            f"  calibrated at: {float(inner.min()):g} to {float(inner.max()):g}\n"
            "What to do: calibrate it with the sampler and the number of steps that it is used with, and leave "
            "schedule= and clock= out of wrap()",
            OtherStepsWarning,
        )

    def _say_that_no_time_is_told(self) -> None:
        """Warn once of a call without a time, which is at no position."""
        counted = self.grid.is_meta  # by `flops_report`, on shapes alone
        if not (counted or self._lookout.said or torch.compiler.is_compiling()):
            self._lookout.said = True
            warn(
                "a calibrated adaptor needs the time of each call, and gets none: it acts as the identity\n"
                'What to do: name the time input, wrap(unet, adaptor, time="..."), as for calibrate(..., time="...")',
                OtherStepsWarning,
            )

    def distances(self, times: Sequence[float]) -> list[float | None]:
        """How far each of these times is from the calibrated positions: 0 at one, 0.5 half-way between two.

        None outside of them, where the adaptor is the identity.
        """
        grid, last = self.grid.detach().cpu(), len(self.table) - 1
        return [_distance(time, grid, last) if len(grid) else 0.0 for time in times]


def _distance(time: float, grid: Tensor, last: int) -> float | None:
    """How far a time is from the calibrated positions; None at the last row of the table, which is outside of them."""
    at = max(int(torch.searchsorted(grid[:, 0].contiguous(), single(time), right=True)) - 1, 0)
    start, _, _, place, slope = grid[at].tolist()
    place += (single(time) - start) * slope
    return None if place == last else abs(place - round(place))


def _sizes(axes: int, axis: int) -> tuple[int, ...]:
    """Of a value for each channel, to be added to an exit with so many axes, of which this is the channels'."""
    return (-1, *(1,) * (axes - 2)) if axis == 1 else (-1,)


class _Lookout:
    """Says once that something has happened on a device, without waiting for it; copies begin anew."""

    __slots__ = ("copied", "said", "seen")

    def __init__(self) -> None:
        self.said = False
        self.seen: Tensor | None = None  # on the device: has it happened?
        self.copied: tuple[Tensor, torch.cuda.Event] | None = None  # that, on its way to the host

    def sees(self, row: Tensor, last: int) -> bool:
        """Was the last row asked for, in this call or before? True once; of a GPU as soon as the answer has come."""
        if self.said:
            return False
        if row.device.type == "cpu":
            self.said = bool(row == last)
        elif row.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            happened = row == last
            self.seen = happened if self.seen is None else self.seen | happened
            if self.copied is None:
                there = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self.seen, non_blocking=True)
                self.copied = there, torch.cuda.Event()
                self.copied[1].record()
            elif self.copied[1].query():
                self.said, self.copied = bool(self.copied[0]), None
        return self.said

    def __reduce__(self) -> tuple[type[_Lookout], tuple[()]]:
        return _Lookout, ()


def carried(stride: Tensor, way: Tensor) -> Tensor:
    """How many times the way between two full passes a stride is, both in log-SNR; bounded, 0 where there is no way."""
    return torch.where(way == 0, 0.0, stride / way).clamp(0.0, _FARTHEST)


def around_of(x: Tensor) -> Tensor:
    """(B, (3ⁿ - 1)·C, *space): a map (B, C, *space) at the positions around each one, zero beyond the edge."""
    axes = x.ndim - 2
    padded = functional.pad(x, (1, 1) * axes)
    shifts = [at for at in itertools.product(range(3), repeat=axes) if at != (1,) * axes]
    parts = []
    for shift in shifts:
        part = padded
        for axis, start in enumerate(shift, 2):
            part = part.narrow(axis, start, x.shape[axis])
        parts.append(part)
    return torch.cat(parts, 1)


def like_exit(entry: Tensor, layout: Layout, cached: Tensor, exit: Layout) -> Tensor:
    """An entry, laid out as the exit is, and as large."""
    axis = 1 if exit.order in ("channels first", "tokens last") else -1
    same = layout.order == exit.order and entry.movedim(axis, 1).shape[2:] == cached.movedim(axis, 1).shape[2:]
    if not same:
        entry = exit.from_map(fit(layout.to_map(entry), tuple(exit.to_map(cached).shape[2:])))
    if entry.shape[0] != cached.shape[0]:
        raise AdaptorError(
            "entry and exit must have the same number of rows",
            seen={"entry": shape(entry.shape), "exit": shape(cached.shape)},
            do='do without the entry: kind="affine" or kind="exit"',
        )
    return entry.to(cached.dtype)


def _add_product(exit: Tensor, x: Tensor, matrices: Sequence[Tensor], axis: int) -> Tensor:
    """What matrices make of the channels of `x`, one after the other, added to the exit in its memory."""
    x, matrix = _products(x, matrices[:-1], axis), matrices[-1]
    if torch.compiler.is_compiling():  # one kernel then adds up all there is; in place, torch would copy first
        return exit + _product(x, matrix, axis)
    if axis == 1 and not _channels_last(x):
        return exit.flatten(2).baddbmm_(matrix.T.expand(len(x), -1, -1), x.flatten(2)).reshape(exit.shape)
    x, exit = x.movedim(axis, -1), exit.movedim(axis, -1)
    total = exit.reshape(-1, exit.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), matrix)
    return total.reshape(exit.shape).movedim(-1, axis)


def _products(x: Tensor, matrices: Sequence[Tensor], axis: int) -> Tensor:
    """What matrices make of the channels of `x`, one after the other."""
    for matrix in matrices:
        x = _product(x, matrix, axis)
    return x


def _product(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    if axis == 1 and not _channels_last(x):
        rows = x.flatten(2)
        return torch.bmm(matrix.T.expand(len(rows), -1, -1), rows).reshape(len(x), -1, *x.shape[2:])
    return (x.movedim(axis, -1) @ matrix).movedim(-1, axis)


def _channels_last(x: Tensor) -> bool:
    return x.ndim > 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def single(time: float) -> float:
    """As float32 has it, which is what an adaptor is called with."""
    return float(torch.tensor(time, dtype=torch.float32))


# -- trained from there on ------------------------------------------------------------------------------------------


class ResidualAdaptor(LearnedAdaptor):
    """What a calibrated adaptor predicts, and a learned difference, which starts at zero.

    So training starts where the closed form ends: a fresh one returns what the calibrated adaptor does, bit for bit.
    The network is that of `ScaledResNetAdaptor`; it also sees the entry that came with the cached exit. The calibrated
    part is not trained. Train it with `distill(unet, ResidualAdaptor.of(adaptor, region), generate, schedule=...)`.

    Args:
        start: the arguments of the calibrated adaptor.
        width: channels inside of the network.
        **inputs: those of `LearnedAdaptor`.

    Attributes:
        needs: names of what it is called with beside the entry, the cached exit, time and text.

    Example:
        >>> start = CalibratedAdaptor(form="affine", knots=2, points=8, exit=Layout(4, (8, 8)))
        >>> adaptor = ResidualAdaptor(start=start.arguments, width=8, exit=Layout(4, (8, 8)))
        >>> cached, time = torch.randn(1, 4, 8, 8), torch.tensor(900.0)
        >>> torch.equal(adaptor(None, cached, position=time), start(None, cached, position=time))
        True

    Source: arXiv 2312.08128, Sec. 4.2, for the network; that it starts at a calibrated adaptor is our own addition.
    """

    def __init__(self, *, start: Mapping[str, Any], width: int, **inputs: Any) -> None:
        super().__init__(own={"start": dict(start), "width": width}, **inputs)
        own = {name: value for name, value in start.items() if name in ("form", "knots", "points", "rank")}
        own |= {name: start[name] for name in ("exit", "entry", "reads_before", "reads_trend") if name in start}
        self.start = CalibratedAdaptor(**own)
        both = None if self.entry is None else Layout(2 * self.entry.channels, self.entry.space, self.entry.order)
        widths: dict[str, Any] = {"time": self.time_width, "text": self.text_width}
        self.network = ScaledResNetAdaptor(width=width, exit=self.exit, entry=both, **widths)
        self.needs = self.start.needs | (set() if self.entry is None else {"entry_cached"})

    def prepare(self, times: Sequence[float], exit_cached: Tensor) -> Any:
        """What the calibrated part prepares."""
        return self.start.prepare(times, exit_cached)

    @classmethod
    def of(cls, start: CalibratedAdaptor, region: Region, *, width: int | None = None) -> ResidualAdaptor:
        """One that starts as this calibrated adaptor.

        Args:
            start: of this region.
            region: what it stands in for.
            width: channels inside of the network; None for those of the entry.

        Raises:
            AdaptorError: the adaptor was calibrated for another region.
        """
        start.check_region(region)
        channels = Layout.of_boundary(region.entry).channels if "entry" in region.inputs else start.exit.channels
        adaptor = cls.for_region(region, start=start.arguments, width=width or channels)
        adaptor.start.load_state_dict(start.state_dict())
        adaptor.facts = dict(start.facts)
        return adaptor

    @classmethod
    def sized(cls, channels: int, *, start: Mapping[str, Any], width: int) -> dict[str, Any]:  # type: ignore[override]
        """The options as they are."""
        return {"start": start, "width": width}

    def forward(
        self,
        entry: Tensor | None,
        exit_cached: Tensor,
        *,
        time: Tensor | None = None,
        text: Tensor | None = None,
        entry_cached: Tensor | None = None,
        position: Tensor | None = None,
        position_cached: Tensor | None = None,
        trend: Tensor | None = None,
        trend_positions: Tensor | None = None,
        prepared: Any = None,
    ) -> Tensor:
        """Return the exit; see `CalibratedAdaptor.forward`."""
        values: dict[str, Any] = {"entry_cached": entry_cached}
        values |= {"position": position, "position_cached": position_cached}
        values |= {"trend": trend, "trend_positions": trend_positions, "prepared": prepared}
        start = self.start(entry, exit_cached, **{name: values[name] for name in self.start.needs})
        both = None
        if self.entry is not None:
            if entry is None or entry_cached is None:
                raise AdaptorError(
                    "this adaptor reads the region's entry, now and when the cached exit was made",
                    seen={"entry": entry is not None, "entry_cached": entry_cached is not None},
                    do="make one for a region whose entry can be picked up",
                )
            axis = 1 if self.entry.order in ("channels first", "tokens last") else -1
            both = torch.cat([entry, entry_cached], axis)
        difference = self.network(both, exit_cached, time=time, text=text) - exit_cached
        exit: Tensor = start + difference
        return exit

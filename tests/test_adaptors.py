"""The learned adaptors: their size, the identity that they start as, what they read, how they lay out any boundary."""

import copy
import importlib.util
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.adaptors import LearnedAdaptor
from clockwork_hooks.adaptors.learned import fit, vector
from clockwork_hooks.regions.region import Boundary, Layout
from tests.zoo import ZOO
from tests.zoo.case import ZooCase

CASES = (
    *("unet2d", "sd15", "sd15_controlnet", "sdxl", "kandinsky22", "unet1d", "unet3d", "svd"),
    *("plain", "ddpm_pytorch", "monai3d", "a_unet1d"),
)


def region_of(case: ZooCase, **options: Any) -> ch.Region:
    return ch.find_region(case.model, *case.args, **options, **case.kwargs)


def alive(adaptor: LearnedAdaptor) -> LearnedAdaptor:
    """With no layer at zero: what it returns depends on all that it is given."""
    with torch.no_grad():
        for parameter in adaptor.parameters():
            parameter.normal_(std=0.1)
    return adaptor


def rollout(case: ZooCase, adaptor: Any, *, steps: int = 2, **options: Any) -> list[Tensor]:
    """Outputs of some steps, every second one with the adaptor."""
    name = next((n for n in ("timestep", "time", "timesteps") if n in case.kwargs), None)
    outputs = []
    with torch.no_grad(), ch.wrap(case.model, adaptor, **options) as cw, cw.trajectory():
        for t in (900, 600, 300, 1)[:steps]:
            args, kwargs = list(case.args), dict(case.kwargs)
            for k, value in enumerate(args[1:2], 1):
                args[k] = torch.full_like(value, t) if isinstance(value, Tensor) else t
            if name:
                kwargs[name] = torch.full_like(kwargs[name], t)
            if len(args) + len(kwargs) == 1:
                cw.step()
            out = cw(*args, **kwargs)
            outputs.append(out if isinstance(out, Tensor) else out[0])
        assert cw.stats.adaptor_passes >= 1
    return outputs


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> Any:
    """benchmarks/adaptor_sizes.py."""
    place = Path(__file__).parent.parent / "benchmarks" / "adaptor_sizes.py"
    spec = importlib.util.spec_from_file_location("adaptor_sizes", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def on_sd15(script: Any) -> Any:
    """Name → (adaptor, parameters, MACs of a sample, share) for SD v1.5 with the paper's cut."""
    return script.sizes()


def test_the_resnet_adaptor_on_sd15(on_sd15: Any) -> None:
    """By hand: 960→320 strided, two blocks with the time, 320→640 transposed, 960→640, the text."""
    adaptor, parameters, macs, _ = on_sd15["ResNetAdaptor"]
    assert adaptor.width == 320
    assert isinstance(adaptor.down, nn.Conv2d)
    assert isinstance(adaptor.up, nn.ConvTranspose2d)
    assert adaptor.down.kernel_size == adaptor.up.kernel_size == (4, 4)
    assert isinstance(adaptor.residual, nn.Conv2d)
    assert adaptor.residual.weight.shape == (640, 960, 1, 1)
    strided, blocks, transposed, residual = 16 * 960 * 320, 4 * 9 * 320**2, 16 * 320 * 640, 960 * 640
    vectors = 2 * 1280 * 320 + 768 * 320
    biases = 320 + 2 * (2 * 320 + 2 * 2 * 320 + 320) + 640 + 640 + 320
    assert parameters == strided + blocks + transposed + residual + vectors + biases
    assert macs == 16 * 16 * (strided + blocks + transposed) + 32 * 32 * residual + vectors
    assert 13e6 < parameters < 15e6
    assert 7.2e9 < 2 * macs < 7.4e9


def test_the_unet_adaptors_on_sd15(on_sd15: Any) -> None:
    """By hand: widths, blocks and levels as the paper tells them; the rest is our reading."""
    for light, (width, middle, blocks), stated in ((False, (640, 4, 2), 152e6), (True, (96, 2, 1), 3e6)):
        adaptor, parameters, macs, _ = on_sd15["UNetAdaptor, light" if light else "UNetAdaptor"]
        assert (adaptor.width, adaptor.middle, adaptor.blocks) == (width, middle, blocks)
        stem, last, resample = 16 * 960 * width, 16 * width * 640, 16 * width**2
        block, wide = 18 * width**2, 27 * width**2 + 2 * width**2
        vectors = (768 + 1280 + (middle + 4 * blocks) * width) * width
        assert macs == (
            (16 * 16) * (stem + last)
            + (8 * 8) * (2 * resample + blocks * (block + wide))
            + (4 * 4) * (2 * resample + blocks * (block + wide) + middle * block)
            + vectors
        )
        weights = stem + last + 4 * resample + 2 * blocks * (block + wide) + middle * block + vectors
        assert weights < parameters < 1.02 * weights
        assert 0.98 < parameters / stated < (1.6 if light else 1.04)


# -- the identity, and what else it may become -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_adaptor_is_the_identity(name: str) -> None:
    """Bit for bit, on 1-D, 2-D and 3-D UNets with and without time and text; with other weights it is not."""
    case = ZOO[name]()
    region = region_of(case)
    expected = rollout(case, "identity", region=region)
    for kind in (ch.ResNetAdaptor, ch.UNetAdaptor):
        adaptor = kind.for_region(region, width=8)
        assert all(map(torch.equal, rollout(case, adaptor, region=region), expected))
        assert not torch.equal(rollout(case, alive(adaptor), region=region)[1], expected[1])


@pytest.mark.parametrize("kind", [ch.ResNetAdaptor, ch.UNetAdaptor])
@pytest.mark.parametrize(
    "inputs", [("entry",), ("exit",), ("entry", "exit"), ("entry", "text"), ("entry", "exit", "text")]
)
def test_it_reads_its_inputs_and_nothing_else(kind: Any, inputs: tuple[str, ...]) -> None:
    """The paper's Tab. 5: what changes the prediction is what `inputs` names, and the time."""
    region = region_of(ZOO["sd15"]())
    adaptor = alive(kind.for_region(region, inputs=inputs, width=8))
    values = {
        "entry": torch.randn(region.entry.shape),
        "exit": torch.randn(region.exit.shape),
        "time": torch.randn(2, 64),
        "text": torch.randn(2, 7, 24),
    }

    def call(**other: Tensor) -> Tensor:
        now = {**values, **other}
        out: Tensor = adaptor(now["entry"], now["exit"], time=now["time"], text=now["text"])
        return out

    with torch.no_grad():
        before = call()
        changed = {name for name, value in values.items() if not torch.equal(call(**{name: value + 1}), before)}
    assert changed == {*inputs, "time"}


def test_every_parameter_learns() -> None:
    """A few steps from the identity, all parameters have a gradient, and the loss is smaller."""
    region = region_of(ZOO["sd15"]())
    for kind in (ch.ResNetAdaptor, ch.UNetAdaptor):
        adaptor = kind.for_region(region, width=16)
        entry, exit, target = (torch.randn(b.shape) for b in (region.entry, region.exit, region.exit))
        time, text = torch.randn(2, 64), torch.randn(2, 7, 24)
        optimizer = torch.optim.Adam(adaptor.parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            loss = (adaptor(entry, exit, time=time, text=text) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]
        assert [name for name, p in adaptor.named_parameters() if p.grad is None or not p.grad.any()] == []


@settings(max_examples=40)
@given(space=st.lists(st.integers(1, 9), min_size=1, max_size=3), batch=st.integers(1, 3), kind=st.booleans())
def test_any_size(space: list[int], batch: int, kind: bool) -> None:
    """Also odd sizes and single pixels, one axis to three; a fresh one returns the cached exit itself."""
    channels = Layout(6, tuple(space))
    cls = ch.ResNetAdaptor if kind else ch.UNetAdaptor
    adaptor = cls(exit=channels, entry=Layout(4, tuple(space)), time=5, width=8)
    entry, exit = torch.randn(batch, 4, *space), torch.randn(batch, 6, *space)
    with torch.no_grad():
        assert torch.equal(adaptor(entry, exit, time=torch.randn(1, 5)), exit)
        other = alive(adaptor)(entry, exit, time=torch.randn(1, 5))
    assert other.shape == exit.shape
    assert other.isfinite().all()


def test_an_entry_of_another_size() -> None:
    """Brought to the exit's size by averages or repetition."""
    grid = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert fit(grid, (2, 2)).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert fit(torch.arange(2.0).reshape(1, 1, 2), (4,)).tolist() == [[[0, 0, 1, 1]]]
    adaptor = ch.ResNetAdaptor(exit=Layout(6, (4, 4)), entry=Layout(3, (8, 8)), width=8)
    exit = torch.randn(2, 6, 4, 4)
    assert torch.equal(adaptor(torch.randn(2, 3, 8, 8), exit), exit)
    assert alive(adaptor)(torch.randn(2, 3, 8, 8), exit).shape == exit.shape


def test_another_dtype() -> None:
    """A float32 adaptor computes in float32 and serves a bfloat16 UNet; under autocast it keeps the exit's dtype."""
    adaptor = ch.ResNetAdaptor(exit=Layout(6, (4, 4)), time=5, width=8)
    exit, time = torch.randn(2, 6, 4, 4).bfloat16(), torch.randn(2, 5).bfloat16()
    assert torch.equal(adaptor(None, exit, time=time), exit)
    output = alive(adaptor)(None, exit, time=time)
    assert output.dtype == exit.dtype
    assert torch.allclose(output.float(), adaptor(None, exit.float(), time=time.float()), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert adaptor(None, exit.float(), time=time).dtype == torch.float32


# -- layouts ---------------------------------------------------------------------------------------------------------


def boundary(sizes: tuple[int, ...], resolution: tuple[int, ...]) -> Boundary:
    return Boundary("m", 0, ("m",), sizes, torch.float32, resolution, 0)


@pytest.mark.parametrize(
    ("sizes", "resolution", "layout"),
    [
        ((2, 6, 4, 8), (4, 8), Layout(6, (4, 8))),
        ((2, 6, 4), (4,), Layout(6, (4,))),
        ((2, 6, 3, 4, 8), (3, 4, 8), Layout(6, (3, 4, 8))),
        ((2, 6, 3, 4, 8), (4, 8), Layout(6, (3, 4, 8))),  # frames with an axis of their own
        ((2, 4, 8, 6), (4, 8), Layout(6, (4, 8), "channels last")),
        ((2, 4, 6), (4,), Layout(6, (4,), "channels last")),
        ((2, 32, 6), (4, 8), Layout(6, (4, 8), "tokens")),
        ((2, 6, 32), (4, 8), Layout(6, (4, 8), "tokens last")),
    ],
)
def test_layouts(sizes: tuple[int, ...], resolution: tuple[int, ...], layout: Layout) -> None:
    assert Layout.of_boundary(boundary(sizes, resolution)) == layout
    x = torch.arange(float(torch.Size(sizes).numel())).reshape(sizes)
    grid = layout.to_map(x)
    assert grid.shape == (2, 6, *layout.space)
    assert torch.equal(layout.from_map(grid), x)
    adaptor = ch.ResNetAdaptor(exit=layout, entry=layout, width=8)
    assert torch.equal(adaptor(x, x), x)
    assert alive(adaptor)(x, x).shape == x.shape


def test_tokens_of_another_size() -> None:
    layout = Layout(6, (4, 8), "tokens")
    assert layout.to_map(torch.zeros(1, 128, 6)).shape == (1, 6, 8, 16)
    with pytest.raises(ch.AdaptorError, match="proportions of the traced one"):
        layout.to_map(torch.zeros(1, 51, 6))


def test_layouts_that_are_none() -> None:
    with pytest.raises(ch.AdaptorError, match="a boundary is"):
        Layout.of_boundary(boundary((2, 6, 33), (4, 8)))
    with pytest.raises(ch.AdaptorError, match="must have the layout that the adaptor was made for"):
        Layout(6, (4, 8)).to_map(torch.zeros(2, 7, 4, 8))
    with pytest.raises(ch.AdaptorError, match="same number of spatial axes"):
        ch.ResNetAdaptor(exit=Layout(6, (4, 8)), entry=Layout(6, (32,)), width=8)


class Channelslast(nn.Module):
    """A UNet whose region works on channels-last or token tensors."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.down, self.body = nn.Linear(32, 24), nn.Sequential(nn.Linear(24, 64), nn.SiLU(), nn.Linear(64, 24))
        self.mix, self.up = nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 32)

    def forward(self, x: Tensor, t: int) -> Tensor:
        h = self.stem(x)
        z = nn.functional.pixel_unshuffle(h, 2).movedim(1, -1)
        grid = z.shape[1:3]
        z = self.body(self.down(z.flatten(1, 2) if self.tokens else z))
        z = z.unflatten(1, grid) if self.tokens else z
        z = self.mix(z.movedim(-1, 1)).movedim(1, -1) * (1 + t / 1000)
        z = self.up(z.flatten(1, 2) if self.tokens else z)
        z = z.unflatten(1, grid) if self.tokens else z
        return self.head(torch.cat([h, nn.functional.pixel_shuffle(z.movedim(-1, 1), 2)], 1))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.filterwarnings("ignore:an adaptor has to take fewer MACs:clockwork_hooks.NoEffectWarning")
def test_a_region_of_another_layout(tokens: bool) -> None:
    torch.manual_seed(0)
    unet = Channelslast(tokens).eval()
    region = ch.find_region(unet, torch.randn(2, 3, 8, 12), 5, entry="down", exit="up")
    adaptor = ch.ResNetAdaptor.for_region(region)
    assert adaptor.exit == Layout(32, (4, 6), "tokens" if tokens else "channels last")
    with torch.no_grad():
        for same in (True, False):
            other = adaptor if same else alive(adaptor)
            with ch.wrap(unet, other, region=region) as cw, cw.trajectory():
                sample = torch.randn(2, 3, 8, 12)
                cw(sample, 900)
                out = cw(sample, 600)
                assert cw.stats.adaptor_passes == 1
            with ch.wrap(unet, region=region) as cw, cw.trajectory():
                cw(sample, 900)
                assert torch.equal(cw(sample, 600), out) is same


# -- errors ----------------------------------------------------------------------------------------------------------


def test_conditions_that_do_not_fit() -> None:
    adaptor = ch.ResNetAdaptor(exit=Layout(6, (4, 4)), entry=Layout(3, (4, 4)), time=5, text=7, width=8)
    entry, exit, time, text = torch.zeros(4, 3, 4, 4), torch.zeros(4, 6, 4, 4), torch.zeros(4, 5), torch.zeros(4, 9, 7)
    assert adaptor(entry, exit, time=time[:1], text=text[:2]).shape == exit.shape
    with pytest.raises(ch.AdaptorError, match="reads the region's entry"):
        adaptor(None, exit, time=time, text=text)
    for wrong in ({"time": None}, {"text": None}, {"time": time[:, :4]}, {"time": time[:3]}, {"text": text[:, 0, :6]}):
        with pytest.raises(
            ch.AdaptorError, match="embedding must have the width and rows that the adaptor was made for"
        ):
            adaptor(entry, exit, **{"time": time, "text": text, **wrong})  # type: ignore[arg-type]


def test_rows_that_do_not_fit() -> None:
    adaptor = ch.ResNetAdaptor(exit=Layout(6, (4, 4)), entry=Layout(3, (4, 4)), width=8)
    with pytest.raises(ch.AdaptorError, match="the same number of rows"):
        adaptor(torch.zeros(2, 3, 4, 4), torch.zeros(4, 6, 4, 4))


def test_vectors() -> None:
    """(B, D), (B, D, 1, 1), tokens averaged; the frames of a clip share its vector."""
    x = torch.arange(12.0).reshape(2, 6)
    assert torch.equal(vector(x, 6, 2, "time"), x)  # type: ignore[arg-type]
    assert torch.equal(vector(x[:, :, None, None], 6, 2, "time"), x)  # type: ignore[arg-type]
    assert torch.equal(vector(x.reshape(2, 3, 2), 2, 2, "text"), x.reshape(2, 3, 2).mean(1))  # type: ignore[arg-type]
    assert torch.equal(vector(x, 6, 6, "time"), x[[0, 0, 0, 1, 1, 1]])  # type: ignore[arg-type]
    assert vector(x, None, 2, "text") is None


@pytest.mark.parametrize("inputs", [("text",), (), "entry", ("entry", "time")])
def test_inputs_that_are_none(inputs: Any) -> None:
    with pytest.raises(ch.ArgumentError):
        ch.ResNetAdaptor.for_region(region_of(ZOO["sd15"]()), inputs=inputs)


@pytest.mark.parametrize("width", [0, -8, 1.5, "wide"])
@pytest.mark.parametrize("kind", ch.adaptors.KINDS)
def test_a_width_that_is_none(kind: str, width: Any) -> None:
    with pytest.raises(ch.ArgumentError, match="width is an int of at least 1"):
        getattr(ch, ch.adaptors.KINDS[kind]).for_region(region_of(ZOO["volumes"]()), width=width)


def test_a_region_without_a_capturable_entry() -> None:
    """It does without the entry; an adaptor that would read nothing else is an error."""
    case = ZOO["kandinsky22"]()
    region = region_of(case, cut="paper")
    assert set(region.inputs) == {"time", "text"}
    adaptor = ch.ResNetAdaptor.for_region(region)
    assert adaptor.entry is None
    assert adaptor.width == 16
    assert all(map(torch.equal, rollout(case, adaptor, region=region), rollout(case, None, region=region)))
    with pytest.raises(ch.ArgumentError, match="reads the entry, the exit of the step before, or both"):
        ch.ResNetAdaptor.for_region(region, inputs=("entry",))


def exchanged(unet: nn.Module, *args: Any) -> None:
    """A module that is not skipped is another one from now on."""
    unet.join = copy.deepcopy(unet.join)


def cleared(unet: nn.Module, *args: Any) -> None:
    for module in unet.modules():
        module._forward_hooks.clear()


@pytest.mark.parametrize("happens", [exchanged, cleared, ch.trace])
def test_the_boundary_is_seen_whatever_happens_between_runs(happens: Any) -> None:
    """Entry and time come from modules that are hooked and not patched: their hooks are put back."""
    case, given = ZOO["token_unet"](), []
    x, _ = case.args

    def adaptor(entry: Tensor, exit_cached: Tensor, *, time: Tensor, text: Tensor) -> Tensor:
        given.append((entry, time))
        return exit_cached

    with torch.no_grad(), ch.wrap(case.model, adaptor) as cw:
        for _ in range(3):
            happens(case.model, x, torch.tensor((0.2, 0.2)))
            with cw.trajectory():
                for t in torch.tensor((0.9, 0.7, 0.5, 0.3)):
                    case.model(x, t.expand(len(x)))
    assert [None if one is None else tuple(one.shape) for pair in given for one in pair] == [(2, 64, 16), (2, 16)] * 6


def test_a_subclass_is_an_adaptor_too() -> None:
    assert isinstance(ch.UNetAdaptor(exit=Layout(4, (8,)), width=8), ch.Adaptor)
    with pytest.raises(ch.ArgumentError, match="1 to 64 blocks"):
        ch.UNetAdaptor(exit=Layout(4, (8,)), width=8, middle=0)
    assert replace(Layout(4, (8,)), channels=5).channels == 5


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_what_is_so(script: Any, on_sd15: Any) -> None:
    """Its table is the script's, and its own adaptor is the identity at first."""
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.BETWEEN.search(page).group() == script.table(on_sd15)
    blocks = re.findall(r"(?:(?<=\n\n)|^)((?:    .*\n|\n(?=    ))+)", page, re.MULTILINE)
    own = next(block for block in blocks if "class Blend" in block)
    region = region_of(ZOO["sd15"]())
    names: dict[str, Any] = {"torch": torch, "region": region}
    exec(textwrap.dedent(own), names)
    exit = torch.randn(region.exit.shape)
    output = names["adaptor"](torch.randn(region.entry.shape), exit, time=torch.randn(2, 64), text=torch.randn(2, 24))
    assert torch.equal(output, exit)

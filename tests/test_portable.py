"""One file serves the same network in every code of it: fingerprints are of the graph, not of names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.demo.run import ADAPTOR
from clockwork_hooks.regions.fingerprint import PREFIX
from tests.layouts import TEXT, layouts
from tests.small_unet import Tiny
from tests.test_adaptors import alive

Net = tuple[nn.Module, Callable[..., Tensor]]
X, TEXTS = torch.randn(2, 4, 16, 16), torch.randn(2, 5, TEXT)
TIMES = torch.tensor([900, 600, 300, 100])


@pytest.fixture(scope="module")
def nets() -> dict[str, Net]:
    return layouts()


def regions(net: nn.Module, call: Callable[..., Tensor]) -> list[ch.Region]:
    """All of them, and the paper's cuts."""
    args: dict[str, Any] = {}

    def record(*inputs: Any, **named: Any) -> Tensor:
        args.update(args=inputs, named={name: value for name, value in named.items() if name != "return_dict"})
        return X[None]

    call(record, X, TIMES[0], TEXTS)
    chain = ch.find_regions(net, *args["args"], **args["named"])
    return [edge for region in chain for edge in (region, region.inner) if edge is not None]


def loop(net: nn.Module, call: Callable[..., Tensor], adaptor: Any, **options: Any) -> Tensor:
    x = X
    with torch.no_grad(), ch.wrap(net, adaptor, **options) as cw:
        call(net, x, TIMES[0], TEXTS)  # records: of some cuts the exit is not among what the first call keeps
        cw.reset()
        for t in TIMES:
            x = x - 0.1 * call(net, x, t, TEXTS)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (3, 2)
    return x


def test_the_codes_are_one_network_with_the_same_fingerprints(nets: dict[str, Net]) -> None:
    with torch.no_grad():
        outputs = [call(net, X, TIMES[0], TEXTS) for net, call in nets.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)
    each = [[(edge.fingerprint, edge.level, edge.cut) for edge in regions(*net)] for net in nets.values()]
    assert each[0] == each[1] == each[2]
    assert len({fingerprint for fingerprint, *_ in each[0]}) >= 5
    names = [{edge.exit.path for edge in regions(*net)} for net in nets.values()]
    assert not names[0] & names[1]
    assert not names[1] & names[2]


@pytest.mark.parametrize("saved_on", ["diffusers", "ldm", "chains"])
def test_an_adaptor_saved_on_one_code_serves_the_others(nets: dict[str, Net], saved_on: str, tmp_path: Path) -> None:
    for k, region in enumerate(regions(*nets[saved_on])[1:4]):
        torch.manual_seed(k)
        alive(ch.ResNetAdaptor.for_region(region, width=8)).save_pretrained(tmp_path / str(k))
        pictures = [loop(*net, str(tmp_path / str(k))) for net in nets.values()]
        for picture in pictures[1:]:
            torch.testing.assert_close(picture, pictures[0], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(pictures[0], loop(*nets[saved_on], None, region=region), atol=1e-3)


def test_live_calls_and_searches_agree_in_every_code(nets: dict[str, Net]) -> None:
    for net, call in nets.values():
        expected = regions(net, call)[2].fingerprint
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients), ch.wrap(net) as cw:
                call(net, X, TIMES[0], TEXTS)
                assert cw.region is not None
                assert cw.region.fingerprint == expected


class LowRank(nn.Module):
    """A layer with a product of low rank beside it, as LoRA adds it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer = layer
        if isinstance(layer, nn.Linear):
            self.a, self.b = nn.Linear(layer.in_features, 2, False), nn.Linear(2, layer.out_features, False)
        else:
            self.a = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)  # type: ignore[assignment]
            self.b = nn.Conv2d(2, layer.out_channels, 1, bias=False)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x)) * 0.5


def test_what_lora_adds_changes_no_fingerprint() -> None:
    net, call = layouts()["diffusers"]
    before = [edge.fingerprint for edge in regions(net, call)]
    for path, module in list(net.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and "time" not in path and path != "conv_in":
            around, _, name = path.rpartition(".")
            setattr(net.get_submodule(around), name, LowRank(module))
    assert [edge.fingerprint for edge in regions(net, call)] == before


def test_another_stem_or_text_keeps_it_and_another_width_does_not() -> None:
    """The inpainting model's first convolution has more channels; what the region is made of is the same."""
    one, wide, deeper = Tiny(), Tiny(), Tiny()
    wide.stem = nn.Conv2d(5, 8, 3, padding=1)
    deeper.body = nn.Conv2d(16, 16, 5, padding=2)
    x, t = torch.zeros(1, 2, 16, 16), torch.tensor(500.0)
    fingerprint = ch.find_region(one, x, t).fingerprint
    assert ch.find_region(wide, torch.zeros(1, 5, 16, 16), t).fingerprint == fingerprint
    assert ch.find_region(deeper, x, t).fingerprint != fingerprint


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Steps(nn.Module):
    """Levels of convolutions alike; between the first one's output and the region come `steps`."""

    def __init__(self, *steps: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.steps = steps
        self.one, self.two, self.down = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 8, 4, 2, 1)
        self.body, self.up = nn.Conv2d(8, 8, 3, 1, 1), nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.head, self.exit = nn.Conv2d(12, 2, 3, 1, 1), Applied(after)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.one(x)
        g = self.two(h)
        for step in self.steps:
            g = step(g)
        z = self.exit(self.up(self.body(self.down(g))))
        return self.head(torch.cat([h, g, z], 1)) + 0 * torch.as_tensor(t).reshape(-1, 1, 1, 1)


def test_what_lies_at_the_ports_tells_regions_apart() -> None:
    """A scaling, an activation, a resampling or one convolution more or less, before the entry or before the exit."""
    kinds: list[Steps] = [
        Steps(),
        Steps(lambda h: 2 * h),
        Steps(lambda h: 2 * h, lambda h: h / 2),
        Steps(torch.tanh),
        Steps(after=lambda h: 2 * h),
        Steps(after=torch.tanh),
        Steps(after=lambda h: torch.tanh(2 * h)),
    ]
    x = torch.zeros(1, 2, 16, 16)
    fingerprints = [ch.find_region(net.eval(), x, 0.5).fingerprint for net in kinds]
    assert len(set(fingerprints)) == len(kinds)
    plain = Steps().eval()
    by_hand = [ch.find_region(plain, x, 0.5, entry=entry, exit="up").fingerprint for entry in ("two", "down", "body")]
    assert len({*by_hand, fingerprints[0]}) == 3
    assert fingerprints[0] == by_hand[0]


# -- files of earlier versions --------------------------------------------------------------------------------------


def test_a_file_of_an_earlier_version_is_compared_by_names(tmp_path: Path) -> None:
    unet, x, t = Tiny(), torch.zeros(1, 2, 16, 16), torch.tensor(500.0)
    region = ch.find_region(unet, x, t)
    adaptor = ch.ResNetAdaptor.for_region(region, width=4)
    assert region.fingerprint.startswith(PREFIX)
    assert adaptor.region is not None
    adaptor.region["fingerprint"] = "0015fb3842035e8a"  # as it was: of names
    adaptor.save_pretrained(tmp_path)
    with torch.no_grad(), ch.wrap(unet, tmp_path) as cw:
        cw(x, t)
        assert cw.region is not None
        assert cw.region.fingerprint == region.fingerprint
    adaptor.region["exit"]["path"] = "head"
    with pytest.raises(ch.AdaptorError, match="made for") as raised:
        adaptor.check_region(region)
    assert raised.value.seen["exit path"] == "head → up"
    assert "earlier version" in raised.value.do


def test_the_demo_models_own_adaptor_has_a_fingerprint_of_its_graph() -> None:
    adaptor = ch.ResNetAdaptor.from_pretrained(ADAPTOR)
    assert adaptor.region is not None
    assert adaptor.region["fingerprint"].startswith(PREFIX)

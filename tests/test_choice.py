"""Regions by choice: each way of choosing, through `find_region`, `wrap`, `flops_report` and the command line."""

import json
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UVit2DModel
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.cli import main
from clockwork_hooks.regions.find import Search, match
from tests.bendable import Tiny, noise, proven
from tests.test_regions import T, conv
from tests.zoo.case import enliven

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Wide(Tiny):
    """Two blocks a level on each arm, three levels: 16, 8, 4; so two regions lie below each level but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = conv(8, 8), conv(16, 8)
        self.enter2, self.leave2 = conv(32, 32), conv(64, 32)
        self.down2, self.deep, self.up2 = conv(32, 64, 2), conv(64, 64), nn.ConvTranspose2d(64, 32, 4, 2, 1)
        self.merge = conv(64, 32)
        self.head = nn.Sequential(conv(16, 16), conv(16, 3))  # the widest region leaves enough

    def forward(self, x: Tensor, t: Any) -> Tensor:
        one = self.stem(x)
        two = self.enter(one)
        three = self.body(self.down(two) + self.time(t, x))
        four = self.enter2(three)
        low = self.up2(self.deep(self.down2(four)))
        low = self.merge(torch.cat((three, self.leave2(torch.cat((four, low), 1))), 1))
        return self.join(one, self.leave(torch.cat((two, self.up(low)), 1)))


def dit(blocks: int = 5, batch: int = 2, size: int = 8) -> Call:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(2, 8, 4, num_layers=blocks, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    enliven(model)  # its gates start at zero, which hides every block
    conditions = {"timestep": torch.full((batch,), 5), "class_labels": torch.ones(batch, dtype=torch.long)}
    return model, (noise(batch, 4, size, size),), conditions


def plain_dit() -> Call:
    """What the command line builds on the meta device."""
    model = DiTTransformer2DModel(2, 8, 4, num_layers=5, sample_size=8, patch_size=2, num_embeds_ada_norm=10).eval()
    ones = torch.ones(2, dtype=torch.long)
    return model, (torch.zeros(2, 4, 8, 8),), {"timestep": ones, "class_labels": ones}


def uvit() -> Call:
    torch.manual_seed(0)
    model = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=8,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=12,
        vocab_size=16,
        codebook_size=15,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        sample_size=8,
    )
    enliven(model)
    args = (torch.randint(0, 15, (2, 8, 8)), torch.randn(2, 5, 12), torch.randn(2, 8), torch.rand(2, 5) * 100)
    return model, args, {}


# -- in a UNet ------------------------------------------------------------------------------------------------------


def test_the_chain_of_the_test_model() -> None:
    """What the other tests choose from: entry, exit, level, edge."""
    chain = [(r.entry.path, r.exit.path, r.level, r.resolution) for r in ch.find_regions(Wide(), noise(), T)]
    assert chain == [
        ("stem", "leave", 1, (16, 16)),
        ("enter", "up", 1, (16, 16)),
        ("body", "leave2", 2, (8, 8)),
        ("enter2", "up2", 2, (8, 8)),
    ]


WAYS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({}, ("enter", "up")),
    ({"level": 1}, ("enter", "up")),
    ({"level": 2}, ("enter2", "up2")),
    ({"resolution": 8}, ("enter2", "up2")),
    ({"resolution": (16, 16)}, ("enter", "up")),
    ({"share": 0.85}, ("stem", "leave")),
    ({"share": 0.21}, ("enter2", "up2")),
    ({"level": 1, "share": 0.21}, ("enter", "up")),
    ({"level": 2, "share": 0.45}, ("body", "leave2")),
    ({"resolution": 8, "share": 0.45}, ("body", "leave2")),
    ({"cut": "paper"}, ("down", "merge")),
    ({"resolution": 8, "cut": "paper"}, ("down", "merge")),
    ({"resolution": 4, "cut": "paper"}, ("down2", "deep")),
    ({"entry": "body", "exit": "leave2"}, ("body", "leave2")),
    ({"modules": ["enter2", "down2", "deep", "up2", "leave2"]}, ("body", "leave2")),
    ({"modules": "down2:up2"}, ("enter2", "up2")),
]


@pytest.mark.parametrize(("options", "ends"), WAYS, ids=str)
def test_every_way_of_choosing(options: dict[str, Any], ends: tuple[str, str]) -> None:
    """`find_region`, `flops_report` and `wrap` at its first call choose the same one; proven by execution."""
    model, x = Wide(), noise()
    region = ch.find_region(model, x, T, **options)
    assert (region.entry.path, region.exit.path) == ends
    proven(model, x, T, region=region)
    live = ch.find_region(model, x, 900, **options)
    assert ch.flops_report(model, x, T, **options).region == region
    with torch.no_grad(), ch.wrap(model, **options) as cw, cw.trajectory():
        assert cw.region is None
        for t in (900, 800):
            model(x, t)
        assert cw.region is not None
        assert cw.region.fingerprint == live.fingerprint
        late = cw.stats.reasons["traced"]  # the exit of the paper's cut may not be kept while the first call is traced
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (1 + late, 1 - late), cw.report()
        assert late <= ("cut" in options)


@torch.no_grad()
def test_a_chosen_region_stays_the_same_at_other_sizes() -> None:
    """32×32 is the edge of the region at one size; at another size it is the same modules that are skipped."""
    model = Wide()
    with ch.wrap(model, resolution=8) as cw, cw.trajectory():
        for size in (16, 32):
            for t in (900, 800):
                model(noise(1, 3, size, size), t)
        assert cw.region is not None
        assert cw.region.exit.path == "up2"
    assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2, 2), cw.report()


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"level": 3}, ch.RegionNotFoundError, r"levels with a region: \[1, 2\]"),
    ({"resolution": 4}, ch.RegionNotFoundError, r"resolutions with a region: \['16×16', '8×8'\]"),
    ({"resolution": (8, 16)}, ch.RegionNotFoundError, "region 3: enter2 → up2, 8×8 down to 4×4"),
    ({"share": 0.96}, ch.RegionNotFoundError, r"shares with a region: \['8\d\.\d%'"),
    ({"level": 2, "share": 0.9}, ch.RegionNotFoundError, r"shares with a region: \['4\d\.\d%', '2\d\.\d%'\]"),
    ({"modules": ["depe"]}, ch.ArgumentError, "near it: deep"),
    ({"entry": "enter3", "exit": "up"}, ch.ArgumentError, "near it: enter, enter2"),
    ({"entry": "enter", "exit": "upp"}, ch.ArgumentError, "near it: up"),
    ({"modules": "deep:nowhere"}, ch.ArgumentError, "not called: nowhere"),
    ({"modules": "up2:down2"}, ch.ArgumentError, "called later"),
    ({"modules": ["down2", "up2"]}, ch.RegionNotFoundError, "not named: deep"),
    ({"modules": ["stem", "enter"]}, ch.RegionNotFoundError, "last output: enter.*goes round it: stem"),
    ({"modules": ["embed"]}, ch.RegionNotFoundError, "must depend on the sample"),
]


@pytest.mark.parametrize(("options", "kind", "said"), WRONG, ids=str)
def test_what_is_not_there_lists_what_is(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    """From `find_region`, and from `wrap` at its first call, which leaves the UNet as it was."""
    model = Wide()
    with pytest.raises(kind, match=f"(?s){said}"):
        ch.find_region(model, noise(), T, **options)
    before = dict(vars(model))
    ch.wrap(model, **options)
    with pytest.raises(kind, match=f"(?s){said}"), torch.no_grad():
        model(noise(), T)
    assert vars(model) == before


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": 0},
        {"resolution": ()},
        {"resolution": 8.0},
        {"resolution": True},
        {"share": 1},
        {"share": 1.5},
        {"share": 0.0},
        {"modules": []},
        {"modules": [4]},
        {"modules": 4},
        {"level": 1, "resolution": 8},
        {"level": 1, "modules": ["deep"]},
        {"resolution": 8, "entry": "down", "exit": "up"},
        {"modules": ["deep"], "entry": "down", "exit": "up"},
        {"modules": ["deep"], "cut": "paper"},
        {"entry": "down", "exit": "up", "share": 0.5},
    ],
    ids=str,
)
def test_options_have_rules(options: dict[str, Any]) -> None:
    """Told before anything is wrapped or traced."""
    for call in (ch.wrap, ch.find_region, ch.flops_report):
        with pytest.raises(ch.ArgumentError):
            call(Tiny(), **options)  # type: ignore[operator]


def test_a_region_leaves_nothing_to_choose() -> None:
    model = Tiny()
    region = ch.find_region(model, noise(), T)
    for call in (
        lambda: ch.wrap(model, region=region, level=1),
        lambda: ch.flops_report(model, region=region, share=0.5),
    ):
        with pytest.raises(ch.ArgumentError, match="the whole choice"):
            call()


# -- modules by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "modules", "skipped"),
    [
        (dit, ["transformer_blocks.1:transformer_blocks.3"], [f"transformer_blocks.{k}" for k in (1, 2, 3)]),
        (dit, ["transformer_blocks.3", "transformer_blocks.2"], ["transformer_blocks.2", "transformer_blocks.3"]),
        (dit, ["transformer_blocks.1.attn1"], ["transformer_blocks.1.attn1"]),
        (uvit, ["transformer_layers.1:transformer_layers.2"], ["transformer_layers.1", "transformer_layers.2"]),
        (
            uvit,
            ["project_to_hidden_norm:project_from_hidden", "transformer_layers.0:transformer_layers.3"],
            [
                "project_to_hidden_norm",
                "project_to_hidden",
                *(f"transformer_layers.{k}" for k in range(4)),
                "project_from_hidden_norm",
                "project_from_hidden",
            ],
        ),
    ],
    ids=["dit range", "dit list", "dit attention", "uvit range", "uvit ranges"],
)
def test_the_middle_of_a_transformer(build: Any, modules: list[str], skipped: list[str]) -> None:
    model, args, kwargs = build()
    region = proven(model, *args, **kwargs, region=ch.find_region(model, *args, **kwargs, modules=modules))
    assert [call.path for call in region.skipped] == skipped
    assert (region.level, region.cut, region.exit.path.startswith(skipped[-1])) == (0, "hand", True)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@torch.no_grad()
def test_a_transformer_is_clocked_with_no_example_inputs() -> None:
    """The blocks named run every other step, at any batch; MACs and calls are what is left."""
    model, args, kwargs = dit()
    ran: list[str] = []
    with ch.wrap(model, modules=["transformer_blocks.1:transformer_blocks.3"]) as cw, cw.trajectory():
        for path, module in model.named_modules():
            if path.startswith("transformer_blocks.") and path.count(".") == 1:
                module.register_forward_hook(lambda *_, path=path: ran.append(path[-1]))
        for batch in (1, 2):
            labels = torch.ones(batch, dtype=torch.long)
            for t in (900, 800, 700, 600):
                model(noise(batch, 4, 8, 8), torch.full((batch,), t), labels)
                ran.append("|")
        assert "".join(ran) == "01234|034|01234|034|" * 2  # no hooks of skipped calls; block 3 returns the exit
    assert cw.stats.adaptor_passes == 4
    report = ch.flops_report(model, *args, **kwargs, modules=["transformer_blocks.1:transformer_blocks.3"])
    each = (report.full_macs + report.adaptor_pass_macs) // report.sample[0]
    assert cw.stats.macs_run == 2 * each * (1 + 2)


@torch.no_grad()
def test_an_exit_known_by_name_is_kept_as_it_left_the_region() -> None:
    """The code after it writes to it in place, also in the call that is traced."""

    class Writes(Tiny):
        def join(self, h: Tensor, low: Tensor) -> Tensor:
            return super().join(h, low.mul_(0.5))

    model = Writes()
    with ch.wrap(model, modules="up") as cw, cw.trajectory():
        for _ in range(2):
            first, second = (model(noise(), t) for t in (900.0, 899.0))
            assert torch.equal(first, second)  # the time has no way round the exit
    assert cw.stats.adaptor_passes == 2


def test_by_modules_is_by_ends() -> None:
    model, args, kwargs = dit()
    ends = {"entry": "transformer_blocks.0", "exit": "transformer_blocks.2"}
    region = ch.find_region(model, *args, **kwargs, modules=["transformer_blocks.1", "transformer_blocks.2"])
    assert region == ch.find_region(model, *args, **kwargs, **ends)


class Skips(nn.Module):
    """Blocks with a long skip from each to its mirror image, as U-ViT has them: regions with several entries."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(3, 16, 4, 4), nn.ConvTranspose2d(16, 3, 4, 4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(5))
        self.joins = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.patch(x)
        tokens, skips = h.flatten(2).transpose(1, 2), []
        for k, block in enumerate(self.blocks):
            if k > 2:
                tokens = self.joins[k - 3](torch.cat((tokens, skips.pop()), 2))
            tokens = block(tokens)
            skips += [tokens] if k < 2 else []
        return self.out(tokens.transpose(1, 2).reshape(h.shape))


def test_modules_with_several_entries() -> None:
    """Only so can this region be named: two tensors enter it, and no one entry has all of it to itself."""
    model, x = Skips().eval(), noise()
    with pytest.raises(ch.RegionNotFoundError, match=r"also enters: blocks\.0"):
        ch.find_region(model, x, T, entry="blocks.1", exit="blocks.4")
    region = ch.find_region(model, x, T, modules=["blocks.2:blocks.4", "joins.0:joins.1"])
    assert [entry.path for entry in region.entries] == ["blocks.0", "blocks.1"]
    proven(model, x, T, region=region)
    other = match(Search(ch.trace(model, noise(1, 3, 32, 16), T), model), region)
    assert other is not None
    assert (other.fingerprint, other.exit.shape) == (region.fingerprint, (1, 32, 16))
    with pytest.raises(ch.RegionNotFoundError, match=r"(?s)last output: .*goes round it: blocks\.1"):
        ch.find_region(model, x, T, modules=["blocks.1", "blocks.2"])
    with pytest.raises(ch.RegionNotFoundError, match=r"not named: joins\.0"):
        ch.find_region(model, x, T, modules=["blocks.2:blocks.4", "joins.1"])
    with pytest.raises(ch.ArgumentError, match=r"(?s)near it: blocks\.0, blocks\.1, .*a list of modules is not called"):
        ch.find_region(model, x, T, modules="blocks")


def test_a_module_that_serves_others_too() -> None:
    """A block that also returns what the code outside needs, from its conditions alone: it must run."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.scale = conv(8, 8), nn.Linear(1, 8)

        def forward(self, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            scale = self.scale(t[:, None])[:, :, None, None]
            return self.mix(h) * scale, scale

    class Scaled(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.after = Block(), conv(8, 8)

        def forward(self, x: Tensor, t: Any) -> Tensor:
            h = self.stem(x)
            low, scale = self.block(h, t)
            return self.join(h, self.after(low) * scale)

    for modules in (["block"], ["block", "after"]):  # alone, its exit cannot be skipped; else another one's can
        with pytest.raises(ch.RegionNotFoundError, match="also used elsewhere: block"):
            ch.find_region(Scaled(), noise(), T, modules=modules)
    proven(Scaled(), noise(), T, region=ch.find_region(Scaled(), noise(), T, modules=["block.mix"]))


# -- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        (
            ["ddpm-cifar10", "--resolution", "16", "--share", "0.3"],
            ("down_blocks.1.attentions.0", "up_blocks.2.attentions.0"),
        ),
        (
            ["ddpm-cifar10", "--resolution", "16x16", "--share", "0.4"],
            ("down_blocks.0.downsamplers.0.conv", "up_blocks.2.attentions.1"),
        ),
        (["ddpm-cifar10", "--share", "0.7"], ("down_blocks.0.resnets.0", "up_blocks.3.resnets.0")),
        (
            ["tests.test_choice:plain_dit", "--module", "transformer_blocks.1", "--module", "transformer_blocks.2"],
            ("transformer_blocks.0", "transformer_blocks.2"),
        ),
        (
            ["tests.test_choice:plain_dit", "--entry", "transformer_blocks.0", "--exit", "transformer_blocks.2"],
            ("transformer_blocks.0", "transformer_blocks.2"),
        ),
    ],
)
def test_commands_choose(capsys: pytest.CaptureFixture[str], words: list[str], ends: tuple[str, str]) -> None:
    for command in ("regions", "flops"):
        assert main([command, *words, "--format", "json"]) == 0
        data = json.loads(capsys.readouterr().out)
        chosen = data["chosen"] if command == "regions" else data["region"]
        paths = [chosen[end]["path"] if command == "regions" else chosen[end] for end in ("entry", "exit")]
        assert tuple(paths) == ends


def test_commands_say_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["regions", "ddpm-cifar10", "--resolution", "wide"]) == 2
    assert "pass --resolution 64 or 72x128" in capsys.readouterr().err
    assert main(["regions", "ddpm-cifar10", "--resolution", "5"]) == 2
    assert "resolutions with a region" in capsys.readouterr().err


# -- one argument --------------------------------------------------------------------------------------------------


def wrapped(unet: nn.Module, *args: Any, **options: Any) -> ch.Region:
    with torch.no_grad(), ch.wrap(unet, **options) as cw:
        unet(*args)
        assert cw.region is not None
        return cw.region


def counted(unet: nn.Module, *args: Any, **options: Any) -> ch.Region:
    region = ch.flops_report(unet, *args, **options).region
    assert region is not None
    return region


def benched(unet: nn.Module, *args: Any, **options: Any) -> str:
    return ch.bench(unet, *args, clocks=(2,), steps=2, rounds=1, **options).region


def drawn(unet: nn.Module, *args: Any, **options: Any) -> ch.Region:
    region = ch.diagram(unet, *args, **options).region
    assert isinstance(region, ch.Region)
    return region


def distilled(unet: nn.Module, *args: Any, **options: Any) -> ch.Region:
    def generate(batch: list[Any]) -> None:
        for t in (900.0, 500.0, 100.0):
            unet(args[0], t)

    few: dict[str, Any] = {"prompts": range(1), "batch": 1, "trajectories": 1, "progress": False}
    return ch.distill(unet, "resnet", generate, **few, **options).region


TAKERS = (ch.find_region, wrapped, counted, benched, drawn, distilled)
OPTIONS: tuple[dict[str, Any], ...] = ({"level": 2}, {"share": 0.4}, {"resolution": 8, "cut": "paper"})


@pytest.mark.parametrize("take", TAKERS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_choice_is_its_options_one_by_one(take: Any, options: dict[str, Any]) -> None:
    unet, args = Wide().eval(), (noise(2, 3, 16, 16), 500.0)
    region = ch.find_region(unet, *args, **options)
    for keywords in (options, {"region": ch.Choice(**options)}):
        result = take(unet, *args, **keywords)
        assert result == (region.line if isinstance(result, str) else region)
    if take is not ch.find_region:
        result = take(unet, *args, region=region)
        assert result == (region.line if isinstance(result, str) else region)


@pytest.mark.parametrize("take", TAKERS)
def test_options_beside_a_region_and_misspelt_ones_are_errors(take: Any) -> None:
    unet, args = Wide().eval(), (noise(2, 3, 16, 16), 500.0)
    for region in (ch.Choice(level=2), ch.find_region(unet, *args, level=2)):
        with pytest.raises(ch.ArgumentError, match="region= is the whole choice: no other option can choose with it"):
            take(unet, *args, region=region, level=1)
    with pytest.raises(ch.ArgumentError, match="a region comes from find_region"):
        take(unet, *args, region=3)
    with pytest.raises(ch.ArgumentError, match=r"resolution" if take is not distilled else "known name"):
        take(unet, *args, resolutoin=8)


def test_a_misspelt_option_of_wrap_names_the_nearest() -> None:
    for wrong, right in (("shre", "share"), ("clok", "clock"), ("modles", "modules")):
        with pytest.raises(ch.ArgumentError, match=f"pass {right}="):
            ch.wrap(Wide(), **{wrong: 2})
    with pytest.raises(ch.ArgumentError, match="pass some of these"):
        ch.wrap(Wide(), nonsense=2)
    with pytest.raises(ch.TraceError, match="nonsense"):  # it is the call's own business
        ch.find_region(Wide(), noise(2, 3, 16, 16), 500.0, nonsense=2)

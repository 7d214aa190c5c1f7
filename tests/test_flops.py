"""Reports of passes and trajectories, against the paper's own numbers."""

import json

import pytest
import torch
from torch import nn

from clockwork_hooks.analysis.flops import flops_report
from clockwork_hooks.errors import AdaptorError, ArgumentError, ModelNotFoundError
from clockwork_hooks.graph.tracing import record
from clockwork_hooks.models import CLASSES, PRESETS, load_model
from clockwork_hooks.regions.find import choose
from clockwork_hooks.schedule import Schedule


@pytest.fixture(scope="module")
def sd15():
    return load_model("sd15")


def report_of(loaded, **options):
    return flops_report(loaded.unet, *loaded.args, **options, **loaded.kwargs)


@pytest.mark.parametrize(
    ("options", "gmacs"),
    [
        ({"attention": False}, "338.61"),
        ({}, "401.64"),
        ({"attention": False, "norms": "fvcore"}, "339.01"),
        ({"norms": "fvcore"}, "402.04"),
    ],
)
def test_sd15_full_pass(sd15, options, gmacs):
    assert f"{report_of(sd15, **options).full_macs / 1e9:.2f}" == gmacs


PAPER_TABLE = {  # arXiv 2312.08128, Appendix A: block → (modules, million parameters, GMACs)
    "DOWN-0": (("conv_in", "down_blocks.0"), 10.52, 32.9),
    "DOWN-1": (("down_blocks.1",), 36.82, 31.3),
    "DOWN-2": (("down_blocks.2",), 140.0, 31.5),
    "DOWN-3": (("down_blocks.3",), 62.28, 3.78),
    "MID": (("mid_block",), 97.04, 6.03),
    "UP-0": (("up_blocks.0",), 162.2, 12.9),
    "UP-1": (("up_blocks.1",), 258.3, 75.1),
    "UP-2": (("up_blocks.2",), 71.41, 79.1),
    "UP-3": (("up_blocks.3", "conv_norm_out", "conv_out"), 18.81, 66.0),
}


@pytest.mark.parametrize("block", PAPER_TABLE)
def test_sd15_blocks_are_the_papers(sd15, block):
    modules, millions, gmacs = PAPER_TABLE[block]
    report = report_of(sd15, attention=False)
    rows = {row.name: row for depth in (1, 2) for row in report.by_module(depth)}
    assert sum(rows[name].full_macs for name in modules if name in rows) / 1e9 == pytest.approx(gmacs, rel=5e-3)
    parameters = sum(p.numel() for name in modules for p in sd15.unet.get_submodule(name).parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=5e-3)


def test_sd15_passes_and_trajectory_are_the_papers(sd15):
    report = report_of(sd15, cut="paper", attention=False, guidance=True)
    assert report.full_flops / 1e9 == pytest.approx(677.8, rel=5e-3)
    assert report.adaptor_pass_flops / 1e9 == pytest.approx(228.4, rel=5e-3)
    assert report.full_trajectory_flops / 1e12 == pytest.approx(10.84, rel=1e-3)
    assert report.trajectory_flops / 1e12 == pytest.approx(7.25, rel=5e-3)
    assert report.saved_share == pytest.approx(0.33, abs=5e-3)


def test_sd15_true_saving_with_attention(sd15):
    assert report_of(sd15, cut="paper").saved_share == pytest.approx(0.290, abs=5e-4)
    outer = report_of(sd15)
    assert outer.saved_share == pytest.approx(0.309, abs=2e-3)
    paper = report_of(sd15, cut="paper")
    upsampler, downsampler = 640 * 640 * 9 * 64 * 64, 320 * 320 * 9 * 32 * 32
    assert paper.adaptor_pass_macs - outer.adaptor_pass_macs == upsampler + downsampler


def test_sdxl_at_its_native_size():
    assert f"{report_of(load_model('sdxl')).full_flops / 1e12:.2f}" == "6.76"


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("sd15", 859.52),
        ("sd21", 865.91),
        ("sdxl", 2567.46),
        ("svd", 1524.62),
        ("kandinsky22", 1253.06),
        ("deepfloyd-if", 4304.70),
        ("ddpm-cifar10", 35.75),
    ],
)
def test_presets_have_the_released_models_parameters_and_a_region(preset, millions):
    loaded = load_model(preset)
    assert all(p.device.type == "meta" for p in loaded.unet.parameters())
    report = report_of(loaded)
    assert report.parameters / 1e6 == pytest.approx(millions, abs=0.006)
    assert report.uncounted == ()
    assert 0 < report.adaptor_pass_macs < 0.6 * report.full_macs


def test_every_preset_is_tested():
    assert len(PRESETS) == 7


def test_batch_and_size_scale_the_count():
    one = report_of(load_model("ddpm-cifar10"), attention=False)
    two = report_of(load_model("ddpm-cifar10", batch=2), attention=False)
    large = report_of(load_model("ddpm-cifar10", size=(64, 64)), attention=False)
    assert two.full_macs == 2 * one.full_macs
    assert large.full_macs == pytest.approx(4 * one.full_macs, rel=1e-3)


@pytest.fixture(scope="module")
def cifar():
    return load_model("ddpm-cifar10")


def test_views_add_up(cifar):
    report = report_of(cifar)
    for rows in (report.by_level(), report.by_operator(), report.by_module(1), report.by_module(9)):
        assert sum(row.full_macs for row in rows) == report.full_macs
        assert sum(row.adaptor_pass_macs for row in rows) == report.adaptor_pass_macs
    assert [row.name for row in report.by_level()] == ["32×32", "16×16", "8×8", "4×4", "no level"]
    assert report.adaptor_pass_macs == report.full_macs - report.region.macs


@pytest.mark.parametrize(("clock", "steps", "full"), [(1, 5, 5), (2, 8, 4), (2, 7, 4), (3, 8, 3), (10, 4, 1)])
def test_a_trajectory_is_its_passes(cifar, clock, steps, full):
    report = report_of(cifar, clock=clock, steps=steps)
    assert len(report.full_steps) == full
    assert report.trajectory_macs == full * report.full_macs + (steps - full) * report.adaptor_pass_macs
    guided = report_of(cifar, clock=clock, steps=steps, guidance=True)
    assert guided.trajectory_macs == 2 * report.trajectory_macs
    assert guided.full_macs == report.full_macs


def test_a_schedule_stands_for_a_clock(cifar):
    report = report_of(cifar, clock=Schedule.at({5, 6, 7, 8}))
    assert report.full_steps == (1, 2, 3, 4)


@pytest.mark.parametrize("steps", [0, -1, True, 2.5])
def test_steps_have_a_rule(cifar, steps):
    with pytest.raises(ArgumentError, match="steps"):
        report_of(cifar, steps=steps)


class Mix(nn.Module):
    """An adaptor: a 3×3 convolution over entry and exit, and a linear layer over the time."""

    def __init__(self, region, out=None, device=None):
        super().__init__()
        entry, exit = region.entry.shape[1], region.exit.shape[1]
        self.conv = nn.Conv2d(entry + exit, out or exit, 3, padding=1, device=device)
        self.time = nn.Linear(512, out or exit, device=device)

    def forward(self, entry, exit_cached, *, time, text):
        assert text is None
        return self.conv(torch.cat([entry, exit_cached], 1)) + self.time(time)[..., None, None]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_adaptors_own_macs_are_added(cifar, device):
    region = choose(record(cifar.unet, cifar.args, cifar.kwargs), cifar.unet)
    adaptor = Mix(region, device=device)
    before = {name: id(p) for name, p in adaptor.named_parameters()}
    report = report_of(cifar, adaptor=adaptor, region=region)
    entry, exit = region.entry.shape[1], region.exit.shape[1]
    assert report.adaptor_macs == (entry + exit) * exit * 9 * 32 * 32 + 512 * exit
    assert report.adaptor_pass_macs == report.adaptor_macs + report_of(cifar).adaptor_pass_macs
    assert {name: id(p) for name, p in adaptor.named_parameters()} == before
    assert {p.device.type for p in adaptor.parameters()} == {device}


def test_an_adaptor_may_be_a_function_or_the_identity(cifar):
    assert report_of(cifar, adaptor=lambda entry, exit_cached, time, text: exit_cached * 2).adaptor_macs == 0
    assert report_of(cifar, adaptor="identity").adaptor_macs == 0


def test_an_adaptor_gets_what_it_needs(cifar):
    """The entry of the step before, of the entry's shape; of a position there is none."""

    class Reads(torch.nn.Module):
        needs = frozenset({"entry_cached", "position"})

        def forward(self, entry, exit_cached, *, time, text, entry_cached, position):
            assert position is None
            assert entry_cached.shape == entry.shape
            return exit_cached

    unet, args, kwargs = cifar
    assert flops_report(unet, *args, adaptor=Reads(), **kwargs).adaptor_macs == 0


def test_an_adaptor_that_does_not_fit_is_an_error(cifar):
    region = report_of(cifar).region
    with pytest.raises(AdaptorError, match="exit's shape"):
        report_of(cifar, adaptor=Mix(region, out=3))
    with pytest.raises(AdaptorError, match="region's boundary"):
        report_of(cifar, adaptor=lambda entry, exit_cached, **more: exit_cached @ entry[0, 0, :3])
    with pytest.raises(AdaptorError, match="an adaptor is called as"):
        report_of(cifar, adaptor=lambda entry: entry)
    with pytest.raises(AdaptorError, match="a saved adaptor is a folder"):
        report_of(cifar, adaptor="resnet")


class Flat(nn.Module):
    """No lower resolution, and an operator without a handle."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.LSTM(8, 8)

    def forward(self, x, t):
        h = self.stem(x)
        return h + self.norm(h.flatten(0, 1))[0].view_as(h) + t


def test_without_a_region_the_report_says_why_and_lists_what_it_cannot_count():
    report = flops_report(Flat(), torch.zeros(1, 3, 8, 8), 1)
    assert report.full_macs == 3 * 3 * 9 * 64
    assert report.adaptor_pass_macs is report.trajectory_macs is report.saved_share is report.region is None
    assert "a region is" in report.no_region
    assert [(item.operator, item.calls, item.modules) for item in report.uncounted] == [("lstm", 1, ("norm",))]
    text = report.to_markdown()
    assert "No adaptor pass: a region is" in text
    assert "Not counted" in text
    assert "lower bounds" in text
    assert json.loads(report.to_json())["uncounted"][0]["operator"] == "lstm"


@pytest.mark.parametrize("attention", [True, False])
def test_every_rendering_states_the_convention(cifar, attention):
    from rich.console import Console

    report = report_of(cifar, attention=attention)
    said = "attention products counted" if attention else "attention products left out"
    wide = Console(width=400)
    with wide.capture() as shown:
        wide.print(report)
    for text in (report.to_markdown(), report.to_json(), str(report), shown.get()):
        assert said in " ".join(text.split())


def test_json_names_a_unit_for_every_count(cifar):
    data = json.loads(report_of(cifar, guidance=True).to_json())
    assert data["full_flops"] == 2 * data["full_macs"]
    assert data["trajectory_flops"] == 2 * data["trajectory_macs"]
    assert data["full_steps"] == [1, 3, 5, 7]
    counts = {key for key, value in data.items() if isinstance(value, int) and value > 10_000 and key != "parameters"}
    assert all(key.endswith(("_macs", "_flops")) for key in counts)


SMALL = {  # small configurations of every diffusers class that a config.json may name
    "UNet1DModel": {"sample_size": 256, "in_channels": 2, "time_embedding_dim": 16, "extra_in_channels": 16},
    "UNet2DModel": {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 10,
    },
    "UNet2DConditionModel": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
    "UNet3DConditionModel": {"cross_attention_dim": 24, "attention_head_dim": 4},
    "UNetMotionModel": {"cross_attention_dim": 24, "num_attention_heads": 2, "motion_num_attention_heads": 2},
    "UNetSpatioTemporalConditionModel": {"cross_attention_dim": 24, "num_attention_heads": (2, 2), "num_frames": 3},
    "I2VGenXLUNet": {"cross_attention_dim": 24, "attention_head_dim": 4},
    "Kandinsky3UNet": {
        "block_out_channels": (32, 64, 128, 256),
        "groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "encoder_hid_dim": 24,
        "time_embedding_dim": 32,
        "layers_per_block": 2,
    },
    "StableCascadeUNet": {
        "conditioning_dim": 32,
        "block_out_channels": (32, 64),
        "num_attention_heads": (2, 4),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "clip_text_in_channels": 16,
        "clip_image_in_channels": 16,
        "effnet_in_channels": 16,
    },
    "UVit2DModel": {
        "hidden_size": 32,
        "block_out_channels": 32,
        "in_channels": 32,
        "num_hidden_layers": 1,
        "block_num_heads": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "sample_size": 16,
        "downsample": True,
        "upsample": True,
    },
}
VIDEO = {
    "UNet2DConditionModel": ("CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    "UNet3DConditionModel": ("CrossAttnDownBlock3D", "DownBlock3D", "UpBlock3D", "CrossAttnUpBlock3D"),
    "UNetMotionModel": ("CrossAttnDownBlockMotion", "DownBlockMotion", "UpBlockMotion", "CrossAttnUpBlockMotion"),
    "I2VGenXLUNet": ("CrossAttnDownBlock3D", "DownBlock3D", "UpBlock3D", "CrossAttnUpBlock3D"),
    "UNetSpatioTemporalConditionModel": (
        "CrossAttnDownBlockSpatioTemporal",
        "DownBlockSpatioTemporal",
        "UpBlockSpatioTemporal",
        "CrossAttnUpBlockSpatioTemporal",
    ),
}


def small_config(name):
    config = {"_class_name": name, **SMALL[name]}
    if name in VIDEO:
        blocks = VIDEO[name]
        config = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, **config}
        config |= {"down_block_types": blocks[:2], "up_block_types": blocks[2:]}
        if name == "UNet2DConditionModel":
            config["cross_attention_dim"] = 24
    return config


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_with_a_config_loads_and_runs(name, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(small_config(name)))
    for place in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "config.json"):
        loaded = load_model(str(place))
        assert type(loaded.unet).__name__ == name
    report = report_of(loaded)
    assert report.full_macs > 0
    assert report.uncounted == ()


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"},
        {"encoder_hid_dim": 20, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
        {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "simple_projection"},
        {"class_embed_type": None, "num_class_embeds": 5},
        {"time_cond_proj_dim": 8},
        {
            "encoder_hid_dim": 20,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image_hint",
            "in_channels": 8,
        },
    ],
)
def test_conditions_of_condition_unets_are_made_up(options, tmp_path):
    config = {**small_config("UNet2DConditionModel"), **options}
    if "class_embed_type" not in options:
        config |= {"class_embed_type": None, "projection_class_embeddings_input_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert report_of(load_model(str(tmp_path))).full_macs > 0


@pytest.mark.parametrize(
    "name", ["sd99", "no/such/folder", "no_such_module_at_all:build", "json:nothing", "json:__name__"]
)
def test_an_unknown_model_lists_what_there_is(name):
    with pytest.raises(ModelNotFoundError):
        load_model(name)


def test_a_config_of_another_class_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ModelNotFoundError, match="UNet2DConditionModel"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="JSON"):
        load_model(str(tmp_path))


FACTORIES = """
import torch
from diffusers import UNet2DModel
SMALL = dict(sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
             down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
def alone(): return UNet2DModel(**SMALL)
def with_args(): return UNet2DModel(**SMALL), (torch.zeros(2, 3, 16, 16), 5)
def with_kwargs(): return UNet2DModel(**SMALL), (torch.zeros(2, 3, 16, 16),), {"timestep": 5}
def other(): return torch.nn.Conv2d(3, 3, 3)
def nothing(): return 5
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_factories", raising=False)


@pytest.mark.usefixtures("factories")
def test_a_factory_returns_a_model_with_or_without_its_inputs():
    alone, with_args, with_kwargs = (
        load_model(f"my_factories:{name}") for name in ("alone", "with_args", "with_kwargs")
    )
    assert alone.unet.conv_in.weight.device.type == "meta"
    assert report_of(with_args).full_macs == report_of(with_kwargs).full_macs == 2 * report_of(alone).full_macs
    for name in ("other", "nothing"):
        with pytest.raises(ModelNotFoundError, match="factory"):
            load_model(f"my_factories:{name}")


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("arguments", [{"size": (32, 32)}, {"batch": 2}, {"frames": 4}])
def test_what_a_factorys_own_inputs_would_ignore_is_an_error(arguments):
    with pytest.raises(ArgumentError, match=f"returns its own(.|\n)*{next(iter(arguments))}: "):
        load_model("my_factories:with_args", **arguments)
    if "frames" not in arguments:
        load_model("my_factories:alone", **arguments)  # inputs made here follow the options


@pytest.mark.usefixtures("factories")
def test_a_file_in_the_place_of_a_module_is_told():
    with pytest.raises(ModelNotFoundError, match=r"without \.py: my_factories:alone"):
        load_model("my_factories.py:alone")


def test_a_factory_that_needs_arguments_is_told():
    with pytest.raises(ModelNotFoundError, match=r"without arguments\n  factory: json:loads\n  .*: s\n"):
        load_model("json:loads")


class Heads(nn.Module):
    def forward(self, x):
        q = x.flatten(2).view(1, 4, 2, 4).transpose(-1, -2)
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(-1, -2).reshape(x.shape)


class HeadsLikePixels(nn.Module):
    """Attention of 4 heads over 2×2 pixels below a 4×4 level: heads times tokens are the upper level's positions."""

    def __init__(self):
        super().__init__()
        self.up, self.heads = nn.Upsample(scale_factor=2), Heads()
        self.stem, self.down, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 8, 2, 3), nn.Conv2d(16, 3, 3, 1, 1)

    def forward(self, x, t):
        h = self.stem(x) + t
        return self.head(torch.cat([h, self.up(self.heads(self.down(h)))], 1))


def test_attention_counts_at_the_level_of_its_operands():
    report = flops_report(HeadsLikePixels(), torch.zeros(1, 3, 4, 4), torch.tensor(1.0))
    (attention,) = [o for o in report.operators if "attention" in o.operator]
    assert attention.resolution == (2, 2)
    ((space, *macs),) = report.region.by_level
    assert space == (2, 2)
    assert sum(macs) == 8 * 8 * 8 * 8 * 4 + attention.macs

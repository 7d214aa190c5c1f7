"""`clockwork-hooks distill`, its configurations, the examples, and the pipeline recipe."""

import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks.cli import main
from clockwork_hooks.training.pipeline import read_dataset
from tests.small_unet import Tiny
from tests.training_parts import GUIDANCE, Small, sampler

# diffusers 0.42 hands numpy 2 a tensor in `set_timesteps`, in a way that torch and numpy will both give up
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROOT = Path(ch.__file__).parents[1]
QUICK = ("source.steps=4", "source.latent_size=8", "source.captions=8", "trajectories=1", "batch=1", "reuse=1")


def trained(**settings: Any) -> dict[str, Any]:
    """What a configuration's factory returns."""
    unet = Tiny()
    return {"unet": unet, "generate": sampler(unet), "prompts": range(8), "guidance": GUIDANCE, **settings}


@pytest.mark.parametrize("config", ["demo", str(ROOT / "examples/distill_demo.toml")])
def test_the_demo_works_out_of_the_box(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["distill", config, "--out", "made", "--buffer-gb", "1.5"]
    assert main([*words, *(word for text in QUICK for word in ("--set", text))]) == 0
    assert "guided-output" in capsys.readouterr().out
    data = json.loads((tmp_path / "made/training.json").read_text())
    assert (data["trajectories"], data["steps"], data["settings"]["buffer_gb"]) == (1, [4], 1.5)
    adaptor = ch.adaptors.ResNetAdaptor.from_pretrained(tmp_path / "made")
    assert adaptor.facts["sampler"] == "dpm++"


def test_forward_noise_on_the_demo(tmp_path: Path) -> None:
    words = [word for text in (*QUICK, "mode=forward_noise") for word in ("--set", text)]
    assert main(["distill", "demo", "--out", str(tmp_path), *words]) == 0


def test_a_configuration_with_a_factory(tmp_path: Path) -> None:
    config = {
        "source": {"kind": "python", "factory": f"{__name__}:trained", "clock": 3},
        "adaptor": {"kind": "resnet", "width": 8},
        "trajectories": 2,
        "batch": 2,
        "folder": str(tmp_path / "out"),
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    sys.modules.setdefault("tests.test_training_cli", sys.modules[__name__])
    assert main(["distill", str(path)]) == 0
    assert main(["distill", str(path)]) == 2
    assert main(["distill", str(path), "--resume", "--set", "trajectories=4"]) == 0
    assert json.loads((tmp_path / "out/training.json").read_text())["trajectories"] == 4


class Stopped:
    """A sampler that is interrupted after some trajectories."""

    left = 0

    def __init__(self, generate: Any) -> None:
        self.generate = generate

    def __call__(self, batch: Any) -> Any:
        if Stopped.left == 0:
            raise KeyboardInterrupt
        Stopped.left -= 1
        return self.generate(batch)


def stoppable() -> dict[str, Any]:
    """A factory whose sampler stops."""
    parts = trained()
    return {**parts, "generate": Stopped(parts["generate"])}


def test_an_interrupted_run_says_what_it_left_and_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "my config.json", tmp_path / "out"
    source = {"kind": "python", "factory": f"{__name__}:stoppable"}
    path.write_text(json.dumps({"source": source, "trajectories": 4, "batch": 2, "hold": 1, "save_every": 0}))
    Stopped.left = 3  # the first call of the UNet is traced in a run of its own
    assert main(["distill", str(path), "--out", str(out)]) == 130
    text = capsys.readouterr().err
    trained = json.loads((out / "training.json").read_text())["trajectories"]
    assert f"The adaptor of {trained} trajectory batch" in text
    assert f"distill '{path}' --out {out} --resume" in text
    Stopped.left = 99
    assert main(["distill", str(path), "--out", str(out), "--resume"]) == 0
    assert json.loads((out / "training.json").read_text())["trajectories"] == 4


def without_prompts() -> dict[str, Any]:
    """A factory that forgets something."""
    return {name: value for name, value in trained().items() if name != "prompts"}


def with_adaptor() -> dict[str, Any]:
    """A factory that brings its own adaptor."""
    return trained(adaptor=Small(), trajectories=1, batch=2)


def test_a_factory_may_bring_its_adaptor(tmp_path: Path) -> None:
    """A table of the configuration goes before it."""
    for table, files in ({}, {"model.safetensors"}), ({"adaptor": {"kind": "scaled-resnet"}}, {"config.json"}):
        out = tmp_path / str(len(table))
        config = {"source": {"kind": "python", "factory": f"{__name__}:with_adaptor"}, "folder": str(out), **table}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main(["distill", str(tmp_path / "config.json")]) == 0
        assert files <= {path.name for path in out.iterdir()}
        assert (out / "config.json").exists() == bool(table)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "a configuration has to be a table"),
        ("{", "TOML or JSON"),
        ('{"source": {"kind": "dream"}}', "a source says what samples"),
        ('{"source": {"kind": "demo"}, "adaptor": "identity"}', "pass one of resnet, scaled-resnet, unet"),
        ('{"source": {"kind": "demo"}, "adaptor": {"depth": 3}}', "pass some of inputs, width"),
        ('{"source": {"kind": "python", "factory": "HERE:without_prompts", "x": 1}}', "the same names"),
        ('{"source": {"kind": "python", "factory": "HERE:without_prompts"}}', "returned: unet, generate, guidance"),
        ('{"source": {"kind": "python", "factory": "HERE:quickly"}}', "has no attribute 'quickly'"),
        ('{"source": {"kind": "pipeline", "prompts": ["a"]}}', "a pipeline has a path"),
        ('{"source": {"kind": "pipeline", "path": "a"}}', "missing a required argument: 'prompts'"),
        ('{"source": {"kind": "demo", "stepz": 4}}', "unexpected keyword argument 'stepz'"),
        ('{"source": {"kind": "demo", "captions": 0}}', "captions is an int of at least 1"),
        ('{"source": ["demo"]}', "the source of a configuration has to be a table"),
        ('{"source": "demo", "adaptor": 3}', "the adaptor of a configuration has to be a table"),
        ('{"source": "demo", "seed": 1.5}', "pass --set seed=0"),
    ],
)
def test_a_bad_configuration(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(text.replace("HERE", __name__))
    assert main(["distill", str(path)]) == 2
    assert says in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("examples/distill_demo.toml", "accelerate launch", "source.kind", "--resume", "--buffer-gb"):
        assert word in text


# -- examples ----------------------------------------------------------------------------------------------------


def test_the_example_goes_from_nothing_to_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    small = ["--minutes", "0.01", "--steps", "2", "--batch", "1", "--prompts", "2", "--latent-size", "8"]
    monkeypatch.setattr(sys, "argv", ["train_adaptor.py", "--out", str(tmp_path), *small])
    with pytest.raises(SystemExit, match="0"):  # typer's way to end
        runpy.run_path(str(ROOT / "examples/train_adaptor.py"), run_name="__main__")
    (picture,) = tmp_path.rglob("pictures.png")
    with Image.open(picture) as opened:
        assert opened.size == (360, 600)
        assert len(opened.convert("RGB").getcolors(1 << 20)) > 100


def tiny_sd(folder: Path) -> Path:
    """A Stable Diffusion of a few thousand random parameters, with a tokenizer of one merge."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = folder / "tokenizer"
    words.mkdir(parents=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{x}</w>" for x in "abcdefghijklmnopqrstuvwxyz")]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=77),
        unet=unet,
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "sd")
    return folder / "sd"


def test_the_recipe_reads_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `datasets`, which is not among the packages of the tests."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ch.ArgumentError, match="import datasets"):
        read_dataset("mine", "caption")
    asked = []
    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = lambda *args, **options: asked.append((args, options)) or {"caption": ("a", "b")}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert read_dataset("mine", "caption") == ["a", "b"]
    assert asked == [(("mine",), {"split": "train"})]


def test_the_recipe_of_sd15_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the options that docs/training.md names; an error of ours is one block."""
    for words, ends in (
        (["--help"], "0"),
        (["--model", "sd", "--out", "x", "--prompts", "none.txt"], "^Error: prompts"),
    ):
        monkeypatch.setattr(sys, "argv", ["sd15_adaptor.py", *words])
        with pytest.raises(SystemExit, match=ends):
            runpy.run_path(str(ROOT / "examples/sd15_adaptor.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in ("model", "prompts", "out", "dataset", "loss", "resume", "buffer-gb"))


@pytest.mark.filterwarnings("ignore")  # of transformers and diffusers, which differ by version
def test_the_recipe_of_sd15_on_a_tiny_random_one(tmp_path: Path) -> None:
    model = tiny_sd(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\nb c\n")
    example = runpy.run_path(str(ROOT / "examples/sd15_adaptor.py"))
    small = {
        "steps": 4,
        "size": 8,
        "epochs": 2,
        "prompts_per_epoch": 4,
        "batch": 2,
        "dtype": "float32",
        "device": "cpu",
    }
    result = example["main"](str(model), tmp_path / "out", tmp_path / "prompts.txt", **small)
    assert (result.trajectories, result.steps, len(result.losses)) == (4, (4,), 8)
    assert result.settings["losses"] == {"adaptor": "guided-output"}
    assert (result.settings["guidance"], result.settings["lr"], result.region.cut) == (7.5, 1e-4, "paper")
    adaptor = ch.adaptors.ResNetAdaptor.from_pretrained(tmp_path / "out")
    assert adaptor.facts["sampler"] == "DPMSolverMultistepScheduler"

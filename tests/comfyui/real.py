"""A real ComfyUI, from the folder that COMFYUI_PATH names: its own code, and a tiny random UNet."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.comfyui.stand_in import Evaluations
from tests.zoo.third_party import stand_ins

EXIT = "output_blocks.1.2.conv"
ABSENT = (
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops"),
    *("torchvision.models", "torchaudio", "torchaudio.functional", "aiohttp", "av", "av.container", "av.subtitles"),
    *("av.subtitles.stream", "kornia", "kornia.color", "spandrel", "sentencepiece", "yarl", "alembic", "sqlalchemy"),
)  # other models, the server and the picture nodes want these
CONFIG: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 16,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "dtype": torch.float32,
    "legacy": False,
    "use_checkpoint": False,
    "adm_in_channels": None,
}


class _Anything:
    """What a missing package's names are while ComfyUI is imported; none of it is ever used."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def load(name: str) -> ModuleType:
    """Import a module of ComfyUI."""
    folder = os.environ["COMFYUI_PATH"]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    missing = [name for name in ABSENT if importlib.util.find_spec(name.partition(".")[0]) is None]
    with warnings.catch_warnings(), stand_ins({name: {"__getattr__": _Anything().__getattr__} for name in missing}):
        warnings.simplefilter("ignore")
        for one in missing:
            sys.modules[one].__path__ = []
        importlib.import_module("comfy.cli_args").args.cpu = True
        return importlib.import_module(name)


def model(**changes: Any) -> Any:
    """A model patcher."""
    kinds, base, patcher = (load(f"comfy.{name}") for name in ("supported_models", "model_base", "model_patcher"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = kinds.SD15(CONFIG | changes)
        config.set_inference_dtype(torch.float32, None)
        net = base.BaseModel(config, device="cpu").eval()
        for parameter in net.parameters():
            parameter.requires_grad_(False).normal_(std=0.08 if parameter.ndim > 1 else 0.1)
    return patcher.ModelPatcher(net, torch.device("cpu"), torch.device("cpu"))


@torch.no_grad()
def sample(
    patcher: Any,
    sampler: str = "euler",
    *,
    steps: int = 6,
    cfg: float = 5.0,
    batch: int = 1,
    size: int = 16,
    scheduler: str = "normal",
    positive: Any = None,
    negative: Any = None,
    seed: int = 1,
    latent: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """What ComfyUI's KSampler node does."""
    sampling = load("comfy.sample")
    latent = torch.zeros(batch, 4, size, size) if latent is None else latent
    noise = sampling.prepare_noise(latent, seed)
    prompts = positive or cond(1), negative or cond(2)
    options.setdefault("callback", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output: Tensor = sampling.sample(
            *(patcher, noise, steps, cfg, sampler, scheduler, *prompts, latent), seed=seed, disable_pbar=True, **options
        )
    return output


def cond(seed: int, tokens: int = 7, **more: Any) -> Any:
    """What CLIPTextEncode returns."""
    return [[torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed)), dict(more)]]


def node(module: str, name: str, **options: Any) -> Any:
    """The first output of one of ComfyUI's own nodes."""
    kind = getattr(load(f"comfy_extras.{module}" if module != "nodes" else module), name)
    if hasattr(kind, "define_schema"):
        result = kind.execute(**options)
        return getattr(result, "args", result)[0]
    result = getattr(kind(), kind.FUNCTION)(**options)
    return (asyncio.run(result) if inspect.isawaitable(result) else result)[0]


# -- what users put on a model or a prompt ----------


def lora(patcher: Any) -> Any:
    """A clone with some weights patched while it samples."""
    clone, generator = patcher.clone(), torch.Generator().manual_seed(7)
    weights = {key: one for key, one in clone.model.state_dict().items() if key.endswith("0.in_layers.2.weight")}
    clone.add_patches(
        {k: ("diff", (0.05 * torch.randn(w.shape, generator=generator),)) for k, w in weights.items()}, 1.0
    )
    return clone


def hooked(prompt: Any, keyframes: dict[float, float] | None = None) -> Any:
    """The prompt with a LoRA of its own, as strong as the keyframes say from their part of the sampling on."""
    hooks, generator = load("comfy.hooks"), torch.Generator().manual_seed(8)
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    group = hooks.create_hook_model_as_lora({key: 0.1 * torch.randn(32, 32, 3, 3, generator=generator)}, None, 1.0, 1.0)
    if keyframes:
        times = hooks.HookKeyframeGroup()
        for part, strength in keyframes.items():
            times.add(hooks.HookKeyframe(strength, part))
        group.set_keyframes_on_hooks(times)
    return hooks.set_hooks_for_conditioning(prompt, group)


def keyframed(prompt: Any) -> Any:
    """The prompt with a LoRA of its own that grows weaker in the second step."""
    return hooked(prompt, {0.0: 1.0, 0.15: 0.3})


def low_memory(patcher: Any) -> Any:
    """A clone whose weights are cast in every call."""
    clone = patcher.clone()
    clone.force_cast_weights = True
    return clone


def controlled(prompt: Any, part: tuple[float, float] = (0.0, 1.0)) -> Any:
    """The prompt with a ControlNet, for a part of the sampling."""
    nets, control = load("comfy.cldm.cldm"), load("comfy.controlnet")
    config = {
        k: v for k, v in CONFIG.items() if k not in ("out_channels", "transformer_depth_output", "adm_in_channels")
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        net = nets.ControlNet(**config, hint_channels=3, operations=load("comfy.ops").disable_weight_init).eval()
        for parameter in net.parameters():
            parameter.requires_grad_(False).normal_(std=0.08)
    one = control.ControlNet(net, load_device=torch.device("cpu"))
    one.set_cond_hint(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(4)), 0.8, part)
    return [[text, {**more, "control": one, "control_apply_to_uncond": True}] for text, more in prompt]


def windows(patcher: Any) -> Any:
    """A clone that samples a batch in windows."""
    return node(
        "nodes_context_windows", "ContextWindowsManualNode", model=patcher, context_length=4, context_overlap=2,
        context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="flat", dim=0,
    )  # fmt: skip


def skips(patcher: Any, when: Callable[[int], bool]) -> Any:
    """A clone that leaves the negative prompt out in some evaluations of each run."""
    samplers, clone, evaluations = load("comfy.samplers"), patcher.clone(), Evaluations()

    def calc(args: Any) -> Any:
        rest = args["input"], args["sigma"], args["model_options"]
        if not when(evaluations.at):
            return samplers.calc_cond_batch(args["model"], args["conds"], *rest)
        alone = samplers.calc_cond_batch(args["model"], [args["conds"][0], None], *rest)
        return [alone[0], alone[0]]

    clone.set_model_sampler_calc_cond_batch_function(calc)
    evaluations.watch(clone)
    return clone


def splits(patcher: Any, when: Callable[[int], bool]) -> Any:
    """A clone that has the memory for one condition a batch in some evaluations of each run."""
    management, clone, evaluations = load("comfy.model_management"), patcher.clone(), Evaluations()
    evaluations.watch(clone)
    free = management.get_free_memory

    def little(device: Any = None, torch_free_too: bool = False) -> Any:  # attention asks for both numbers
        return free(device, True) if torch_free_too else 0 if when(evaluations.at) else 1e18

    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        management.get_free_memory = little
        try:
            return executor(*args, **kwargs)
        finally:
            management.get_free_memory = free

    clone.add_wrapper_with_key("calc_cond_batch", "memory", around)
    return clone


def third_call(patcher: Any) -> Any:
    """A clone whose guidance calls the model once more in each evaluation."""
    samplers = load("comfy.samplers")

    def guide(args: Any) -> Any:
        (more,) = samplers.calc_cond_batch(
            args["model"], [args["cond"]], 0.9 * args["input"], args["sigma"], args["model_options"]
        )
        return args["denoised"] + 0.3 * (args["cond_denoised"] - more)

    clone = patcher.clone()
    clone.set_model_sampler_post_cfg_function(guide)
    return clone

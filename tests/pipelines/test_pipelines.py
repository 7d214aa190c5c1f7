"""Pipelines of diffusers: with their UNet wrapped they give what a hand-made schedule gives, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DDIMPipeline, DDPMPipeline, StableDiffusionPAGPipeline
from PIL import Image
from torch import Tensor

import clockwork_hooks as ch
from tests.pipelines import parts
from tests.pipelines.oracle import every, letters, replay
from tests.snapshot import snapshot

# diffusers' sigma schedulers call numpy on tensors, which torch's __array__ is not ready for
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

STEPS = 6
EXIT = "up_blocks.0"  # of two levels, so its upsampler ends the region


@dataclass
class Case:
    """A pipeline, one run of it, and what its solver does.

    Attributes:
        pipe: the pipeline.
        run: the same picture every time.
        evaluations: of each denoising step.
        share: the least share of adaptor passes.
    """

    pipe: Any
    options: dict[str, Any]
    evaluations: list[int] = field(default_factory=lambda: [1] * STEPS)
    share: float = 0.5

    def run(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        pictures = self.pipe(num_inference_steps=STEPS, generator=generator, **self.options)
        return torch.as_tensor(pictures.frames if hasattr(pictures, "frames") else pictures.images)


TEXT = {"prompt": "a red cat", "height": 32, "width": 32, "guidance_scale": 3.0, "output_type": "latent"}
EDIT = {"prompt": "a red cat", "guidance_scale": 3.0, "output_type": "latent"}


def txt2img() -> Case:
    return Case(parts.text_to_image(), TEXT)


def img2img() -> Case:
    return Case(
        parts.text_to_image("StableDiffusionImg2ImgPipeline"),
        {**EDIT, "image": parts.picture(), "strength": 0.7},
        evaluations=[1] * 4,
    )


def inpaint() -> Case:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24] = 1
    images = {"image": parts.picture(), "mask_image": mask, "height": 32, "width": 32, "strength": 1.0}
    return Case(parts.text_to_image("StableDiffusionInpaintPipeline", unet=parts.unet(in_channels=9)), EDIT | images)


def controlnet_model() -> Any:
    model = parts.seeded(ControlNetModel.from_unet)(parts.unet(), conditioning_embedding_out_channels=(4, 4))
    for layer in (*model.controlnet_down_blocks, model.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(0))  # zero at first
    return model


def controlnet() -> Case:
    pipe = parts.text_to_image("StableDiffusionControlNetPipeline", controlnet=controlnet_model())
    return Case(pipe, TEXT | {"image": parts.picture()})


def sdxl() -> Case:
    return Case(parts.sdxl(), TEXT)


def sdxl_refiner() -> Case:
    return Case(
        parts.sdxl("StableDiffusionXLImg2ImgPipeline"),
        {**EDIT, "image": parts.picture(), "strength": 0.5},
        evaluations=[1] * 3,
        share=1 / 3,
    )


def instruct_pix2pix() -> Case:
    pipe = parts.text_to_image("StableDiffusionInstructPix2PixPipeline", unet=parts.unet(in_channels=8))
    return Case(pipe, {**EDIT, "image": parts.picture(), "image_guidance_scale": 1.5})


def ip_adapter() -> Case:
    pipe = parts.text_to_image(image_encoder=parts.image_encoder(), feature_extractor=parts.image_processor())
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    # as in SD: an image token has more numbers than the lowest level has positions, or the first trace keeps no exit
    size = {"height": 16, "width": 16}
    return Case(pipe, TEXT | size | {"ip_adapter_image": Image.new("RGB", (32, 32), "orange")})


def ip_adapter_weights(unet: Any) -> dict[str, Any]:
    """An IP-Adapter's weights for every cross-attention of the UNet, random."""
    generator = torch.Generator().manual_seed(0)
    layers, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{part}.weight"] = torch.randn(width, parts.WIDTH, generator=generator)
        number += name.endswith("attn2.processor") * 2
    sizes = {"proj.weight": (4 * parts.WIDTH, parts.WIDTH), "proj.bias": (4 * parts.WIDTH,)}
    projection = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    norm = {"norm.weight": torch.ones(parts.WIDTH), "norm.bias": torch.zeros(parts.WIDTH)}
    return {"image_proj": projection | norm, "ip_adapter": layers}


def perturbed_attention() -> Case:
    """Three branches in one batch; the processors in the middle are others', and run with the region."""
    components = parts.text_to_image().components | {"image_encoder": None}
    pipe = StableDiffusionPAGPipeline(**components, requires_safety_checker=False, pag_applied_layers=["mid_block"])
    return Case(parts.quiet(pipe), TEXT | {"pag_scale": 3.0})


def svd() -> Case:
    import diffusers

    unet = parts.seeded(diffusers.UNetSpatioTemporalConditionModel)(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=parts.SIZE,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=parts.WIDTH,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=3 * 4,
        addition_time_embed_dim=4,
        num_frames=2,
    )
    vae = parts.seeded(diffusers.AutoencoderKLTemporalDecoder)(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    pipe = diffusers.StableVideoDiffusionPipeline(
        unet=unet,
        vae=vae,
        image_encoder=parts.image_encoder(),
        scheduler=parts.scheduler("EulerDiscreteScheduler", prediction_type="v_prediction", timestep_type="continuous"),
        feature_extractor=parts.image_processor(),
    )
    options = {"image": parts.picture(), "num_frames": 2, "height": 32, "width": 32, "output_type": "latent"}
    return Case(parts.quiet(pipe), options)


def ddpm() -> Case:
    pipe = DDPMPipeline(parts.plain_unet(), parts.scheduler("DDPMScheduler"))
    return Case(parts.quiet(pipe), {"output_type": "numpy"})


def ddim() -> Case:
    pipe = DDIMPipeline(parts.plain_unet(), parts.scheduler(clip_sample=False))
    return Case(parts.quiet(pipe), {"output_type": "numpy", "eta": 0.5})


CASES = (
    txt2img, img2img, inpaint, controlnet, sdxl, sdxl_refiner, instruct_pix2pix, perturbed_attention, ip_adapter, svd,
    ddpm, ddim,
)  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param()


def test_pictures_are_those_of_the_schedule(case: Case) -> None:
    before, plain = snapshot(case.pipe.unet), case.run()
    passes = every(2, case.evaluations)
    expected = replay(case.pipe.unet, EXIT, passes, case.run)
    assert not torch.equal(expected, plain)  # or a wrapper that does nothing would pass
    with ch.wrap(case.pipe.unet, clock=2) as cw:
        for _ in range(2):
            with cw.trajectory():  # img2img begins within its list, which else costs an adaptor pass
                assert torch.equal(case.run(), expected)
        counts = cw.stats.full_passes, cw.stats.adaptor_passes
        assert counts == tuple(2 * letters(passes).count(kind) for kind in "FA"), cw.report()
        assert counts[1] / sum(counts) >= case.share
    assert snapshot(case.pipe.unet) == before
    assert torch.equal(case.run(), plain)


def test_clock_1_changes_nothing(case: Case) -> None:
    plain = case.run()
    with pytest.warns(ch.NoEffectWarning), ch.wrap(case.pipe.unet, clock=1):
        assert torch.equal(case.run(), plain)


def test_the_wrapper_in_the_place_of_the_unet(case: Case) -> None:
    unet = case.pipe.unet
    with ch.wrap(unet, clock=2) as cw:
        with cw.trajectory():
            expected = case.run()
        case.pipe.unet = cw
        try:
            with cw.trajectory():
                assert torch.equal(case.run(), expected)
            assert cw.stats.adaptor_passes == 2 * letters(every(2, case.evaluations)).count("A")
        finally:
            case.pipe.unet = unet


def test_a_controlnet_that_begins_and_ends_adds_zeros_elsewhere_and_passes_go_on_as_scheduled() -> None:
    case, added = controlnet(), []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        added.append(bool(kwargs["mid_block_additional_residual"].any()))

    with ch.wrap(case.pipe.unet, clock=2) as cw, case.pipe.unet.register_forward_pre_hook(look, with_kwargs=True):
        case.options.update(control_guidance_start=0.1, control_guidance_end=0.5)
        case.run()
        assert added == [False, True, True, False, False, False]
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (3, 3)
        assert set(cw.stats.reasons) == {"first step", "scheduled"}

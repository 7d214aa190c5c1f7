"""Plug-and-Play editing: DDIM's two directions, what is injected and when, and what it costs, to the MAC."""

import warnings

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, UNet2DConditionModel

import clockwork_hooks as ch
from clockwork_hooks.demo import load_demo
from clockwork_hooks.demo.captions import parse
from clockwork_hooks.demo.classifier import attribute_accuracy
from clockwork_hooks.demo.edits import layout_error
from clockwork_hooks.demo.model import to_images, to_latents
from clockwork_hooks.demo.scenes import render, scenes_of
from clockwork_hooks.editing import Injection, edit, edit_macs, find_injection, invert
from tests.snapshot import snapshot
from tests.test_examples import example

CROSS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")


def tiny(**options):
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "down_block_types": CROSS,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(config | options)).eval()


@pytest.fixture(scope="module")
def unet():
    return tiny()


def scheduler(**options):
    return DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **options)


def things(batch=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, 16, 16, generator=generator), torch.randn(3, batch, 5, 8, generator=generator)


# -- DDIM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_both_directions_are_those_of_diffusers(unet, predicts):
    source, hidden = things()
    mine = scheduler(prediction_type=predicts, beta_schedule="squaredcos_cap_v2")
    forth = DDIMInverseScheduler.from_config(mine.config)
    x = source
    with torch.no_grad():
        for solver in (forth, mine):
            solver.set_timesteps(10)
        for t in forth.timesteps:
            output = unet(x, t, encoder_hidden_states=hidden[0]).sample
            x = forth.step(output, t, x).prev_sample
        inversion = invert(unet, mine, source, hidden[0], steps=10)
        assert torch.allclose(inversion.noise, x, rtol=1e-4, atol=1e-4)
        for t in mine.timesteps:
            away = unet(x, t, encoder_hidden_states=hidden[1]).sample
            output = away + 3 * (unet(x, t, encoder_hidden_states=hidden[2]).sample - away)
            x = mine.step(output, t, x).prev_sample
    options = {"target": hidden[2], "negative": hidden[1], "steps": 10, "guidance": 3.0, "clock": 1}
    output = edit(unet, mine, inversion, injection=Injection(), **options).latents
    assert (output - x).norm() < 1e-4 * x.norm()


# -- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "clock", "inversion_clock", "steps"), [(1, 2, 2, (7, 5)), (1, 3, 2, (8, 6)), (2, 2, 1, (4, 4))]
)
def test_the_cost_is_the_papers_to_the_mac(unet, batch, clock, inversion_clock, steps):
    source, hidden = things(batch)
    result = edit(
        unet,
        scheduler(),
        source,
        hidden[0],
        target=hidden[1],
        negative=hidden[2],
        inversion_steps=steps[0],
        steps=steps[1],
        clock=clock,
        inversion_clock=inversion_clock,
    )
    report = ch.flops_report(unet, source, torch.tensor(5), encoder_hidden_states=hidden[0])
    counts = {"inversion_steps": steps[0], "steps": steps[1], "clock": clock, "inversion_clock": inversion_clock}
    assert result.macs == edit_macs(report.full_macs, report.adaptor_pass_macs, **counts)
    assert result.macs_plain == report.full_macs * (steps[0] + 3 * steps[1])
    assert result.passes.full_passes == -(-steps[1] // clock)
    assert result.inversion.passes.full_passes == -(-steps[0] // inversion_clock)


def test_the_cost_of_schedules_is_their_sum(unet):
    source, hidden = things()
    schedules = {"schedule": ch.Schedule.every(2, warmup=3), "inversion_schedule": {2, 3, 6}}
    options = {"target": hidden[1], "negative": hidden[2], "inversion_steps": 6, "steps": 8}
    result = edit(unet, scheduler(), source, hidden[0], **options, **schedules)
    report = ch.flops_report(unet, source, torch.tensor(5), encoder_hidden_states=hidden[0])
    want = edit_macs(report.full_macs, report.adaptor_pass_macs, inversion_steps=6, steps=8, **schedules)
    assert result.macs == want
    assert (result.inversion.passes.full_passes, result.passes.full_passes) == (3, 5)  # F F F A F A F A back


def test_schedules_that_count_from_the_end_know_the_steps_of_both_loops(unet):
    """They were those of a plain clock: of `early(3)` in 8 steps full at 1, 3 and 8, steps 1, 4 and 7 were."""
    source, hidden = things()
    options = {"target": hidden[1], "negative": hidden[2], "inversion_steps": 8, "steps": 12}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_rule, by_name = (
            edit(unet, scheduler(), source, hidden[0], schedule=there, inversion_schedule=forth, **options)
            for there, forth in (("spread(2)", "early(3)"), ({3, 5, 7, 8, 10, 11}, {2, 4, 5, 6, 7}))
        )
    assert torch.equal(by_rule.inversion.noise, by_name.inversion.noise)
    assert torch.equal(by_rule.latents, by_name.latents)


# -- injection -----------------------------------------------------------------------------------------------------


def by_hand(unet, inversion, hidden, injection, clock, steps):
    """The way back written out: hooks of its own, the exit kept and put back, no wrapper. Returns latents."""
    solver = scheduler()
    solver.set_timesteps(steps)
    x, texts = inversion.noise, torch.cat([hidden[0], hidden[2], hidden[1]])
    state = {"on": {}, "exit": None, "adapt": False}

    def inject(kind):
        def hook(module, args, output):
            return output[:1].expand_as(output).clone() if state["on"][kind] and not state["adapt"] else None

        return hook

    def keep(module, args, output):
        state["exit"] = state["exit"] if state["adapt"] else output
        return state["exit"]

    region = ch.find_region(unet, x, torch.tensor(5), encoder_hidden_states=hidden[0])
    handles = [
        unet.get_submodule(path).register_forward_hook(inject(kind))
        for kind in ("features", "attention")
        for path in getattr(injection, kind)
    ] + [unet.get_submodule(region.exit.path).register_forward_hook(keep)]
    with torch.no_grad():
        for k, t in enumerate(solver.timesteps):
            state["adapt"] = k % clock != 0
            state["on"] = {
                "features": k < steps * injection.until_features,
                "attention": k < steps * injection.until_attention,
            }
            three = unet(torch.cat([inversion.latents[int(t)], x, x]), t, encoder_hidden_states=texts).sample
            x = solver.step(three[1:2] + 3 * (three[2:] - three[1:2]), t, x).prev_sample
    for handle in handles:
        handle.remove()
    return x


INSIDE = Injection(
    ("up_blocks.1.resnets.1",),
    tuple(f"up_blocks.{b}.attentions.1.transformer_blocks.0.attn1.to_{x}" for b in (1, 2) for x in "qk"),
)
OUTSIDE = Injection(("up_blocks.2.resnets.0",), until_features=0.3)  # of the region: it runs on adaptor passes too

EXIT = Injection(("up_blocks.1.upsamplers.0.conv",))  # the region's own: adaptor passes repeat what was injected


@pytest.mark.parametrize(("injection", "clock"), [(INSIDE, 1), (INSIDE, 3), (OUTSIDE, 2), (EXIT, 2)])
def test_an_edit_is_what_one_writes_by_hand(unet, injection, clock):
    source, hidden = things()
    inversion = invert(unet, scheduler(), source, hidden[0], steps=10)
    options = {"target": hidden[1], "negative": hidden[2], "steps": 10, "guidance": 3.0, "clock": clock}
    latents = edit(unet, scheduler(), inversion, injection=injection, **options).latents
    want = by_hand(unet, inversion, hidden, injection, clock, 10)
    assert torch.allclose(latents, want, rtol=1e-4, atol=1e-4)
    never = Injection(injection.features, injection.attention, 0.0, 0.0)
    assert not torch.allclose(latents, edit(unet, scheduler(), inversion, injection=never, **options).latents)


def test_where_to_inject_is_found_in_the_graph(unet):
    source, hidden = things()
    injection = find_injection(ch.trace(unet, source, torch.tensor(5), encoder_hidden_states=hidden[0]))
    assert injection.features == ("up_blocks.1.resnets.1",)
    assert len(injection.attention) == 2 * 3  # one after the feature at its level, two at the highest; no text's
    assert {path.rpartition(".")[2] for path in injection.attention} == {"to_q", "to_k"}
    assert all(".attn1." in path for path in injection.attention)
    plain = torch.nn.Conv2d(4, 4, 3, padding=1)
    with pytest.raises(ch.ArgumentError, match="takes in a skip"):
        find_injection(ch.trace(plain, source))


SD_LIKE = {
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SDXL_LIKE = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
}


def conditions(unet, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    states = {"encoder_hidden_states": torch.randn(batch, 5, 8, generator=generator)}
    if unet.config.addition_embed_type is None:
        return states
    added = {"text_embeds": torch.randn(batch, 8, generator=generator), "time_ids": torch.ones(batch, 6)}
    return states | {"added_cond_kwargs": added}


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@pytest.mark.parametrize(("options", "attentions"), [(SD_LIKE, 2 + 3 + 3), (SDXL_LIKE, 2)], ids=["SD", "SDXL"])
def test_stable_diffusions_are_injected_where_plug_and_play_does(options, attentions):
    unet = tiny(**options)
    source, _ = things(2)
    old, new, away = (conditions(unet, 2, seed) for seed in range(3))
    injection = find_injection(ch.trace(unet, source, torch.tensor(5), **old), until_features=0.5, until_attention=0.25)
    assert injection.features == ("up_blocks.1.resnets.1",)  # of the second block of the way up, the second
    assert len(injection.attention) == 2 * attentions  # queries and keys, from that block's second attention on
    assert injection.attention[0] == "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    same = []

    def see(module, args):  # what comes after the feature: are source's and target's rows equal?
        first, _, third = args[0].chunk(3)
        same.append(torch.equal(first, third))

    way = invert(unet, scheduler(), source, old, steps=4, clock=2)
    ways = {"target": new, "negative": away, "steps": 8, "guidance": 3.0, "clock": 2}
    handle = unet.up_blocks[1].attentions[1].register_forward_pre_hook(see)
    injected = edit(unet, scheduler(), way, injection=injection, **ways)
    handle.remove()
    assert same == [True, True, False, False]  # full passes at steps 0, 2, 4 and 6 of 8
    free = edit(unet, scheduler(), way, injection=Injection(), **ways)
    assert (injected.latents - free.latents).norm() > 0.01 * free.latents.norm()
    assert injected.macs == free.macs


def test_self_attention_is_there_or_not_asked_for():
    plain = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        cross_attention_dim=8,
        norm_num_groups=4,
    ).eval()
    source, hidden = things()
    trace = ch.trace(plain, source, torch.tensor(5), encoder_hidden_states=hidden[0])
    with pytest.raises(ch.ArgumentError, match=r"such attention after it: 0\n.*until_attention=0"):
        find_injection(trace)
    assert find_injection(trace, until_attention=0).attention == ()


# -- the demo model ------------------------------------------------------------------------------------------------


def test_a_red_circle_becomes_a_blue_square_where_it_was():
    demo = load_demo()
    rest = "left of a small green star on a white background"
    old, new = f"a large red circle {rest}", f"a large blue square {rest}"
    picture = render(scenes_of(parse([old]), 3))
    source, wanted = demo.encode_prompts([old, new], guided=False).split(1)
    inversion = invert(demo.unet, demo.scheduler("ddim"), to_latents(picture), source, steps=20, clock=2)
    trace = ch.trace(demo.unet, inversion.noise, torch.tensor(5), encoder_hidden_states=source)
    options = {"target": wanted, "negative": source, "steps": 20, "guidance": 3.0}
    moved = {}
    for name, injection in (("kept", find_injection(trace, until_features=0.3)), ("free", Injection())):
        result = edit(demo.unet, demo.scheduler("ddim"), inversion, injection=injection, **options)
        image = to_images(result.latents)
        assert attribute_accuracy(demo.classifier, image, [new]).total == 1.0
        assert result.saving > 0.35
        moved[name], _, lost = layout_error(picture, image)
        assert not lost
    assert 2 * moved["kept"] < moved["free"]


def test_the_example_runs(capsys):
    pictures = example("edit_scene").main(2, 2)
    assert {name: tuple(picture.shape) for name, picture in pictures.items()} == dict.fromkeys(
        ("source", "plain", "Clockwork"), (1, 3, 64, 64)
    )
    assert "2 passes with the adaptor" in capsys.readouterr().out


# -- errors and restoring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps are an int"),
        ({"steps": 1001}, "steps are an int"),
        ({"inversion_steps": True}, "steps are an int"),
        ({"clock": 0}, "a clock is an int"),
        ({"inversion_clock": 0}, "a clock is an int"),
        ({"guidance": float("nan")}, "guidance is a finite number"),
        ({"injection": Injection(("up_blocks.9",))}, "no such module: up_blocks.9"),
        ({"negative": {"text": torch.zeros(1)}}, "must have the same form"),
        ({"negative": torch.zeros(2, 5, 8)}, "pictures: 1\n  encoder_hidden_states: 2×5×8"),
        ({"negative": torch.zeros(1, 7, 8)}, "negative: {'encoder_hidden_states': '7×8'}"),
        ({"scheduler": object()}, "alphas_cumprod"),
        ({"scheduler": scheduler(prediction_type="sample")}, "predicts noise or v"),
        ({"conditions": None}, "the source's conditions belong to the inversion"),
        ({"target": "a cat"}, "conditions are a tensor of hidden states"),
        ({"source": torch.zeros(1, 3, 16, 16)}, "source: 1×3×16×16\n  the UNet's in_channels: 4"),
        ({"source": torch.zeros(1, 4, 16, 16, dtype=torch.uint8)}, "floating latents"),
        ({"source": "a picture.png"}, "floating latents"),
    ],
)
def test_bad_options_are_told_and_leave_nothing(unet, options, said):
    source, hidden = things()
    before, calls = snapshot(unet), []
    arguments = {"scheduler": scheduler(), "conditions": hidden[0], "target": hidden[1], "negative": hidden[2]}
    arguments |= {"source": source, "inversion_steps": 2, "steps": 2} | options
    handle = unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ch.ArgumentError, match=said):
        edit(unet, **arguments)
    handle.remove()
    assert not calls  # nothing is computed before it is told
    assert snapshot(unet) == before


def test_no_place_for_an_injection_is_told_before_the_inversion():
    """The UNet has no self-attention: it is called once, to be traced."""
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    unet, calls = tiny(mid_block_type=None, **blocks), []
    source, hidden = things()
    unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ch.ArgumentError, match="such attention after it: 0"):
        edit(unet, scheduler(), source, hidden[0], target=hidden[1], negative=hidden[2], inversion_steps=9, steps=2)
    assert len(calls) == 1


def test_an_inversion_brings_its_own_text(unet):
    source, hidden = things()
    way = invert(unet, scheduler(), source, hidden[0], steps=1)
    with pytest.raises(ch.ArgumentError, match="or an Inversion without"):
        edit(unet, scheduler(), way, hidden[0], target=hidden[1], negative=hidden[2])


@pytest.mark.parametrize(
    "options", [{"inversion_steps": 9}, {"inversion_clock": 2}, {"inversion_schedule": ch.Schedule.every(2)}]
)
def test_an_inversion_brings_its_own_steps(unet, options):
    source, hidden = things()
    way, before = invert(unet, scheduler(), source, hidden[0], steps=1), snapshot(unet)
    with pytest.raises(ch.ArgumentError, match=rf"(?s)has its steps.*{next(iter(options))}.*leave these out"):
        edit(unet, scheduler(), way, target=hidden[1], negative=hidden[2], **options)
    assert snapshot(unet) == before


def test_a_variance_is_not_inverted():
    source, hidden = things()
    with pytest.raises(ch.ArgumentError, match="given: 1×4×16×16\n  predicted: 1×8×16×16"):
        invert(tiny(out_channels=8), scheduler(), source, hidden[0], steps=1)


def test_a_share_is_a_share():
    with pytest.raises(ch.ArgumentError, match="until_features is a share"):
        Injection(until_features=1.5)


def test_an_exception_leaves_the_unet_as_it_was(unet):
    """In the second step of the way back: the fifth call, after one that is traced and two of the inversion."""
    source, hidden = things()
    calls = []

    def breaks(*_):
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError

    handle = unet.mid_block.register_forward_hook(breaks)
    before = snapshot(unet)
    with pytest.raises(ZeroDivisionError):
        edit(
            unet,
            scheduler(),
            source,
            hidden[0],
            target=hidden[1],
            negative=hidden[2],
            inversion_steps=2,
            steps=3,
            clock=1,
        )
    assert snapshot(unet) == before
    handle.remove()

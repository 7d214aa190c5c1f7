"""Weights that change in the middle of a trajectory: one full pass, with its reason; then on as before."""

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks._tree import version
from clockwork_hooks.clock import conditions
from clockwork_hooks.clock.conditions import Weights
from tests.oracle import Judge
from tests.small_unet import Tiny

REASON = "weights or adapters of the UNet changed since the step before"


def loaded(unet: Tiny) -> None:
    unet.load_state_dict(Tiny(seed=1).state_dict())


def averaged(unet: Tiny) -> None:
    with torch.no_grad():
        for parameter, other in zip(unet.parameters(), Tiny(seed=1).parameters(), strict=True):
            parameter.lerp_(other, 0.5)


def one_layer(unet: Tiny) -> None:
    with torch.no_grad():
        unet.head.weight.mul_(2)


def optimized(unet: Tiny) -> None:
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@torch.no_grad()
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("change", [loaded, averaged, one_layer, optimized], ids=lambda change: change.__name__)
def test_a_change_costs_one_full_pass(change: Callable[[Tiny], None], nested: bool) -> None:
    judge = Judge(Tiny())
    options: dict[str, Any] = {"clocks": {1: 100}} if nested else {"schedule": lambda step: True}
    with ch.wrap(judge.unet, **options) as cw:
        for k, t in enumerate(torch.arange(900, 100, -100), 1):
            if k == 4:
                for unet in (judge.unet, judge.plain):
                    change(unet)
            judge.call(torch.randn(1, 2, 8, 8), t, step=k)
    assert judge.letters == "FAAFAAAA"
    assert cw.stats.reasons == {"first step": 1, REASON: 1}


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
def test_a_schedule_that_answers_otherwise_each_time_it_is_asked() -> None:
    """At random, say. Each call is of one kind, and what is kept of it knows the weights that it was made with."""
    for seed in range(20):
        answers = random.Random(seed)
        judge = Judge(Tiny())
        with torch.no_grad(), ch.wrap(judge.unet, schedule=lambda step, answers=answers: answers.random() < 0.5):
            for k, t in enumerate(torch.linspace(900, 100, 9), 1):
                if k % 2:
                    judge.begin()
                    for unet in (judge.unet, judge.plain):
                        unet.body.weight.mul_(1.01)
                judge.call(torch.randn(1, 2, 8, 8), t, step=k)


@torch.no_grad()
def test_adaptors_of_peft_switched_in_the_middle() -> None:
    """A LoRA that is loaded, scaled, switched off and on, fused, and taken off, one change every second step."""
    from tests.pipelines import parts
    from tests.pipelines.test_companions import lora

    pipe, text = parts.text_to_image(), torch.randn(1, 16, parts.WIDTH)
    unet = pipe.unet
    changes: list[Callable[[], object]] = [
        lambda: pipe.load_lora_weights(lora(), adapter_name="style"),
        lambda: pipe.set_adapters("style", 0.5),
        lambda: unet.disable_lora(),
        lambda: unet.enable_lora(),
        lambda: pipe.fuse_lora(components=["unet"]),
        lambda: pipe.unfuse_lora(components=["unet"]),
        lambda: pipe.unload_lora_weights(),
    ]
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        kinds = ""
        for k, t in enumerate(torch.arange(900, 100, -50)):
            if k % 2 == 0 and k:
                changes[k // 2 - 1]()
            before = cw.stats.adaptor_passes
            x = torch.randn(1, 4, 8, 8)
            output = unet(x, t, text).sample
            kinds += "A" if cw.stats.adaptor_passes > before else "F"
            if kinds[-1] == "F":
                assert torch.equal(copy.deepcopy(unet)(x, t, text).sample, output)
        assert kinds == "FA" * 8, cw.report()
        assert cw.stats.reasons[REASON] == len(changes)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_ip_adapter_free_u_and_processors_switched_in_the_middle() -> None:
    """As diffusers' IPAdapterScaleCutoffCallback does; of one block alone, too."""
    from tests.pipelines import parts
    from tests.pipelines.test_pipelines import ip_adapter_weights

    pipe = parts.text_to_image(image_encoder=parts.image_encoder(), feature_extractor=parts.image_processor())
    unet = pipe.unet
    unet._load_ip_adapter_weights([ip_adapter_weights(unet)])
    before = unet.attn_processors
    changes: list[Callable[[], object]] = [
        lambda: pipe.set_ip_adapter_scale(0.5),
        lambda: pipe.set_ip_adapter_scale({"down": {"block_0": [0.2]}}),
        lambda: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda: pipe.enable_freeu(0.9, 0.2, 1.2, 1.5),
        lambda: pipe.disable_freeu(),
        lambda: unet.set_attn_processor({path: copy.deepcopy(one) for path, one in before.items()}),
        lambda: unet.set_attn_processor(dict(before)),
    ]
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, parts.WIDTH)
    image = {"image_embeds": [torch.randn(1, 1, parts.WIDTH)]}
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        kinds = ""
        for k, t in enumerate(torch.arange(900, 100, -50)):
            if k % 2 == 0 and k:
                changes[k // 2 - 1]()
            adapted = cw.stats.adaptor_passes
            unet(x, t, text, added_cond_kwargs=image)
            kinds += "A" if cw.stats.adaptor_passes > adapted else "F"
        assert kinds == "FAFAFAFFFAFAFAFA", cw.report()  # FreeU writes to the exit, so from then on a copy is kept
        assert cw.stats.reasons[REASON] == len(changes)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@torch.no_grad()
def test_adapters_that_are_switched_back() -> None:
    """On at full steps and off at the others: a state that comes back is not that of the step in between."""

    class Adapted(nn.Conv2d):
        merged_adapters: tuple[str, ...] = ()
        _disable_adapters, _active_adapter = False, "style"

    unet = Tiny()
    unet.head, unet.peft_config = Adapted(16, 2, 3, padding=1), {"style": None}
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        for k, t in enumerate(torch.arange(900, 100, -100), 1):
            unet.head._disable_adapters = k % 2 == 0
            unet(torch.randn(1, 2, 8, 8), t)
        assert cw.stats.adaptor_passes == 0
        assert cw.stats.reasons[REASON] == 4


@pytest.mark.parametrize(
    "write",
    [
        lambda one: one.data.mul_(2),
        lambda one: setattr(one, "data", one.data * 2),
        lambda one: torch.no_grad()(one.set_)(one.detach() * 2),
        lambda one: torch._foreach_mul_([one.data], 2),
        lambda one: one.detach().numpy().__imul__(2),
    ],
    ids=["data", "data exchanged", "set_", "foreach", "by numpy"],
)
def test_a_write_that_no_counter_shows(write: Callable[[nn.Parameter], object]) -> None:
    """In main memory some values of some parameters are read."""
    unet = Tiny()
    seen = Weights(unet)
    before = seen.state()
    assert seen.state() == before
    write(unet.head.weight)
    assert seen.state() != before


@pytest.mark.parametrize("change", ["fused", "half and back", "swapped and back"])
@torch.no_grad()
def test_weights_that_change_unseen_cost_a_full_pass(change: str) -> None:
    """A fused optimizer; a round trip through half; weights of an average, swapped in for one step."""
    judge, seen = Judge(Tiny()), ""
    with ch.wrap(judge.unet, schedule=lambda step: True) as cw:
        for k, t in enumerate(torch.arange(900, 100, -100), 1):
            if k in (4, 5):
                for unet in (judge.unet, judge.plain):
                    if change == "swapped and back":
                        for one in unet.parameters():
                            one.data = one.data * 2 if k == 4 else one.data / 2
                    elif k == 4 and change == "half and back":
                        unet.half().float()
                    elif k == 4:
                        for one in unet.parameters():
                            one.grad = torch.ones_like(one)
                        torch.optim.AdamW(unet.parameters(), lr=0.1, fused=True).step()
            judge.call(torch.randn(1, 2, 8, 8), t, step=k)
        seen = judge.letters
        assert seen == ("FAAFFAAA" if change == "swapped and back" else "FAAFAAAA")
        assert cw.stats.reasons[REASON] == seen[3:].count("F")


@pytest.mark.parametrize(
    ("casts", "branches", "expected"),
    [
        (range(1, 13), 1, "FAFAAAFAAAAA"),
        (range(1, 13), 2, "FFAAAAFAAAAA"),
        ((3, 9, 10), 1, "FAAFAAFAAFFA"),
    ],
    ids=["in every call", "two branches", "in some"],
)
@torch.no_grad()
def test_weights_that_a_call_moves(
    casts: Sequence[int], branches: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layerwise casting leaves them elsewhere on the device. In step 7 somebody moves them between two calls."""
    monkeypatch.setattr(conditions, "_readable", lambda parameter: False)  # as on a GPU
    unet, held, step = Tiny(), list[Tensor](), 0

    def elsewhere(module: nn.Module) -> None:
        for one in module.parameters():
            held.append(one.data)  # as long as it is there, nothing else lies where it was
            one.data = one.data.clone()

    for module in (unet.stem, unet.head):
        module.register_forward_hook(lambda module, *_: elsewhere(module) if step in casts else None)
    letters = ""
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        for step, t in enumerate(torch.arange(1300, 100, -100), 1):
            if step == 7:
                elsewhere(unet)
            full = cw.stats.full_passes
            for c in range(branches):
                unet(torch.randn(1, 2, 8, 8), t, torch.full((1, 3), float(c)))
            letters += "FA"[cw.stats.full_passes == full]
    assert letters == expected
    assert cw.stats.reasons[REASON] > 1


def test_what_has_no_values_or_keeps_no_count() -> None:
    """Parameters that are gone, on the meta device, not made yet, or made under `inference_mode`: no error."""
    unet = Tiny()
    seen = Weights(unet)
    seen.state()
    unet.body.bias = None
    assert seen.state() == seen.state()
    with torch.inference_mode():
        unversioned = Tiny()
    for other in (unversioned, Tiny().to("meta"), nn.LazyLinear(2)):
        seen = Weights(other)
        assert seen.state() == seen.state()


def test_memory_of_parameters_stays_resizable() -> None:
    """FSDP lets it go and takes it again; what is let go is never the same."""
    unet = nn.Linear(4, 4)
    seen = Weights(unet)
    before, memory = seen.state(), unet.weight.untyped_storage()
    size = memory.nbytes()
    memory.resize_(0)
    assert seen.state() != before
    assert seen.state() != seen.state()
    memory.resize_(size)
    assert seen.state() == seen.state()


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (1, 8, 1, 1), (3, 4)])
def test_values_of_parameters_of_any_strides(shape: tuple[int, ...]) -> None:
    """Transposed, a part of a larger one, and expanded: no error, and a write to all values is seen."""
    larger = torch.randn(*shape[:-1], 2 * shape[-1])
    unet = nn.Module()
    for one in (
        larger.transpose(0, 1),
        larger[..., shape[-1] :],
        larger[..., ::2],
        larger[:1].expand(shape[1], *larger.shape[1:]),
    ):
        unet.weight = nn.Parameter(one)
        seen = Weights(unet)
        before = seen.state()
        assert seen.state() == before
        larger.data.mul_(2)
        assert seen.state() != before


def test_some_of_many() -> None:
    """Evenly, the last one among them; a change of all is a change of these."""
    many = nn.ModuleList(nn.Linear(2, 2) for _ in range(50))
    seen = Weights(many)
    before = seen.state()
    many.load_state_dict(many.state_dict())
    after = seen.state()
    changed = [one is not other and one != other for one, other in zip(before, after, strict=True)]
    assert sum(changed) == conditions._PARAMETERS
    with torch.no_grad():
        many[-1].bias.add_(1)
    assert seen.state() != after


@torch.no_grad()
def test_weights_of_modules_that_were_exchanged() -> None:
    """What is watched from then on is what the UNet consists of."""
    unet, kinds = Tiny(), ""
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        for trajectory in range(2):
            for k, t in enumerate(torch.arange(900, 100, -100)):
                if trajectory == 1 and k == 4:
                    loaded(unet)
                before = cw.stats.adaptor_passes
                unet(torch.randn(1, 2, 8, 8), t)
                kinds += "A" if cw.stats.adaptor_passes > before else "F"
            for name, module in list(unet.named_children()):
                setattr(unet, name, copy.deepcopy(module))
    assert kinds == "FAAAAAAA" + "FAAAFAAA"


@torch.no_grad()
def test_a_module_exchanged_between_the_calls_of_a_step_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call notices, the second one is recorded; the third has a feature of the module that is gone."""
    monkeypatch.setattr(conditions, "_readable", lambda parameter: False)  # as on a GPU
    unet, kinds = Tiny(), list[str]()
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        for step, t in enumerate(torch.arange(900, 300, -100), 1):
            if step == 4:
                gone, unet.body = unet.body, Tiny(seed=1).body
                assert version(gone.weight) == version(unet.body.weight)
            kinds.append("")
            for c in range(3):
                before = cw.stats.adaptor_passes
                unet(torch.randn(1, 2, 8, 8), t, torch.full((1, 3), float(c)))
                kinds[-1] += "A" if cw.stats.adaptor_passes > before else "F"
    assert kinds == ["FFF", "AAA", "AAA", "FFF", "FAA", "AAA"]


class _Plain:
    def __call__(self, x: Tensor) -> Tensor:
        return x


class _Unreadable(_Plain):
    @property
    def scale(self) -> float:
        raise RuntimeError("no scale yet")


class _Attends(nn.Module):
    """Its processor is an attribute, or a property that fails or makes it anew."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.kept = how, _Unreadable()

    def set_processor(self, processor: Any) -> None: ...

    @property
    def processor(self) -> Any:
        if self.how == "fails":
            raise RuntimeError("no processor")
        return _Plain() if self.how == "anew" else self.kept

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("how", ["fails", "anew", "its scale fails"])
def test_processors_that_no_attribute_holds_change_nothing(how: str) -> None:
    unet = Tiny()
    unet.stem = nn.Sequential(unet.stem, _Attends(how))
    with torch.no_grad(), ch.wrap(unet, clock=2) as cw, cw.trajectory():
        for t in (900, 700, 500, 300):
            unet(torch.randn(2, 2, 16, 16), t)
    assert cw.stats.adaptor_passes == 2

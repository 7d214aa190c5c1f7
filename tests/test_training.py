"""Distillation: what is recorded, what is learned from it, and what it leaves behind."""

import hashlib
from typing import Any

import pytest
import torch
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.engine import cuda_graphs
from clockwork_hooks.training.trajectory import Buffer, TrajectoryRecorder
from tests.small_unet import Tiny, reference
from tests.snapshot import snapshot
from tests.tape import FakeCuda
from tests.training_parts import GUIDANCE, TIMES, Small, by_hand, noise_of, sampler
from tests.zoo import ZOO

MODES = ("unrolled", "on_policy", "forward_noise")
LOSSES = ("feature", "guided-feature", "guided-output")


def quick(unet: nn.Module, adaptor: Any, generate: Any = None, **options: Any) -> ch.DistillResult:
    """`distill` without a bar, on few prompts."""
    defaults = {
        "prompts": range(12),
        "batch": 2,
        "trajectories": 3,
        "guidance": GUIDANCE,
        "progress": False,
        "lr": 1e-2,
    }
    return ch.distill(unet, adaptor, generate or sampler(unet), **{**defaults, **options})


def parameters_hash(unet: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in unet.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# -- what is recorded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 2])
def test_records_what_crosses_the_edge_at_every_step_and_branch(calls: int) -> None:
    unet = Tiny()
    recorder = TrajectoryRecorder(unet)
    trajectory = recorder.record(sampler(unet, calls=calls), [1, 2, 3])
    recorder.remove()
    assert [(step.step, len(step.calls)) for step in trajectory.steps] == [(k, calls) for k in range(1, 6)]
    for step, before in zip(trajectory.steps, (None, *trajectory.steps), strict=False):
        for k, call in enumerate(step.calls):
            output, exit = reference(unet, *call.args, **call.kwargs)
            assert torch.equal(call.output, output)
            assert torch.equal(call.exit, exit)
            assert call.captured["entry"].shape == (6 // calls, 8, 8, 8)
            assert call.source is (before.calls[k] if before else None)
            assert call.student_exit is None


@pytest.mark.filterwarnings("ignore:an adaptor has to take fewer MACs:clockwork_hooks.NoEffectWarning")
def test_the_students_passes_are_labelled_by_the_teacher() -> None:
    unet, adaptor = Tiny(), Small()
    recorder = TrajectoryRecorder(unet)
    schedule = ch.Schedule.every(3)
    trajectory = recorder.record(sampler(unet), [1, 2], student=(adaptor, schedule))
    recorder.remove()
    with torch.no_grad(), ch.wrap(unet, adaptor, clock=3):
        as_used: list[Any] = []
        handle = unet.register_forward_hook(lambda module, args, output: as_used.append(output.clone()))
        sampler(unet)([1, 2])
        handle.remove()
    for step, used in zip(trajectory.steps, as_used, strict=True):
        (call,) = step.calls
        output, exit = reference(unet, *call.args)
        assert torch.equal(call.output, output)
        assert torch.equal(call.exit, exit)
        assert (call.student_exit is None) == schedule.is_full(step.step)
        assert torch.equal(call.output if call.student_exit is None else call.student_output, used)


def test_a_call_runs_again_without_the_region_and_with_gradient() -> None:
    unet = Tiny()
    unet.requires_grad_(False)
    recorder = TrajectoryRecorder(unet)
    call = recorder.record(sampler(unet), [1, 2]).steps[2].calls[0]
    exit = call.exit.clone().requires_grad_()
    unet.body.weight.fill_(torch.nan)  # whoever runs it shows
    seen: dict[str, Any] = {}
    output = recorder.again(call, lambda captured: (seen.update(captured), exit)[1])
    recorder.remove()
    assert seen.keys() == call.captured.keys() == {"entry", "time", "text"}
    assert all(torch.equal(seen[name], call.captured[name]) for name in seen)
    assert torch.equal(output, call.output)
    (gradient,) = torch.autograd.grad(output.sum(), exit)
    assert gradient.abs().sum() > 0


class Direct(Tiny):
    """Adds its condition within the region as it comes: no module call takes it, only the root does."""

    def forward(self, x: Any, t: Any, c: Any = None, **more: Any) -> Any:
        h = self.stem(x)
        z = self.up(self.body(self.act(self.down(h) + nn.functional.linear(c, self.side.weight)[:, :, None, None])))
        return self.head(torch.cat([h, z], 1))


@pytest.mark.parametrize("student", [False, True])
def test_what_only_the_root_takes_is_captured_too(student: bool) -> None:
    unet, condition = Direct(), torch.randn(2, 3)

    def generate(batch: Any) -> None:
        for t in torch.tensor(TIMES):
            unet(torch.randn(2, 2, 8, 8), t, condition)

    recorder = TrajectoryRecorder(unet)
    acting = (Small(), ch.Schedule.every(2)) if student else None
    call = recorder.record(generate, [1, 2], student=acting).steps[1].calls[0]
    seen: dict[str, Any] = {}
    recorder.again(call, lambda captured: (seen.update(captured), call.exit)[1])
    recorder.remove()
    assert torch.equal(call.captured["text"], call.args[2])
    assert torch.equal(seen["text"], call.args[2])


def test_inference_mode_and_in_place_samplers_are_recorded_too() -> None:
    unet = Tiny()

    def generate(batch: Any) -> None:
        with torch.inference_mode():
            sample, condition = torch.randn(2, 2, 8, 8), torch.randn(2, 3)
            for t in torch.tensor(TIMES):
                sample -= 0.2 * unet(sample, t, condition)

    recorder = TrajectoryRecorder(unet)
    steps = recorder.record(generate, [1, 2]).steps
    recorder.remove()
    for step in steps:
        assert torch.equal(reference(unet, *step.calls[0].args)[0], step.calls[0].output)
        assert not step.calls[0].exit.is_inference()


@pytest.mark.parametrize(("loss", "outputs"), [("guided-output", True), ("feature", False)])
def test_keeps_only_what_is_needed(loss: str, outputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = []
    add = Buffer.add

    def watched(self: Buffer, trajectory: Any) -> None:
        buffers.append(trajectory)
        add(self, trajectory)

    monkeypatch.setattr(Buffer, "add", watched)
    quick(Tiny(), Small(), loss=loss, trajectories=1, clock=4)
    calls = [step.calls[0] for step in buffers[0].steps]
    assert [bool(call.args) for call in calls] == [False, outputs, outputs, outputs, False]
    assert [bool(call.captured) for call in calls] == [False, *[not outputs] * 3, False]
    assert calls[0].exit is not None


# -- what is learned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", [2, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_is_algorithm_1(loss: str, clock: int) -> None:
    """The same losses as a loop with plain hooks; above clock 2 the student is given its own last output."""
    unet, adaptor, twin = Tiny(), Small(), Small()
    batches: list[list[int]] = []
    generate = sampler(unet)

    def watched(batch: list[int]) -> None:
        batches.append(batch)
        generate(batch)

    result = quick(unet, adaptor, watched, loss=loss, clock=clock, max_norm=None, hold=1)
    expected = by_hand(unet, twin, batches[1:], clock=clock, loss=loss, lr=1e-2)  # the first one found the region
    assert result.losses == pytest.approx(expected, rel=1e-4)
    for mine, theirs in zip(adaptor.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_gradients_accumulate_and_weights_are_averaged() -> None:
    """Two adaptor steps a gradient step; what comes back is the moving average of the weights, from the first on."""
    unet, adaptor, twin, averaged = Tiny(), Small(), Small(), Small()
    batches: list[list[int]] = []
    generate, averages = sampler(unet), []

    def watched(batch: list[int]) -> None:
        batches.append(batch)
        generate(batch)

    def average() -> None:
        averages.append(1)
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), twin.parameters(), strict=True):
                mean.copy_(now if len(averages) == 1 else 0.75 * mean + 0.25 * now)

    result = quick(unet, adaptor, watched, max_norm=None, hold=1, accumulate=2, ema=0.75, trajectories=5)
    expected = by_hand(unet, twin, batches[1:], clock=2, loss="guided-output", lr=1e-2, accumulate=2, after=average)
    assert result.losses == pytest.approx(expected, rel=1e-4)
    assert result.students["adaptor"].updates == len(averages) == 5
    for mine, theirs, last in zip(adaptor.parameters(), averaged.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(mine, last, rtol=1e-3, atol=1e-5)


def test_prompts_come_in_a_new_order_each_time_they_are_used_up() -> None:
    unet = Tiny()
    generate, batches = sampler(unet), []

    def watched(batch: list[int]) -> None:
        batches.append(batch)
        generate(batch)

    quick(unet, Small(), watched, prompts=range(8), trajectories=12, hold=3)
    orders = [sum(batches[1:][at : at + 4], []) for at in (0, 4, 8)]  # noqa: RUF017
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("loss", LOSSES)
def test_branches_in_one_call_or_in_two_are_the_same(loss: str) -> None:
    unet = Tiny()
    one, two = (quick(unet, Small(), sampler(unet, calls=calls), loss=loss).losses for calls in (1, 2))
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_overfits_one_trajectory(loss: str) -> None:
    unet = Tiny()
    result = quick(unet, Small(), prompts=[1], batch=1, loss=loss, trajectories=200, hold=1, decay="cosine")
    student = result.students["adaptor"]
    assert student.last < 0.1 * student.losses[0]


def test_only_the_adaptor_learns_and_the_unet_is_as_before() -> None:
    unet = Tiny().train()
    unet.body.eval()
    unet.down.requires_grad_(False)
    before, flags, shape = parameters_hash(unet), [p.requires_grad for p in unet.parameters()], snapshot(unet)
    adaptor = Small()
    weights = [p.clone() for p in adaptor.parameters()]
    quick(unet, adaptor)
    assert parameters_hash(unet) == before
    assert [p.requires_grad for p in unet.parameters()] == flags
    assert all(p.grad is None for p in unet.parameters())
    assert snapshot(unet) == shape
    assert unet.training
    assert not unet.body.training
    assert not any(torch.equal(old, new) for old, new in zip(weights, adaptor.parameters(), strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_mode_with_every_loss(mode: str, loss: str) -> None:
    unet = Tiny()
    more = {}
    if mode == "forward_noise":
        more = {
            "images": lambda batch: torch.stack([torch.full((2, 8, 8), k / 10) for k in batch]),
            "add_noise": lambda clean, noise, t: clean * (1 - t / 1000) + noise * t / 1000,
        }
    both = {"fast": ch.Student(Small(), clock=3), "slow": Small(1)}
    result = quick(unet, both, mode=mode, loss=loss, trajectories=40, **more)
    for student in result.students.values():
        assert student.last < student.first
    assert "fast" in result.table().to_markdown()
    assert '"relative' not in result.to_json()


def test_forward_noise_gives_the_unet_noised_images() -> None:
    unet = Tiny()
    seen = []
    handle = unet.stem.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    more = {"images": lambda batch: torch.ones(2, 2, 8, 8), "add_noise": lambda clean, noise, t: clean + t * noise}
    quick(unet, Small(), mode="forward_noise", trajectories=1, loss="feature", **more)
    handle.remove()
    noisy = seen[-len(TIMES) :]
    noise = (noisy[0] - 1) / TIMES[0]
    for sample, t in zip(noisy, TIMES, strict=True):
        torch.testing.assert_close(sample, 1 + t * noise)
        assert torch.equal(sample[:2], sample[2:])


def test_several_clocks_and_step_counts_in_one_adaptor() -> None:
    unet = Tiny()
    samplers = [sampler(unet), sampler(unet, (900.0, 500.0, 100.0))]
    result = quick(unet, Small(), samplers, clock=(2, 3), trajectories=8)
    assert result.steps == (5, 3)
    assert result.students["adaptor"].schedules == ("every(2)", "every(3)")
    assert result.errors.keys() == {2, 3, 4, 5}


def test_on_policy_each_adaptor_learns_from_its_own_trajectories() -> None:
    unet = Tiny()
    both = quick(unet, {"a": Small(), "b": Small()}, mode="on_policy", trajectories=4)
    assert [len(student.losses) for student in both.students.values()] == [4, 4]
    shared = quick(unet, {"a": Small(), "b": Small()}, trajectories=4)
    assert [len(student.losses) for student in shared.students.values()] == [8, 8]
    assert shared.students["a"].losses == shared.students["b"].losses


def test_gradients_survive_a_float16_unet() -> None:
    """They pass its high-resolution half, and are too small for float16 as they are."""
    unet = Tiny()
    with torch.no_grad():
        unet.head.weight[:, 8:] *= 1e-3  # what the exit does to the output
    first: list[list[torch.Tensor]] = []
    for kind in (torch.float32, torch.float16):
        adaptor, twin = Small(), unet.to(kind)

        def generate(batch: Any, twin: Any = twin, kind: Any = kind) -> None:
            sample, condition = (torch.stack(parts).to(kind) for parts in zip(*map(noise_of, batch), strict=True))
            for t in torch.tensor(TIMES):
                sample = sample - 0.2 * twin(sample, t, condition)

        quick(twin, adaptor, generate, trajectories=1, guidance=(1.0,), clock=4, accumulate=3)
        first.append([new - old for new, old in zip(adaptor.parameters(), Small().parameters(), strict=True)])
    agree = [(a * b > 0).float().mean().item() for a, b in zip(*first, strict=True)]  # Adam's first step: ± lr
    assert min(agree) > 0.8


@pytest.mark.parametrize("loss", LOSSES)
def test_graphs_replay_the_teacher(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "graph_pool_handle", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    unet = Tiny()
    before = snapshot(unet)
    with pytest.raises(ch.ArgumentError, match="on a CUDA device"):
        quick(unet, Small(), graphs=True)
    monkeypatch.setattr(cuda_graphs, "DEVICES", ("cpu",))  # private: the fake graphs run where there is no GPU
    plain, replayed = (quick(unet, Small(), loss=loss, graphs=graphs).losses for graphs in (False, True))
    assert fake.captures == 1
    assert replayed == pytest.approx(plain, rel=1e-5)
    assert snapshot(unet) == before
    with pytest.raises(ch.ArgumentError, match="the teacher's trajectories"):
        quick(unet, Small(), graphs=True, mode="on_policy")


# -- exits of every layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["feature", "guided-output"])
@pytest.mark.parametrize(
    ("name", "exit"),
    [
        ("token_unet", (2, 64, 16)),
        ("channels_last", (2, 16, 16, 8)),
        ("unet1d", (2, 32, 64)),
        ("volumes", (1, 8, 4, 16, 16)),
        ("unet3d", (3, 32, 16, 16)),  # the frames of one sample
    ],
)
def test_exits_of_every_layout_are_learned_from(name: str, exit: tuple[int, ...], loss: str, tmp_path: Any) -> None:
    case = ZOO[name]()
    sample, time = case.args

    def generate(batch: Any) -> None:
        for t in (9, 7, 5, 3):
            case.model(sample * (1 + t / 10), torch.full_like(torch.as_tensor(time), t), **case.kwargs)

    guidance = (1.0,) if loss == "guided-output" else None
    quickly = {"guidance": guidance, "folder": tmp_path, "hold": 1, "prompts": [0], "batch": 1, "lr": 1e-3}
    result = quick(case.model, "resnet", generate, loss=loss, **quickly)
    (student,) = result.students.values()
    assert result.region.exit.shape == exit
    assert student.updates == 6
    assert sum(student.losses[4:]) < sum(student.losses[:2])  # the same two steps, twice later
    with torch.no_grad(), ch.wrap(case.model, tmp_path) as cw, cw.trajectory():
        generate(None)
    assert cw.stats.adaptor_passes == 2

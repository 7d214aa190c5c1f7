"""Training runs: resumed, spread over processes, bounded, refused with a clear error, and saved."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.training.result import latest_checkpoint
from clockwork_hooks.training.trajectory import Buffer, TrajectoryRecorder
from tests.small_unet import Tiny
from tests.training_parts import GUIDANCE, TIMES, Small, sampler

ROOT = Path(ch.__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of other processes


def quick(unet: nn.Module, adaptor: Any, generate: Any = None, **options: Any) -> ch.DistillResult:
    few = {"prompts": range(12), "batch": 2, "trajectories": 6, "hold": 2, "lr": 1e-2, "log_every": 3}
    return ch.distill(
        unet, adaptor, generate or sampler(unet), **{"guidance": GUIDANCE, "progress": False, **few, **options}
    )


def script(folder: Path, body: str) -> Path:
    """A program that trains; `options` are its settings."""
    head = f"""
        import sys, json
        import torch
        torch.set_num_threads(1)
        import clockwork_hooks as ch
        from tests.small_unet import Tiny
        from tests.training_parts import Small, sampler
        unet = Tiny()
        options = {{"prompts": range(24), "guidance": {GUIDANCE}, "progress": False, "lr": 1e-2, "hold": 2}}
    """
    path = folder / "train.py"
    lines = (head + body).splitlines()
    path.write_text("\n".join(line.removeprefix("        ") for line in lines), encoding="utf-8")
    return path


# -- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["unrolled", "on_policy"])
def test_stopped_and_resumed_is_as_if_never_stopped(mode: Any, tmp_path: Path) -> None:
    unet = Tiny()
    more = {"ema": 0.9, "mode": mode, "accumulate": 2, "reuse": 2}
    whole = quick(unet, {"a": Small(), "b": Small(1)}, **more)
    quick(unet, {"a": Small(), "b": Small(1)}, folder=tmp_path, **more, **{"trajectories": 2})
    resumed = quick(unet, {"a": Small(5), "b": Small(6)}, folder=tmp_path, resume=True, **more)
    assert resumed.trajectories == 6
    for name, student in whole.students.items():
        assert resumed.students[name].losses == student.losses
        assert len(student.losses) > 6
        for one, other in zip(student.adaptor.parameters(), resumed.students[name].adaptor.parameters(), strict=True):
            assert torch.equal(one, other)


def test_killed_and_resumed_gives_the_same_losses(tmp_path: Path) -> None:
    body = """
        class Slow(Small):
            def forward(self, *args, **kwargs):
                import time
                time.sleep(float(sys.argv[2]))
                return super().forward(*args, **kwargs)
        result = ch.distill(unet, Slow(), sampler(unet), batch=2, trajectories=16, save_every=0, resume=True,
                            folder=sys.argv[1], **options)
        print(json.dumps(result.losses))
    """
    program = script(tmp_path, body)
    environment = {**os.environ, "PYTHONPATH": PATHS}
    killed = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, program, killed, "0.1"], env=environment)
    deadline = time.monotonic() + 60
    while latest_checkpoint(killed) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = json.loads((latest_checkpoint(killed) / "run.json").read_text())["trajectories"]  # type: ignore[operator]
    assert 0 < done < 16
    losses = []
    for folder in (killed, tmp_path / "whole"):
        command = [sys.executable, program, folder, "0"]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        losses.append(json.loads(process.stdout))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 32


def test_resumes_only_what_was_started_so(tmp_path: Path) -> None:
    unet = Tiny()
    quick(unet, Small(), folder=tmp_path, trajectories=2)
    with pytest.raises(ch.ArgumentError, match="a folder can hold only one run"):
        quick(unet, Small(), folder=tmp_path)
    with pytest.raises(ch.DistillError, match=r"lr: 0\.01 → 0\.02"):
        quick(unet, Small(), folder=tmp_path, resume=True, lr=0.02)
    (latest_checkpoint(tmp_path) / "adaptor.safetensors").write_bytes(b"broken")  # type: ignore[operator]
    with pytest.raises(ch.DistillError, match="resumed from its checkpoint"):
        quick(unet, Small(), folder=tmp_path, resume=True)


# -- several processes -------------------------------------------------------------------------------------------


@pytest.mark.slow  # starts three interpreters; gloo's threads now and then abort a process that is done
def test_two_processes_are_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """Gradients are means over the processes, so losses agree up to the order of sums.

    In double precision, where that is 3e-15 and leaves no room for another difference: in single precision eight steps
    of learning make 1e-7 of the first loss to 1.2e-5 of the last.
    Also where a round ends before the adaptor steps of a gradient step are all in: "a" has four, three make one.
    """
    body = """
        torch.set_default_dtype(torch.float64)
        unet = Tiny()
        batch, trajectories, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        both = {"a": Small(), "b": ch.Student(Small(1), loss="feature", clock=3)}
        result = ch.distill(unet, both, sampler(unet), batch=batch, trajectories=trajectories, accumulate=3,
                            **options)
        import os
        rank = os.environ.get("RANK", "0")
        open(out + rank, "w").write(json.dumps({k: v.losses for k, v in result.students.items()}))
        if rank + out[-3:] == "0two":
            assert result.settings["processes"] == 2
            assert torch.distributed.get_backend() == "gloo"
        os._exit(0)  # all is written: no teardown of modules that hold gloo's threads
    """
    program = script(tmp_path, body)
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    two = [*launch, str(program), "2", "8", str(tmp_path / "two")]
    one = [sys.executable, str(program), "4", "4", str(tmp_path / "one")]
    for command in (two, one):
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    single, first, second = (json.loads((tmp_path / name).read_text()) for name in ("one0", "two0", "two1"))
    assert first == second
    assert {name: len(losses) for name, losses in single.items()} == {"a": 8, "b": 12}
    for name, losses in single.items():
        assert first[name] == pytest.approx(losses, rel=1e-12)


# -- the buffer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["feature", "guided-output"])
def test_a_students_trajectory_holds_no_more_than_a_teachers(loss: str) -> None:
    """What the student did itself is no lesson."""
    peaks = [quick(Tiny(), Small(), loss=loss, mode=mode).buffer_peak for mode in ("unrolled", "on_policy")]
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("where", ["device", "ram", "disk"])
def test_the_buffer_keeps_its_bound(where: str, tmp_path: Path) -> None:
    unet = Tiny()
    one = quick(unet, Small(), trajectories=1, hold=1).buffer_peak
    place = tmp_path if where == "disk" else where
    bounded = quick(unet, Small(), buffer=place, buffer_gb=2.5e-9 * one, hold=100)
    free = quick(unet, Small(), hold=2)
    assert bounded.buffer_peak == 2 * one
    assert bounded.losses == free.losses
    assert not any(tmp_path.iterdir())


def test_buffers_in_one_folder_are_apart(tmp_path: Path) -> None:
    """Those of several processes; and what the user has there stays."""
    mine = tmp_path / "trajectories" / "mine.txt"
    mine.parent.mkdir()
    mine.touch()
    unet = Tiny()
    recorder = TrajectoryRecorder(unet)
    buffers, recorded = [Buffer(tmp_path, 1), Buffer(tmp_path, 1)], []
    for buffer, prompts in zip(buffers, ([1, 2], [3, 4]), strict=True):
        recorded.append(recorder.record(sampler(unet), prompts))
        buffer.add(recorded[-1])
    recorder.remove()
    for buffer, calls in zip(buffers, recorded, strict=True):
        held = buffer.get(0, torch.device("cpu:0"))
        assert all(map(torch.equal, held.tensors(), calls.tensors()))
        buffer.clear()
    assert not torch.equal(recorded[0].steps[0].calls[0].exit, recorded[1].steps[0].calls[0].exit)
    assert list(tmp_path.iterdir()) == [mine.parent]
    assert mine.exists()


def test_a_buffer_too_small_for_one_trajectory() -> None:
    with pytest.raises(ch.ArgumentError, match="must be large enough for one trajectory") as caught:
        quick(Tiny(), Small(), buffer_gb=1e-6)
    assert "pass buffer_gb=" in str(caught.value)


FULL = (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)"))


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_the_disk_is_full(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    adaptor, save, calls = Small(), safetensors.torch.save_file, []
    start = [p.detach().clone() for p in adaptor.parameters()]

    def full(tensors: Any, path: Any, **more: Any) -> None:
        if "trajectories" in str(path):
            calls.append(path)
            if len(calls) > 2:
                raise error
        save(tensors, path, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ch.DistillError, match="No space left"):
        quick(Tiny(), adaptor, folder=tmp_path, buffer=tmp_path / "buffer")
    assert not any(torch.equal(old, new) for old, new in zip(start, adaptor.parameters(), strict=True))
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["mix.0.weight"], adaptor.mix[0].weight)
    assert json.loads((tmp_path / "training.json").read_text())["trajectories"] == 2


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_no_room_for_a_checkpoint_or_for_the_adaptor(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes room for nothing is taken away, so that the adaptor fits; where it does not, both are told."""
    import safetensors.torch

    save, places = safetensors.torch.save_file, ["partial/"]

    def full(tensors: Any, path: Any, **more: Any) -> None:
        Path(path).touch()
        if any(place in str(path) for place in places):
            raise error
        save(tensors, path, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ch.DistillError, match="No space left") as caught:
        quick(Tiny(), Small(), folder=tmp_path / "a", save_every=0)
    assert "checkpoint before: none" in str(caught.value)
    assert not any((tmp_path / "a/checkpoint").iterdir())
    assert safetensors.torch.load_file(tmp_path / "a/model.safetensors")
    places.append("/model.safetensors")
    with (
        pytest.warns(RuntimeWarning, match="could not be saved either"),
        pytest.raises(ch.DistillError, match="a checkpoint could not be saved"),
    ):
        quick(Tiny(), Small(), folder=tmp_path / "b", save_every=0)
    places.remove("partial/")
    with pytest.raises(ch.DistillError, match="the trained adaptor could not be saved") as caught:
        quick(Tiny(), Small(), folder=tmp_path / "c")
    assert (caught.value.result.trajectories, len(caught.value.result.losses)) == (6, 12)


# -- what is shown -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "shown"), [(5, {2, 4}), (20, {2, 8, 14, 20})])
def test_the_bar_tells_loss_error_by_step_throughput_and_time_left(times: int, shown: set[int]) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=160)
    unet = Tiny()
    generate = sampler(unet, [1000.0 - 10 * k for k in range(times)])
    result = quick(unet, Small(), generate, progress=True, console=console, log_every=1000)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    last = [line for line in re.split("[\r\n]", drawn) if "loss" in line][-1]
    assert "distilling" in last
    assert "100%" in last
    assert re.search(r"0:00:\d\d left 0:00:00 [\d.]+ steps/s", last)
    recent = result.losses[-50:]
    assert f"loss {sum(recent) / len(recent):.3g}" in last
    assert {int(step) for step in re.findall(r"(\d+): \d+%", last)} == shown
    assert all(f"{step}: {result.errors[step]:.0%}" in last for step in shown)


def test_the_report_shows_the_identity_s_error_beside_the_adaptor_s() -> None:
    """An adaptor that does not learn, and gives the cached feature on, is off by just that."""

    class Identical(Small):
        def forward(self, entry: Any, exit_cached: Any, **more: Any) -> Any:
            return exit_cached + 0.0 * super().forward(entry, exit_cached, **more)

    for loss in ("feature", "guided-output"):
        unet = Tiny()
        result = quick(unet, Identical(), sampler(unet), loss=loss, lr=1e-12, trajectories=3, hold=3, log_every=99)
        student = result.students["adaptor"]
        assert student.errors == pytest.approx(student.identity_errors, rel=1e-5)
        assert min(student.errors.values()) > 0.001
    rows = result.tables()[1].rows
    assert [(row[1], row[2]) for row in rows] == [(row[1], row[3]) for row in rows]


# -- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_keeps_what_was_trained(tmp_path: Path) -> None:
    unet, adaptor = Tiny(), Small()
    generate, runs = sampler(unet), []

    def breaks(batch: Any) -> None:
        runs.append(batch)
        with torch.no_grad():
            unet.stem.weight.mul_(float("nan") if len(runs) == 4 else 1.0)
        generate(batch)

    with pytest.raises(ch.DistillError, match="losses must be finite") as caught:
        quick(unet, adaptor, breaks, folder=tmp_path)
    assert "adaptor step: 5" in str(caught.value)
    assert caught.value.result.adaptor is adaptor
    assert all(bool(torch.isfinite(p).all()) for p in adaptor.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(adaptor.parameters(), Small().parameters(), strict=True))
    assert len(json.loads((tmp_path / "training.json").read_text())["students"]["adaptor"]["losses"]) == 4


class Flat(nn.Module):
    """No resolution below the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"prompts": []}, ch.ArgumentError, "prompts: 0"),
        ({"prompts": "a cat"}, ch.ArgumentError, "prompts are a sequence"),
        ({"generate": lambda batch: None}, ch.DistillError, "calls of the UNet: 0"),
        ({"unet": Flat()}, ch.RegionNotFoundError, "What to do"),
        ({"times": TIMES[:1]}, ch.DistillError, "must have adaptor steps to learn from"),
        ({"clock": 1}, ch.ArgumentError, "clocks of at least 2"),
        ({"mode": "rolled"}, ch.ArgumentError, "unrolled, forward_noise, on_policy"),
        ({"mode": "forward_noise"}, ch.ArgumentError, "neither images nor add_noise"),
        ({"loss": "l1"}, ch.ArgumentError, "feature, guided-feature, guided-output"),
        ({"loss": "guided-output", "guidance": None}, ch.ArgumentError, "pass guidance=7.5"),
        ({"guidance": (1.0, 2.0, 3.0)}, ch.DistillError, "a weight for each branch"),
        ({"guidance": "strong"}, ch.ArgumentError, "scale, or a weight"),
        ({"guidance": float("nan")}, ch.ArgumentError, "guidance: nan"),
        ({"generate": 3}, ch.ArgumentError, "generate: 3"),
        ({"facts": {"sampler": object()}}, ch.ArgumentError, "not JSON serializable"),
        ({"tracker": "tensorboard"}, ch.ArgumentError, "pass folder="),
        ({"adaptor": "identity"}, ch.AdaptorError, "resnet"),
        ({"adaptor": nn.Identity()}, ch.AdaptorError, "needs parameters with requires_grad"),
        ({"adaptor": {}}, ch.ArgumentError, "have names"),
        ({"batches": 3}, ch.ArgumentError, "no such option: batches"),
        ({"batch": 0}, ch.ArgumentError, "batch is an int of at least 1"),
        ({"precision": "fp8"}, ch.ArgumentError, "precision is one of a few"),
        ({"buffer_gb": 0}, ch.ArgumentError, "buffer_gb is above 0"),
        ({"seed": 1.5}, ch.ArgumentError, "seed is an int of at least 0"),
        ({"batch": None}, ch.ArgumentError, "batch is an int of at least 1"),
        ({"warmup": None}, ch.ArgumentError, "warmup is in [0, 1)"),
        ({"save_every": "x"}, ch.ArgumentError, "save_every is a number"),
        ({"buffer": 3}, ch.ArgumentError, "or a folder"),
        ({"resume": True}, ch.ArgumentError, "pass folder="),
        ({"folder": "/proc/nowhere"}, ch.DistillError, "folder must be writable"),
    ],
)
def test_bad_input_is_told(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    changes = dict(changes)
    unet = changes.pop("unet", Tiny())
    generate = changes.pop("generate", sampler(unet, changes.pop("times", TIMES)))
    hooks = (len(unet._forward_hooks), len(unet._forward_pre_hooks))
    with pytest.raises(error) as caught:
        quick(unet, changes.pop("adaptor", Small()), generate, **changes)
    assert says in str(caught.value)
    assert (len(unet._forward_hooks), len(unet._forward_pre_hooks)) == hooks
    assert all(p.requires_grad for p in unet.parameters())


def test_a_time_that_cannot_be_found_is_asked_for() -> None:
    """One for each frame: what is full because of it can be told in another way than by more steps."""

    class Frames(Tiny):
        def forward(self, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
            return super().forward(x, frames.mean(1))

    unet = Frames()

    def generate(batch: Any) -> None:
        for t in TIMES:
            unet(torch.randn(2, 2, 8, 8), torch.full((2, 4), t))

    with pytest.raises(ch.DistillError, match=r"(?s)no time input.*name the time input of the UNet: time="):
        quick(unet, Small(), generate, guidance=None)


def test_a_wrapped_unet_is_refused_and_an_error_of_the_sampler_is_its_own() -> None:
    unet = Tiny()
    with ch.wrap(unet), pytest.raises(ch.WrapError):
        quick(unet, Small())
    with pytest.raises(ZeroDivisionError):
        quick(unet, Small(), lambda batch: 1 / 0)
    quick(unet, Small(), trajectories=1)


# -- what is left behind -----------------------------------------------------------------------------------------


def test_the_folder_is_what_wrap_takes(tmp_path: Path) -> None:
    unet = Tiny()
    result = quick(unet, "resnet", folder=tmp_path, facts={"sampler": "Euler"}, ema=0.5)
    assert (tmp_path / "README.md").is_file()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["region"]["fingerprint"] == result.region.fingerprint
    assert (config["facts"]["sampler"], config["facts"]["steps"], config["facts"]["schedule"]) == (
        "Euler",
        5,
        "every(2)",
    )
    images = []
    for adaptor in (result.adaptor, str(tmp_path)):
        with torch.no_grad(), ch.wrap(unet, adaptor) as cw:
            images.append(sampler(unet)([1, 2]))
            assert cw.stats.adaptor_passes == 2
    assert torch.equal(*images)


def test_random_numbers_of_the_caller_go_on() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    quick(Tiny(), Small(), trajectories=1)
    assert torch.equal(torch.rand(2), expected)


def test_tensorboard_holds_losses_and_errors(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = quick(Tiny(), Small(), folder=tmp_path, tracker="tensorboard", log_every=2)
    (events,) = (path for path in (tmp_path / "logs").rglob("events.*"))
    read = EventAccumulator(str(events.parent)).Reload()
    assert {"adaptor/loss", "adaptor/error/step 2", "adaptor/error/step 4"} <= set(read.Tags()["scalars"])
    loss = read.Scalars("adaptor/loss")[-1]
    assert (loss.step, loss.value) == (len(result.losses), pytest.approx(result.losses[-1]))
    assert read.Scalars("adaptor/error/step 2")[-1].value == pytest.approx(result.errors[2])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_half_precision_unet_trains_a_float32_adaptor(precision: str) -> None:
    unet, adaptor, seen = Tiny().bfloat16(), Small(), set()
    adaptor.mix[0].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    generate = sampler(unet)

    def cast(batch: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            generate(batch)

    result = quick(unet, adaptor, cast, precision=precision)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert next(result.adaptor.parameters()).dtype == torch.float32
    assert all(0 < loss < 10 for loss in result.losses)

"""Private names of torch that may go: what happens without each of them is safe. docs/design.md lists them."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

import clockwork_hooks as ch
from clockwork_hooks._tree import address
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.loops import saved_for_again
from clockwork_hooks.graph import recorder
from tests.oracle import Judge
from tests.small_unet import Tiny

X = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([900.0, 800.0, 700.0, 600.0])

# Without these nobody can tell whether a call is transformed or run again. (Nor without _get_tracing_state, which
# nn.Module itself asks.)
FLAGS = (
    "_len_torch_dispatch_stack",
    "_functorch.peek_interpreter_stack",
    "_current_graph_task_id",
    "_autograd._top_saved_tensors_default_hooks",
    "_is_fwd_grad_enabled",
)
# Without these there is a second way, or something small is lost. (torch's own classes ask for the other names.)
OTHERS = (
    "torch._C._DisableTorchDispatch",
    "torch._C._set_throw_on_mutable_data_ptr",
    "torch._C._storage_Use_Count",
    "torch.multiprocessing.reductions.StorageWeakRef",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
)


def sampled() -> tuple[str, ch.ClockworkWrapper]:
    """Two trajectories over views of one list of times, judged: nothing is stale."""
    judge = Judge(Tiny())
    with torch.no_grad(), ch.wrap(judge.unet) as cw:
        for _ in range(2):
            for k, t in enumerate(TIMES, 1):
                judge.call(X, t, step=k)
            judge.begin()
    return judge.letters, cw


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@pytest.mark.parametrize("name", FLAGS)
def test_without_a_flag_every_pass_is_full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"torch._C.{name}")
    letters, cw = sampled()
    assert letters == 8 * "F"
    assert cw.stats.reasons == {reasons.UNTOLD: 8}


@pytest.mark.parametrize("name", OTHERS)
def test_without_the_others_the_clock_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled()[0] == "FAFAFAFA"
    monkeypatch.delattr(name)
    assert sampled()[0] == "FAFAFAFA"


def test_without_a_stack_of_their_own_modes_go_onto_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own class asks for these names too: only ours does without them."""
    monkeypatch.setattr(recorder, "dispatch", SimpleNamespace())
    assert sampled()[0] == "FAFAFAFA"
    assert not is_in_torch_dispatch_mode()


def test_without_the_switch_a_hidden_time_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.tensor([t])` in the UNet's forward: the recorder reads its value to link it to the argument."""

    class Hides(Tiny):
        def forward(self, x: Tensor, t: float, c: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(x, torch.tensor([t]), c)

    def depends() -> bool:
        trace = ch.trace(Hides(), X, 7.0)
        return any(node.meta.get("constant") and node.meta.get("after") for node in trace.graph.nodes)

    assert depends()
    monkeypatch.delattr("torch._C._DisableTorchDispatch")
    assert not depends()


def test_storages_have_names_without_a_private_one() -> None:
    """`_cdata` belongs to a class of C, which cannot be taken from it: asked of an object without it."""
    storage: object = object()
    assert address(storage) == id(storage)  # type: ignore[arg-type]
    assert address(TIMES.untyped_storage()) == address(TIMES[2].untyped_storage())


def test_dynamo_without_the_option_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls within a checkpoint cannot be counted then: a clear error, where gradients are on."""

    class Checkpointed(Tiny):
        def forward(self, x: Tensor, t: float, c: Tensor | None = None) -> Tensor:  # type: ignore[override]
            h = self.stem(x) + self.emb(torch.as_tensor(t).reshape(1, 1) / 100).sin()[:, :, None, None]
            z: Tensor = checkpoint(nn.Sequential(self.down, self.act, self.body, self.up), h, use_reentrant=False)
            output: Tensor = self.head(torch.cat([h, z], 1))
            return output

    monkeypatch.delattr("torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint")
    unet = Checkpointed()
    with ch.wrap(unet) as cw:
        cw.compile(backend="eager")
        for t in TIMES[:2]:  # the first passes of each kind run as they are
            unet(X, t)
        with pytest.raises(ch.CompileError, match="one graph"):
            unet(X, TIMES[2])


def test_without_dynamos_run_compiled_passes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells then that no graph fits: modules are looked at before each launch."""
    unet, plain = Tiny(), Tiny()
    with torch.no_grad(), ch.wrap(unet) as cw, ch.wrap(plain):
        monkeypatch.delattr("torch._dynamo.run")
        cw.compile(backend="eager")
        for _ in range(2):
            for t in TIMES:
                torch.testing.assert_close(unet(X, t), plain(X, t))
        assert cw.stats.adaptor_passes == 4


def test_a_checkpoint_that_does_not_say_what_it_holds_is_in_doubt() -> None:
    def pack(x: Tensor) -> Tensor:
        return x

    pack.__module__ = "torch.utils.checkpoint"
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert any(saved_for_again(exits=False))
    assert not saved_for_again(exits=True)

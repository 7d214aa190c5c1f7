"""What every test shares: no network, and one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported, so before any test module

import pytest
import torch

from clockwork_hooks.clock import evidence

# Tiny tensors gain nothing from threads, and on a busy machine lose a hundredfold waiting for each other.
torch.set_num_threads(1)

# Their loops are short, and over plain numbers: written before those were asked for evidence, which costs the first
# adaptor passes. What they test is something else. Take a module out once its loops stand in `with cw.trajectory():`.
_NO_EVIDENCE = (
    "proof",
    "test_adaptive",
    "test_adaptor_files",
    "test_adaptor_values",
    "test_adaptors",
    "test_analysis",
    "test_apart",
    "test_bench",
    "test_calibration",
    "test_calibration_benchmark",
    "test_capture_inputs",
    "test_choice",
    "test_cli",
    "test_companions",
    "test_compile",
    "test_compile_unseen",
    "test_diagram",
    "test_distributed",
    "test_doctor",
    "test_editing",
    "test_embeddings",
    "test_errors",
    "test_evaluation",
    "test_explained",
    "test_faults",
    "test_flops",
    "test_foreign",
    "test_gradients",
    "test_guidance",
    "test_inputs",
    "test_inside",
    "test_keep",
    "test_live_trace",
    "test_macs",
    "test_nested",
    "test_odd_models",
    "test_overhead",
    "test_own_sampler",
    "test_pipelines",
    "test_plans",
    "test_private_names",
    "test_rendering",
    "test_reports",
    "test_residuals",
    "test_restore",
    "test_scaled_adaptor",
    "test_schedule",
    "test_threads",
    "test_trace",
    "test_training",
    "test_training_cli",
    "test_training_runs",
    "test_tuning",
    "test_unseen",
    "test_wrap",
    "test_wrap_pipeline",
    "test_zoo",
)


# They hook into skipped modules, or make loops that cannot be served, to test something else: that one is told of it is
# right, and tested in test_inside.py.
_TOLD = (
    "test_adaptive",
    "test_apart",
    "test_branches",
    "test_capture_inputs",
    "test_calibration",
    "test_choice",
    "test_compile",
    "test_compile_unseen",
    "test_companions",
    "test_conditions",
    "test_editing",
    "test_explained",
    "test_faults",
    "test_given_up",
    "test_gradients",
    "test_guidance",
    "test_hostile_loops",
    "test_inputs",
    "test_interleavings",
    "test_live_trace",
    "test_nested",
    "test_odd_models",
    "test_own_sampler",
    "test_pipelines",
    "test_private_names",
    "test_restore",
    "test_samplers",
    "test_threads",
    "test_timeline",
    "test_unseen",
    "test_weights",
    "test_wrap",
    "test_wrap_pipeline",
    "proof",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of `_TOLD` pass over the two warnings."""
    for item in items:
        module = getattr(item, "module", None)
        if module is not None and module.__name__.rpartition(".")[2] in _TOLD:
            for kind in ("SkippedModuleWarning", "NoEffectWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::clockwork_hooks.{kind}"), append=False)


@pytest.fixture(autouse=True)
def _believe_plain_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.module.__name__.rpartition(".")[2] in _NO_EVIDENCE:
        monkeypatch.setattr(evidence, "EQUAL_STRIDES", 0)

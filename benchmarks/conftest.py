"""What the benchmarks that pytest runs share: a file of results for each, and one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.harness import Results, environment


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    """One file, the module's `OUT`, for all tests of this run, with the module's `COMMAND`."""
    module = request.module
    return Results(module.OUT, {**environment("cpu", 0), "load": os.getloadavg(), "command": module.COMMAND})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of this CPU, and no gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)

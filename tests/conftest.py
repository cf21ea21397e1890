from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Without the native kernel, whether or not it is built here; its own tests switch it on.
os.environ["STRUCTLIN_KERNELS"] = "off"

import pytest
import torch

from structlin.runtime import machines

torch.set_num_threads(1)  # the tests run in several processes


@pytest.fixture(autouse=True)
def _shipped_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Plan by the shipped record of `planner.CPU`, whatever this machine is, and leave its own records alone."""
    monkeypatch.setattr(machines, "_path", lambda device: tmp_path / f"machine-{device.type}.json")
    monkeypatch.setattr(machines, "processor", lambda: "x86_64")
    machines._machine.cache_clear()
    yield
    machines._machine.cache_clear()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

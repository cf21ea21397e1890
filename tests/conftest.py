from __future__ import annotations

import os

# Without the native kernel, whether or not it is built here; its own tests switch it on.
os.environ["STRUCTLIN_KERNELS"] = "off"

import pytest
import torch

torch.set_num_threads(1)  # the tests run in several processes


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

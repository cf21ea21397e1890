"""Rounds of compress, save and load leave nothing behind."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
from torch import nn

import structlin

PAGE = 4096  # B
STATM = Path("/proc/self/statm")


def resident() -> int:
    """Memory of this process, in B."""
    return int(STATM.read_text().split()[1]) * PAGE


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
def test_memory_stays_flat(attack, tmp_path):
    """From the tenth round on, objects do not grow in number, nor memory by more than 8 MiB."""
    dense = nn.Sequential(*(nn.Linear(96, 96) for _ in range(4)))
    seen = []
    for number in attack.rounds(14, 200):
        model = copy.deepcopy(dense)
        structure = attack.random.choice(("lowrank", "monarch", "kronecker"))
        structlin.compress_model(model, structure, ratio=0.5, skip_last=False)
        structlin.save(model, tmp_path / "checkpoint")
        loaded = structlin.load(copy.deepcopy(dense), tmp_path / "checkpoint")
        del model, loaded
        gc.collect()
        if number >= 10:
            seen.append((len(gc.get_objects()), resident()))
        attack.count("rounds")
    assert abs(seen[-1][0] - seen[0][0]) < 200
    assert seen[-1][1] - seen[0][1] < 8 * 2**20

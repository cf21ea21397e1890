"""Attacks with random input: a few seconds each by default, at full length by `pytest -m fuzz tests/fuzz`.

The seed is 0 by default and drawn at full length; each failure prints it with its round. STRUCTLIN_FUZZ=seed or
STRUCTLIN_FUZZ=seed:round repeats a run or one round of it. STRUCTLIN_FUZZ_LOG names a file that gets one JSON line
per attack that passed: name, seed, rounds, seconds, and how often each outcome was counted.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

PASSED = pytest.StashKey[bool]()


@dataclass
class Attack:
    """The random numbers of one attack, and what its rounds came to."""

    seed: int
    only: int | None  # this round alone
    long: bool
    random: random.Random = field(default_factory=random.Random)
    done: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def rounds(self, short: int, long: int) -> Iterator[int]:
        """Yield the number of each round, with random numbers that follow from seed and round alone."""
        for number in range(long if self.long else short) if self.only is None else (self.only,):
            self.random.seed(f"{self.seed}:{number}")
            torch.manual_seed(self.random.getrandbits(32))
            print(f"STRUCTLIN_FUZZ={self.seed}:{number}", flush=True)  # pytest shows it of a failed test
            yield number
            self.done += 1

    def count(self, outcome: str, number: int = 1) -> None:
        """Count an outcome; those that must not be are failures, not counts."""
        self.counts[outcome] += number


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("fuzz")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture
def attack(request: pytest.FixtureRequest) -> Iterator[Attack]:
    long = "fuzz" in request.config.option.markexpr
    seed, _, only = os.environ.get(
        "STRUCTLIN_FUZZ", str(random.SystemRandom().getrandbits(32) if long else 0)
    ).partition(":")
    made, start = Attack(int(seed), int(only) if only else None, long), time.perf_counter()
    yield made
    log = os.environ.get("STRUCTLIN_FUZZ_LOG")
    if log and request.node.stash[PASSED]:
        line = {"attack": request.node.name, "seed": made.seed, "rounds": made.done, "counts": made.counts}
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"seconds": round(time.perf_counter() - start, 1)}) + "\n")

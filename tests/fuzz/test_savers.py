"""Savers that are killed, several at once beside readers, and on full disks: nothing is lost, nothing is mixed.

One process imports torch, and every saver and reader is a fork of it: a round takes milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from structlin import LowRankLinear
from structlin.checkpoint import CheckpointError, load, save, verify
from structlin.checkpoint._directory import PREVIOUS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SHARD_BYTES = (200, 10**6)  # three shards, or one file
CHANGES = 60  # of names in a save, about
REFUSALS = ("is being saved by", "is what another save leaves behind", "FileNotFoundError")  # "." replaced by others
CONFIG = '{"model_type": "mine"}'


def model(value: float) -> nn.Sequential:
    """All parameters have one value, so that a mixture of two saves shows."""
    found = nn.Sequential(LowRankLinear(8, 8, rank=2), nn.Linear(8, 8))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.fill_(value)
    return found


def value_in(path: str | Path, *, check_hashes: bool = True) -> float:
    found = load(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), path, check_hashes=check_hashes)
    values = {float(entry) for tensor in found.state_dict().values() for entry in tensor.flatten()}
    assert len(values) == 1, f"a mixture of {sorted(values)}"
    return values.pop()


# In the process that forks -------------------------------------------------------------------------------------------


def serve() -> None:
    """Run rounds that stdin names in JSON, and print what came of each."""
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # it matters to power cuts only, and takes most of the time
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(globals()[name](**arguments)), flush=True)


def forked(run: Callable[[], Any]) -> tuple[int, int]:
    """Start a fork; return its id, and a handle from which its result can be read."""
    out, into = os.pipe()
    child = os.fork()
    if child:
        os.close(into)
        return child, out
    try:
        with suppress(BaseException):
            try:
                result = run()
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            os.write(into, json.dumps(result).encode())
    finally:
        os._exit(0)


def result_of(child: int, out: int) -> Any:
    with open(out, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else "killed"


def saving(path: str, value: float, inside: bool, shard_bytes: int) -> str:
    while inside and not _entered(path):
        pass  # it has no name between two renames
    save(model(value), "." if inside else path, max_shard_bytes=shard_bytes)
    return "saved"


def _entered(path: str) -> bool:
    with suppress(FileNotFoundError):
        os.chdir(path)
        return True
    return False


def kill(path: str, value: float, inside: bool, shard_bytes: int, at: int, delay: float) -> Any:
    """Kill a saver before its at-th change of a name, or some seconds after its start if that is 0."""

    def run() -> str:
        if at:
            _die_at(at)
        return saving(path, value, inside, shard_bytes)

    child, out = forked(run)
    if not at:
        time.sleep(delay)
        os.kill(child, 9)
    return result_of(child, out)


def _die_at(at: int) -> None:
    left = [at]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), 9)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "mkdir", "link", "unlink", "rmdir", "fsync"):
        setattr(os, name, dying(getattr(os, name)))


def fill_disk(path: str, value: float, inside: bool, shard_bytes: int, limit: int) -> Any:
    """Save where no file can be longer than a limit."""

    def run() -> str:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return saving(path, value, inside, shard_bytes)

    return result_of(*forked(run))


def race(path: str, savers: list[dict[str, Any]], readers: list[dict[str, Any]], seed: int) -> Any:
    """Save and read at once; return what each save and each read came to."""

    def outcomes(runs: Iterator[Callable[[], Any]], pauses: random.Random) -> list[Any]:
        found = []
        for run in runs:
            time.sleep(pauses.uniform(0, 0.003))
            try:
                found.append(run())
            except CheckpointError as error:
                found.append(str(error))
        return found

    def many_saves(values: list[float], **options: Any) -> list[Any]:
        runs = (lambda value=value: [saving(path, value, **options), value] for value in values)
        return outcomes(runs, random.Random(f"{seed}{values}"))

    def many_reads(times: int, check_hashes: bool, number: int) -> list[Any]:
        def read() -> Any:
            verify(path, check_hashes=check_hashes)
            return value_in(path, check_hashes=check_hashes)

        return outcomes((read for _ in range(times)), random.Random(f"{seed}reader{number}"))

    begun = [forked(lambda options=options: many_saves(**options)) for options in savers]
    begun += [forked(lambda options=options: many_reads(**options)) for options in readers]
    results = [result_of(*one) for one in begun]
    return results[: len(savers)], results[len(savers) :]


# In the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    """Runs one of the functions above in the process that forks."""
    command = [sys.executable, "-c", f"import {__name__}; {__name__}.serve()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin
        assert process.stdout

        def run(function: Callable[..., Any], **arguments: Any) -> Any:
            process.stdin.write(json.dumps([function.__name__, arguments]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = save(model(0), tmp_path / "out")
    (path / "config.json").write_text(CONFIG)
    return path


def check_at_rest(saved: Path) -> None:
    assert os.listdir(saved.parent) == ["out"]
    assert (saved / "config.json").read_text() == CONFIG
    assert not [name for name in os.listdir(saved) if name.startswith(".")]


def test_savers_that_are_killed(attack, ask, saved):
    old, chance = 0.0, attack.random
    for number in attack.rounds(30, 400):
        new = old + 1
        about = {"path": str(saved), "inside": chance.random() < 0.5 and saved.exists()}
        at, delay = (chance.randint(1, CHANGES), 0.0) if chance.random() < 0.7 else (0, chance.uniform(0, 0.03))
        found = ask(kill, value=new, shard_bytes=chance.choice(SHARD_BYTES), at=at, delay=delay, **about)
        if "structlin-previous is the checkpoint" in found:
            found = "refused"
        assert found in ("killed", "saved", "refused"), found
        value = value_in(saved, check_hashes=chance.random() < 0.5)
        possible = {"killed": (old, new), "saved": (new,), "refused": (old,)}[found]
        assert value in possible, f"lost: {value} after {old}, {new} {found}"
        attack.count(f"{found}, {'old' if value == old else 'new'} there")
        if chance.random() < 0.1 and set(os.listdir(saved.parent)) == {"out"} and not (saved / PREVIOUS).exists():
            saved.rename(saved.with_name(".out.structlin-previous"))  # as a kill between the two renames, which is rare
        if chance.random() < 0.3 and not saved.exists():
            saved.mkdir()
            attack.count("a new folder in its place")
            assert value_in(saved) == value
        if chance.random() < 0.3 and (saved.exists() or not about["inside"]):
            about["inside"] = False
            full = ask(fill_disk, value=-1.0, shard_bytes=200, limit=chance.randint(0, 150), **about)
            assert "cannot be written" in full, full
            attack.count("then a full disk")
            assert value_in(saved) == value
        if chance.random() < 0.3:  # else the next kill meets what this one left
            value = float(number + 10**6)
            save(model(value), saved, max_shard_bytes=chance.choice(SHARD_BYTES))
            assert value_in(saved) == value
            check_at_rest(saved)
        old = value


@pytest.mark.parametrize("count", [2, 4])
def test_savers_at_once_beside_readers(count, attack, ask, saved):
    chance, before = attack.random, 0.0
    for number in attack.rounds(6, 1000):
        values = [[float(number * 100 + saver * 10 + k) for k in range(1, 4)] for saver in range(count)]
        savers = [
            {"values": v, "inside": chance.random() < 0.2, "shard_bytes": chance.choice(SHARD_BYTES)} for v in values
        ]
        readers = [
            {"times": 4, "check_hashes": chance.random() < 0.5, "number": k} for k in range(chance.randint(1, 2))
        ]
        saves, reads = ask(race, path=str(saved), savers=savers, readers=readers, seed=attack.seed * 10**6 + number)
        done = []
        for outcome in (outcome for one in saves for outcome in one):
            if outcome[0] == "saved":
                done.append(outcome[1])
                attack.count("saved")
            else:
                reason = next((text for text in REFUSALS if text in outcome), None)
                assert reason, outcome
                attack.count(f"refused: {reason}")
        for outcome in (outcome for one in reads for outcome in one):
            if isinstance(outcome, str):
                assert "replaced while it was read" in outcome, reads
            else:
                assert outcome in {before, *(value for one in values for value in one)}, reads
            attack.count("gave up reading" if isinstance(outcome, str) else "read")
        assert done
        before = value_in(saved)
        assert before in done
        check_at_rest(saved)


def test_full_disks(attack, ask, saved):
    chance = attack.random
    for _ in attack.rounds(8, 50):
        shutil.rmtree(saved)
        save(model(0), saved, max_shard_bytes=chance.choice(SHARD_BYTES))
        (saved / "config.json").write_text(CONFIG)
        before = {path.name: path.read_bytes() for path in saved.iterdir()}
        limit = chance.randint(0, 800)
        shard_bytes, inside = chance.choice(SHARD_BYTES), chance.random() < 0.5
        found = ask(fill_disk, path=str(saved), value=1.0, inside=inside, shard_bytes=shard_bytes, limit=limit)
        if found == "saved":
            assert value_in(saved) == 1
        else:
            named = any(f"too large: '{name}" in found for name in ("model", "structlin.json", ".out.structlin-lock"))
            assert found.startswith("CheckpointError: "), found
            assert named, found
            assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
        attack.count("saved" if found == "saved" else "refused, as it was")
        check_at_rest(saved)

"""Whatever happened to a file of the cache, layers compute what they should, with one warning at most that names it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from structlin.runtime import kernels
from structlin.runtime.planner import CPU

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, owners and modes are those of POSIX")
OTHER, THIRD = 12345, 54321  # users

# Runs a layer in a new process for each line of input (folder, user), and prints what happened. The kernel and the
# record are looked for after the fork; what Python imports late is imported before, as users may not read its files.
SERVER = """
import json, os, sys, warnings
import torch
from structlin import LowRankLinear, kernels
from structlin.runtime import machines

def run():
    torch.manual_seed(0)
    layer = LowRankLinear(16, 20, rank=3)
    dense = layer.left @ layer.right
    inputs = [torch.randn(rows, 16) for rows in (1, 40)]
    return all(torch.allclose(layer(x), x @ dense.T + layer.bias, atol=1e-5) for x in inputs)

os.environ["STRUCTLIN_KERNELS"] = "off"
run()
machines._machine.cache_clear()
os.environ["STRUCTLIN_KERNELS"] = "on"
kernels.native._State.usable = None
stem = kernels.native._stem()
kernels.native._stem = lambda: stem
path = machines._path(torch.device("cpu")).name
print(json.dumps(path), flush=True)
for line in sys.stdin:
    folder, user = json.loads(line)
    child = os.fork()
    if not child:
        os.environ["STRUCTLIN_CACHE"] = folder
        try:
            os.seteuid(user)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = {"right": run(), "kernel": kernels.available()}
            found["said"] = [str(warning.message) for warning in said]
        except BaseException as error:
            found = {"raised": repr(error)}
        print(json.dumps(found), flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(json.dumps({"signal": status}), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="module")
def record_name(server: subprocess.Popen[str]) -> str:
    assert server.stdout
    return json.loads(server.stdout.readline())


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty cache whose parents every user may enter, unlike those of tmp_path."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made) / "cache"


def asked(server: subprocess.Popen[str], folder: Path, user: int) -> dict[str, Any]:
    assert server.stdin
    assert server.stdout
    print(json.dumps([str(folder), user]), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


# Mutations -----------------------------------------------------------------------------------------------------------


def cut(content: bytes, numbers: random.Random) -> bytes:
    return content[: numbers.choice([0, 1, numbers.randrange(len(content)), len(content) // 2, len(content) - 1])]


def flipped(content: bytes, numbers: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(numbers.choice([1, 1, 2, 50])):
        found[numbers.randrange(len(found))] ^= 1 << numbers.randrange(8)
    return bytes(found)


def zeroed(content: bytes, numbers: random.Random) -> bytes:
    begin = numbers.choice([0, len(content) // 2, numbers.randrange(len(content))])
    end = numbers.choice([len(content), len(content) // 2, begin + 4096])
    return content[:begin] + bytes(max(0, min(end, len(content)) - begin)) + content[max(begin, end) :]


def longer(content: bytes, numbers: random.Random) -> bytes:
    return content + numbers.randbytes(numbers.randint(1, 100))


def noise(content: bytes, numbers: random.Random) -> bytes:
    return numbers.randbytes(numbers.randint(1, 5000))


def other_value(content: bytes, numbers: random.Random) -> bytes:
    """A record with another value, or a field more or less."""
    fields = json.loads(content)
    name = numbers.choice([*fields, "more"])
    values = [None, 0, -1, 1e-320, 1e308, 10**400, float("inf"), float("nan"), True, "1", "", [], {}, [[1]], 0.5, 7]
    fields[name] = numbers.choice(values)
    if numbers.random() < 0.2:
        fields.pop(numbers.choice(list(fields)))
    return json.dumps(numbers.choice([fields, fields, fields, list(fields), fields.get(name)])).encode()


def by_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def by_link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("elsewhere")))


def by_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def writable(path: Path) -> None:
    path.chmod(0o622)


def writable_folder(path: Path) -> None:
    path.parent.chmod(0o1777)


def foreign(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def foreign_folder(path: Path) -> None:
    os.chown(path.parent, OTHER, OTHER)


BYTES = (cut, flipped, zeroed, longer, noise)
PLACES: tuple[Callable[[Path], None], ...] = (by_folder, by_link, by_nothing, by_pipe, writable, writable_folder)
PLACES += (foreign, foreign_folder) * (os.geteuid() == 0 if os.name == "posix" else 0)


def mutated(path: Path, numbers: random.Random, more: tuple[Callable[[bytes, random.Random], bytes], ...] = ()) -> str:
    """Change the file's content, or what stands in its place, or who may write it; return how."""
    if numbers.random() < 0.6:
        mutate = numbers.choice(BYTES + more)
        path.write_bytes(mutate(path.read_bytes(), numbers))
        return mutate.__name__
    place = numbers.choice(PLACES)
    place(path)
    return place.__name__


def judged(found: dict[str, Any], path: Path, how: str) -> bool:
    """Check that a forward pass was right and that a warning, if there was one, names the file or its folder."""
    assert found.get("right") is True, (how, found)
    assert len(found["said"]) <= 1, (how, found)
    assert all(str(path) in said or f"{path.parent} " in said for said in found["said"]), (how, found)
    return bool(found["said"])


# Attacks -------------------------------------------------------------------------------------------------------------


def test_records(attack, server, record_name, folder):
    for number in attack.rounds(25, 300):
        path = folder / str(number) / record_name
        path.parent.mkdir(parents=True, mode=0o755)
        path.write_text(json.dumps(asdict(CPU) | {"name": "measured"}))
        path.chmod(0o644)
        if os.geteuid() == 0 and attack.random.random() < 0.1:  # another user looks, who may enter the folder or not
            closed = attack.random.random() < 0.5
            path.parent.chmod(0o700 if closed else 0o755)
            os.chown(path.parent, THIRD, THIRD)
            assert judged(asked(server, path.parent, OTHER), path, "another user") == (not closed)
            attack.count("another user, folder closed" if closed else "another user, refused")
            continue
        before = path.read_bytes()
        how = mutated(path, attack.random, (other_value,) * 5)
        warned = judged(asked(server, path.parent, os.geteuid()), path, how)
        # The other two may give another good record.
        assert warned or how in ("flipped", "other_value") or path.read_bytes() == before, how
        attack.count(f"{how}, {'refused' if warned else 'used'}")


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return kernels.build()
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])


def test_libraries(attack, server, record_name, folder, library):
    for number in attack.rounds(8, 60):
        path = folder / str(number) / library.name
        path.parent.mkdir(parents=True, mode=0o755)
        shutil.copy2(library, path)
        how = mutated(path, attack.random)
        changed = how in {place.__name__ for place in PLACES} or path.read_bytes() != library.read_bytes()
        found = asked(server, path.parent, os.geteuid())
        assert judged(found, path, how) == changed, (how, found)
        assert found["kernel"] != changed, (how, found)
        attack.count(f"{how}, {'refused' if changed else 'as it was'}")

"""Damaged and forged checkpoints and plans: loaded right or refused in few words, soon, and with nothing changed."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ONE
from safetensors.torch import load_file
from torch import Tensor, nn

import structlin
from structlin import Compression, CompressionPlan
from structlin.compress.plan import PlanEntry
from structlin.layers.expert_linear import StructuredExpertLinear
from structlin.layers.linear import build
from structlin.structures import PHM, Kaleidoscope, Kronecker, LowRank, Monarch, Sum, TensorTrain

SECONDS = 2  # of this process, for one file
EXTRA = 64 * 2**20  # B beside three times the file
MESSAGE = 2000


# What is saved -------------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Sums in sums, a shared layer, tied weights and a stack of experts."""

    def __init__(self, structured: bool) -> None:
        super().__init__()
        inner = Sum((LowRank(rank=1), Sum((Monarch(blocks=2), LowRank(rank=2)))))
        self.first = made(structured, inner, 8, 6)
        self.again = self.first
        self.tied = made(structured, LowRank(rank=2), 8, 6, bias=False)
        if structured:
            self.tied.right = self.first.part_1_part_1_right
        self.experts = StructuredExpertLinear(2, 4, 4, structure=LowRank(rank=2 if structured else 1))


class Chain(nn.Module):
    """One layer after another: structures with numbers of all kinds, complex, integer and empty tensors."""

    def __init__(self, structured: bool) -> None:
        super().__init__()
        structures = (
            Kronecker(terms=2), TensorTrain(rank=2, cores=2), Kaleidoscope(width=2), PHM(algebra="hamilton"),
        )  # fmt: skip
        self.layers = nn.Sequential(*(made(structured, structure, 8, 8) for structure in structures))
        self.complex = made(structured, LowRank(rank=1), 4, 4, dtype=torch.complex64)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.head.weight
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("flags", torch.tensor([True, False]))


def made(structured: bool, structure: Any, *sizes: int, bias: bool = True, **options: Any) -> nn.Module:
    return build(structure, *sizes, bias, **options) if structured else nn.Linear(*sizes, bias, **options)


@dataclass
class Source:
    """A saved model: its files, and what a skeleton then holds."""

    make: Callable[[bool], nn.Module]
    files: dict[str, bytes]
    state: dict[str, Tensor]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    torch.manual_seed(0)
    found = []
    for make in (Mixture, Chain):
        model = make(True)
        for shard_bytes in (2**30, 300):
            path = tmp_path_factory.mktemp("saved") / "out"
            metadata = {"words": ["a", "b"], "nested": {"number": 1.5, "none": None}}
            structlin.save(model, path, max_shard_bytes=shard_bytes, compression=plan(), metadata=metadata)
            files = {file.name: file.read_bytes() for file in path.iterdir()}
            found.append(Source(make, files, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    return found


def plan() -> CompressionPlan:
    """An entry for each structure, and two layers that stay dense."""
    entries = [PlanEntry(kind, (f"also {kind}",), 16, 12, one.resolve(16, 12), count=2) for kind, one in ONE.items()]
    entries += [
        PlanEntry("smaller", (), 16, 12, ONE["dense"], sizes=(8, 12)),
        PlanEntry("skipped", (), 5, 5, None, "too small", refine=3),
    ]
    return CompressionPlan("lowrank", ratio=0.5, entries=tuple(entries))


# Mutations of JSON ---------------------------------------------------------------------------------------------------


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


def other_kind(rng: random.Random) -> dict[str, Any]:
    """A structure as structlin.json writes it, or as a plan does."""
    one = rng.choice(list(ONE.values())).resolve(16, 12)
    record = structlin.equation.structure.to_record(one)
    if rng.random() < 0.5:
        return record
    return {"kind": record.pop("kind"), "hyperparameters": record}


NAMES = ("", "x", "__init__", "__class__.x", "a..b", "0", "model.safetensors", "../x", "/etc/passwd", "x" * 5000, "\0")
NUMBERS = (
    -1, 0, 1, 2, 3, 7, 64, 1000, 10**6, 2**31 - 1, 2**31, 2**63, 10**400, -(2**31), 0.5, 1.0, 1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
VALUES = (
    None, True, False, [], {}, [1], [2, 2], [-1, 8], [[1, 2], [3, 4]], [2**31] * 64, [8] * 65, {"kind": "tt"},
    "learned", "hamilton", "reshape", "float64", "int8", "sum", "dense", "re:(", "x" * 100_000, *NAMES, *NUMBERS,
)  # fmt: skip


def mutate_json(document: Any, rng: random.Random) -> None:
    """Change one place of JSON data."""
    places = list(paths(document))
    if not places:
        return
    first = rng.choice(sorted({path[0] for path in places}, key=str))  # a table of many rows gets no more than others
    path = rng.choice([path for path in places if path[0] == first])
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]
    action = rng.randrange(8)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[rng.choice((*NAMES, *parent))] = parent.pop(key)
    elif action == 2 and isinstance(value, (int, float)):
        parent[key] = rng.choice(NUMBERS) if rng.random() < 0.5 else value + rng.choice((-1, 1, 0.5, 1000))
    elif action == 3:
        parent[key] = nested(rng.choice((5, 31, 40, 200)))
    elif action == 4:
        parent[key] = other_kind(rng)
    elif action == 5:
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], value
    elif action == 6:
        parent[key] = [value] * rng.choice((1, 2, 65, 3000)) if rng.random() < 0.5 else {"x": value}
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))


def mutated_json(text: bytes, rng: random.Random) -> bytes:
    document = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate_json(document, rng)
    found = json.dumps(document)
    if rng.random() < 0.1:
        found = found.replace("1", rng.choice(("1e999", "-0", "01", "1" * 5000)), 1)
    if rng.random() < 0.1 and ": " in found:  # one key twice
        at = found.index('"')
        found = found[:at] + found[at:].replace('"', f'"{rng.choice(list(document) or ["x"])}": 1, "', 1)
    return found.encode()


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    # Half of the positions in the first bytes: a header, or the top of the manifest.
    at = rng.randrange(min(len(found), 300 if rng.random() < 0.5 else len(found)))
    action = rng.randrange(6)
    if action == 0:
        del found[at:]
    elif action == 1:
        for _ in range(rng.choice((1, 1, 8))):
            found[rng.randrange(at, len(found))] ^= 1 << rng.randrange(8)
    elif action == 2:
        found[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif action == 3:
        found[:8] = rng.choice([0, 1, 2**20, 2**25 + 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
    elif action == 4:
        found[at : at + 64] = bytes(len(found[at : at + 64]))
    else:
        found += rng.choice((found[at:], b"\0" * 100, b" "))
    return bytes(found)


def mutated_header(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    text = mutated_json(data[8 : 8 + size], rng)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# Checkpoints ---------------------------------------------------------------------------------------------------------


def mutated_files(files: dict[str, bytes], rng: random.Random) -> tuple[dict[str, bytes], str]:
    """Change the files of a checkpoint in one way; return its name too."""
    found = dict(files)
    tables = [name for name in files if name.endswith(".json")]
    name = rng.choice(sorted(files))
    shard = rng.choice(sorted(set(files) - set(tables)))
    action = rng.choice(
        ("bytes", "json", "json", "json", "header", "forged header", "forged", "data", "forged data", "files")
    )
    if action == "bytes":
        found[name] = mutated_bytes(files[name], rng)
    elif action == "json":
        name = rng.choice(["structlin.json"] * 4 + tables)
        found[name] = mutated_json(files[name], rng)
    elif action == "files":
        other = rng.choice(sorted(files))
        found[name], found[other] = found[other], found[name]
        if rng.random() < 0.5:
            del found[name]
    elif action in ("data", "forged data"):
        start = 8 + int.from_bytes(files[shard][:8], "little")
        data = bytearray(files[shard])
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
        found[shard] = bytes(data)
    else:
        found[shard] = (mutated_header if "header" in action else mutated_bytes)(files[shard], rng)
    if action.startswith("forged"):
        manifest = json.loads(found["structlin.json"])
        manifest["shards"][shard] = hashlib.sha256(found[shard]).hexdigest()
        found["structlin.json"] = json.dumps(manifest).encode()
    return found, action


def held(model: nn.Module) -> list[tuple[str, object, int, Tensor | None]]:
    """Every module and tensor of a model, by identity, with a copy of the tensors."""
    modules = [(name, module, 0, None) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules + [(name, tensor, tensor._version, tensor.detach().clone()) for name, tensor in tensors]


def assert_unchanged(model: nn.Module, before: list[tuple[str, object, int, Tensor | None]]) -> None:
    now = held(model)
    assert [(name, id(item), version) for name, item, version, _ in now] == [
        (name, id(item), version) for name, item, version, _ in before
    ]
    assert all(new is old is None or torch.equal(new, old) for (*_, new), (*_, old) in zip(now, before, strict=True))


def content(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().clone().contiguous().flatten().view(torch.uint8).tolist())


def in_files(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor by name, read with nothing of ours."""
    manifest = json.loads((path / "structlin.json").read_text())
    stored: dict[str, Tensor] = {}
    for shard in manifest["shards"]:
        stored |= load_file(path / shard)
    return {name: content(stored[manifest["aliases"].get(name, name)]) for name in (*stored, *manifest["aliases"])}


def outcome_of(read: Callable[[], Any], size: int, measured: bool) -> Any:
    """Return what reading gives, or its error: of the documented kind, short, soon, and in little memory."""
    if measured:
        tracemalloc.start()
    start = time.process_time()
    try:
        found = read()
    except ValueError as error:
        found = error
    assert not isinstance(found, ValueError) or len(str(found)) <= MESSAGE
    assert time.process_time() - start < SECONDS * (5 if measured else 1)
    if measured:
        assert tracemalloc.get_traced_memory()[1] < 3 * size + EXTRA
        tracemalloc.stop()
    return found


def test_damaged_checkpoints(attack: Any, sources: list[Source], tmp_path: Path) -> None:
    skeletons: dict[int, nn.Module] = {}
    for number in attack.rounds(130, 12_000):
        source = sources[number % len(sources)]
        files, action = mutated_files(source.files, attack.random)
        path = tmp_path / "out"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
        skeleton = skeletons.setdefault(number % len(sources), source.make(False))
        before = held(skeleton)
        size, measured = sum(map(len, files.values())), number % 50 == 0
        found = outcome_of(lambda p=path, s=skeleton: structlin.load(s, p), size, measured)
        verified = outcome_of(lambda p=path: structlin.verify(p), size, measured)
        if isinstance(found, ValueError):
            assert type(found) is structlin.CheckpointError, repr(found)
            assert_unchanged(skeleton, before)
            attack.count(f"{action}: refused" + ("" if isinstance(verified, ValueError) else " by load alone"))
            continue
        del skeletons[number % len(sources)]
        assert not isinstance(verified, ValueError), "loaded, but not verified"
        values = {name: content(tensor) for name, tensor in found.state_dict().items()}
        assert values == in_files(path)
        same = values == {name: content(tensor) for name, tensor in source.state.items()}
        assert same or action.startswith("forged")
        attack.count(f"{action}: loaded" + ("" if same else ", as forged"))


# Plans ---------------------------------------------------------------------------------------------------------------


def test_damaged_plans(attack: Any) -> None:
    settings = Compression("lowrank", ratio=0.5, rules={"0": Kronecker(terms=2), "re:[12]": {"ratio": 0.25}, "*": None})
    whole = plan()
    for number in attack.rounds(250, 4000):
        original = (
            settings if number % 4 == 0 else replace(whole, entries=tuple(attack.random.sample(whole.entries, 4)))
        )
        text = original.to_json().encode()
        bits = attack.random.random() < 0.3
        text = (mutated_bytes if bits else mutated_json)(text, attack.random)
        decoded = text.decode(errors="replace")

        def read(original: Compression = original, decoded: str = decoded) -> Compression:
            found = type(original).from_json(decoded)
            assert str(found)  # tables count the parameters of every layer
            return found

        found = outcome_of(read, len(text), number % 50 == 0)
        if isinstance(found, ValueError):
            attack.count("refused")
            continue
        assert type(found).from_json(found.to_json()) == found
        attack.count("read" if found == original else "read, otherwise")

"""What a file may ask of its reader: small files are refused at once, large honest ones are read."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ONE
from torch import nn

import structlin
from structlin.checkpoint import CheckpointError, _manifest, bounded, load, save, verify
from structlin.checkpoint.table import read_table
from structlin.equation.structure import Structure, hyperparameters, least_factors
from structlin.layers.linear import build
from structlin.structures import GLT, Kaleidoscope, KroneckerChain, LowRank, Sum

IN, OUT = 16, 12
VOCABULARY = 250_000


def document(layers: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A structlin.json, and nothing to name the tensors otherwise."""
    empty: dict[str, Any] = {"shared_layers": {}, "aliases": {}, "complex": [], "sentinels": [], "metadata": {}}
    versions = {"format_version": 1, "structlin_version": "0.1.0"}
    return {**versions, "layers": layers or {}, **empty, "shards": {"model.safetensors": "0" * 64}, **fields}


def write(path: Path, manifest: Any, header: Any = None, data: bytes = b"") -> Path:
    text = json.dumps(header or {}).encode()
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (path / "structlin.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    return path


def layer(kind: str, **fields: Any) -> dict[str, Any]:
    sizes = {"in_features": IN, "out_features": OUT}
    return {"kind": kind, "hyperparameters": fields, **sizes, "bias": False, "dtype": "float32"}


def slowness() -> float:
    """How many times longer JSON takes here than the 0.2 s of the machine on which the limits were chosen."""
    start = time.process_time()
    json.loads("[" + "[]," * 2**20 + "[]]")
    return max(1, (time.process_time() - start) / 0.2)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """CPU time, as the machine may do other things; more of it where the machine is slow at the moment."""
    start = time.process_time()
    yield
    used = time.process_time() - start
    assert used < seconds or used < seconds * slowness()


@contextmanager
def refused(message: str, seconds: float = 2) -> Iterator[None]:
    with within(seconds), pytest.raises(CheckpointError, match=message) as caught:
        yield
    assert len(str(caught.value)) <= 2000


# Factors are counted before they are built ---------------------------------------------------------------------------


def edited(structure: Structure, name: str, value: Any) -> dict[str, Any]:
    """The table entry of a structure with another value of one hyperparameter."""
    document = structlin.checkpoint.table.table_of(nn.Sequential(build(structure, IN, OUT, False, device="meta")))
    document["layers"]["0"]["hyperparameters"][name] = value
    return document


FIELDS = [(kind, name) for kind, one in ONE.items() for name in hyperparameters(one)]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_no_number_takes_long_where_a_vocabulary_warrants_it(kind: str, name: str) -> None:
    structure = ONE[kind].resolve(IN, OUT)
    for value in (VOCABULARY, [VOCABULARY], [VOCABULARY] * 64, [[VOCABULARY] * 64] * 60, -VOCABULARY):
        with within(0.5), pytest.raises(CheckpointError) as caught:
            raise_or_read(edited(structure, name, value))
        assert len(str(caught.value)) <= 2000


def raise_or_read(table: dict[str, Any]) -> None:
    """Some values are right for a table; its tensors would then be missing."""
    read_table(table, VOCABULARY, "the table")
    raise CheckpointError("no tensors")


@pytest.mark.parametrize("side", ["in_features", "out_features"])
@pytest.mark.parametrize("kind", ONE)
def test_no_size_takes_long(kind: str, side: str, tmp_path: Path) -> None:
    table = edited(ONE[kind].resolve(IN, OUT), "x", 0)
    del table["layers"]["0"]["hyperparameters"]["x"]
    for size in (2**31 - 1, 2**31 - 19, 1_999_999_973):
        table["layers"]["0"][side] = size
        with refused("layer '0'", 0.5):
            verify(write(tmp_path / "out", document(table["layers"])))


def test_empty_tensors_warrant_nothing(tmp_path: Path) -> None:
    fields = {"expansion": 1, "radix": None, "in_modes": [4, 4], "out_modes": [3, 4]}
    empty = {"e": {"dtype": "U8", "shape": [2**31 - 1, 0], "data_offsets": [0, 0]}}
    with refused("width: 10000000 exceeds 1024", 0.1):
        verify(write(tmp_path / "empty", document({"0": layer("kmatrix", width=10**7, **fields)}), empty))
    words = {"e": {"dtype": "U8", "shape": [VOCABULARY], "data_offsets": [0, VOCABULARY]}}
    path = write(tmp_path / "words", document({"0": layer("kmatrix", width=VOCABULARY, **fields)}), words)
    with (path / "model.safetensors").open("ab") as file:
        file.write(bytes(VOCABULARY))
    with refused("has 250000 tensors or more; expected up to 128", 0.1):
        verify(path)


def test_repeats_are_the_fields_that_multiply_factors() -> None:
    for one in ONE.values():
        structure = one.resolve(IN, OUT)
        assert least_factors(structure) <= len(structure.spec(IN, OUT).factors)
        assert set(structure.repeats) <= set(hyperparameters(structure))
    parts = (Kaleidoscope(width=5), Sum((LowRank(rank=1), KroneckerChain(depth=7))), GLT(groups=(1, 1)))
    assert least_factors(Sum(parts)) == 5 + 1 + 7 + 1


# Every number stands in the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_missing_hyperparameter_is_not_guessed(kind: str, name: str, tmp_path: Path) -> None:
    model = nn.Sequential(build(ONE[kind].resolve(IN, OUT), IN, OUT))
    path = save(model, tmp_path / "out")
    content = json.loads((path / "structlin.json").read_text())
    fields = content["layers"]["0"]["hyperparameters"]
    assert fields.keys() == hyperparameters(model[0].structure).keys()
    del fields[name]
    (path / "structlin.json").write_text(json.dumps(content))
    with refused(rf"layer '0': hyperparameters \['{name}'\] of {kind} are missing; save again"):
        load(nn.Sequential(nn.Linear(IN, OUT)), path)


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_are_finite(text: str, tmp_path: Path) -> None:
    with refused(f"not valid JSON: {text} is not JSON"):
        verify(write(tmp_path / "out", json.dumps(document(metadata={"a": 7})).replace("7", text)))
    table = edited(ONE["tucker"].resolve(IN, OUT), "tolerance", float(text))
    with refused("layer '0': tolerance: -?(inf|nan) is not finite"):
        read_table(table, 16, "the table")


# Limits --------------------------------------------------------------------------------------------------------------


def sums(depth: int, width: int) -> dict[str, Any]:
    if depth == 0:
        return {"kind": "lowrank", "hyperparameters": {"rank": 1}}
    return {"kind": "sum", "hyperparameters": {"parts": [sums(depth - 1, width)] * width}}


def many(count: int, shape: list[int]) -> dict[str, Any]:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
    return {f"t{number}": entry for number in range(count)}


LONG = "x" * 2**20
HOSTILE: dict[str, tuple[Any, Any, str]] = {
    "lists": ("[" + "[]," * 2**20 + "[]]", {}, "3145728 .*; expected at most 1048576|commas and brackets"),
    "deep": ("[" * 2**20, {}, "nested deeper than 32 levels"),
    "deeper than allowed": ("[" * 33 + "]" * 33, {}, "nested deeper than 32 levels"),
    "keys": ("{" + ",".join(f'"{k:x}":0' for k in range(2**20 - 5)) + "}", {}, "format_version None"),
    "most tensors": (document({"0": layer("lowrank", rank=1)}), many(149_000, [0]), "tensor '0.left' is missing"),
    "more tensors": (document(), many(2**18, [0]), "commas and brackets; expected at most 1048576"),
    "axes": (document(), {"a": {"dtype": "U8", "shape": [0] * 2**19, "data_offsets": [0, 0]}}, "expected up to 64 ax"),
    "sums": (document({"0": layer("sum", parts=[sums(3, 36)])}), {}, "hyperparameters; expected at most 4096"),
    "fewer sums": (document({"0": layer("sum", parts=[sums(2, 12)])}), {}, "has 144 tensors or more; expected up to"),
    "kind": (document({"0": layer(LONG)}), {}, "layer '0': "),
    "field": (document({"0": layer("lowrank", **{LONG: 1})}), {}, "layer '0': lowrank does not take "),
    "field above many": (document({"0": layer("sum", **{LONG: list(range(2**16))})}), {}, "65536 items; expected at"),
    "text": (document({"0": layer("lowrank", rank=LONG)}), {}, "rank: 1048576 letters; expected at most 262144"),
    "layer": (document({LONG: layer("lowrank", rank=1)}), {}, "name 'xxx.* has 1048576 letters; expected at most 1000"),
    "alias": (document(aliases={LONG: "t0"}), many(1, [0]), "name 'xxx.* has 1048576 letters"),
    "aliases": (
        document(aliases={f"a{number}": "t0" for number in range(200_000)}),
        many(1, [0]),
        "200001 names of tensors; expected at most 200000",
    ),
    "aliased": (document(aliases={"t1": LONG}), many(1, [0]), "tensor 't1' is another name of 'xxx"),
    "shared": (document(shared_layers={"a": LONG}), {}, "layer 'a' is another name of 'xxx"),
    "tensor": (document(), {LONG: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, "has 1048576 letters"),
    "parts": (document(), {"." * 2**20: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, "has 1048576 letters"),
    "shard": (document(shards={LONG: ""}), {}, "shard name 'xxx"),
    "version": (document(format_version=LONG), {}, "format_version 'xxx"),
    "dtype": (document({"0": {**layer("lowrank", rank=1), "dtype": LONG}}), {}, "layer '0': dtype 'xxx"),
    "key twice": ("{" + f'"{LONG}": 1, "{LONG}": 2' + "}", {}, "duplicate key 'xxx"),
    "complex": (document(complex=[LONG]), {}, "complex tensors"),
    "sentinel": (document(sentinels=[LONG]), {}, "sentinel 'xxx"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_soon_and_in_few_words(name: str, tmp_path: Path) -> None:
    manifest, header, message = HOSTILE[name]
    path = write(tmp_path / "out", manifest, header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(message):
        verify(path)
    size = sum(file.stat().st_size for file in path.iterdir())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert used * 1024 < 3 * size + 256 * 2**20


def test_a_header_that_is_longer_than_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "out", document())
    with (path / "model.safetensors").open("r+b") as file:
        file.write((bounded.BYTES + 1).to_bytes(8, "little"))
        file.truncate(bounded.BYTES + 100)
    with refused("a header of 33554433 B; expected at most 33554432 B", 0.1):
        verify(path)


def test_shards_that_have_too_many_tensors_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    path = save(model, tmp_path / "out", max_shard_bytes=30)
    monkeypatch.setattr(structlin.checkpoint.tensors, "MOST_TENSORS", 3)
    with refused("more than 3 tensors"):
        verify(path)


def test_messages_keep_their_ends() -> None:
    error = CheckpointError("begin " + LONG + " end")
    assert len(str(error)) <= 2000
    assert str(error).startswith("begin ")
    assert str(error).endswith(" end")
    assert bounded.shortened("x" * 2000) == "x" * 2000


@pytest.mark.slow
def test_a_large_checkpoint_is_within_the_limits(tmp_path: Path) -> None:
    """400 structured layers and 100,000 tensors, in 20 shards."""
    model = nn.Module()
    for number in range(400):
        model.register_module(f"layer_{number}", structlin.LowRankLinear(2, 2, False, rank=1))
    word = torch.zeros(0)
    name = "transformer.h.{}.mlp.experts.{}.down_proj.weight".replace(".", "_")
    for number in range(100_000 - 800):
        model.register_buffer(name.format(number // 256, number % 256), word.clone())
    manifest = {"layers": {}, "settings": ["x" * 1000] * 400}
    path = structlin.save(model, tmp_path / "out", metadata=manifest, max_shard_bytes=200)
    with within(4):
        summary = verify(path)
    assert len(summary.layers) == 400
    assert len(summary.shards) > 10


def test_many_long_chains_are_refused_before_their_equations_are_written() -> None:
    chain = {"kind": "kronchain", "hyperparameters": {
        "terms": 1, "depth": 100, "in_modes": [4, 4], "out_modes": [4, 4],
    }}  # fmt: skip
    layer = chain | {"in_features": 16, "out_features": 16, "bias": False, "dtype": "float32"}
    assert len(_manifest.decoded_layers({"layers": {f"l{k}": layer for k in range(400)}}, 1024)) == 400
    with pytest.raises(structlin.CheckpointError, match="1500 layers: too many of them are long chains"):
        _manifest.decoded_layers({"layers": {f"l{k}": layer for k in range(1500)}}, 1024)

"""Files of a checkpoint: bounded JSON and safetensors shards."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from structlin.checkpoint.tensors import COMPLEX, DTYPES, CheckpointError, write_safetensors

JSON_BYTES = 64 * 2**20
JSON_DEPTH = 32
LARGEST_AXIS = 2**31 - 1
MOST_AXES = 64  # of a torch tensor

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
OWN = re.compile(rf"structlin\.json|{re.escape(INDEX)}|{SHARD.pattern}")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and, by the header of its file, what it is."""

    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype


# JSON ----------------------------------------------------------------------------------------------------------------


def read_json(directory: Path, name: str) -> Any:
    """Read a JSON file of bounded size and depth, without duplicate keys, NaN or infinities."""
    path = plain_file(directory, name)
    if path.stat().st_size > JSON_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} B; at most {JSON_BYTES} B are read")

    def no_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(path.read_bytes().decode(), object_pairs_hook=_distinct, parse_constant=no_constant)
    except RecursionError:
        value = None
        too_deep = True
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    else:
        too_deep = not _within_depth(value, JSON_DEPTH)
    if too_deep:
        raise CheckpointError(f"{path}: nested deeper than {JSON_DEPTH} levels")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"duplicate key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r}")
    return found


def _within_depth(value: Any, depth: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth >= 0 and all(_within_depth(child, depth - 1) for child in children)


def plain_file(directory: Path, name: str) -> Path:
    """Return the path of a regular file that lies in the directory itself, not elsewhere through a link."""
    path = directory / name
    try:
        real = path.resolve(strict=True)
        if real.parent != directory.resolve() or not stat.S_ISREG(real.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file of this directory but {real}; copy the file into it")
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(f"{path}: missing or unreadable: {error}") from error
    return real


# Shards --------------------------------------------------------------------------------------------------------------


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> dict[str, str]:
    """Write tensors into as few shards as hold them, with an index if there are several.

    Returns:
        The sha256 of each shard by file name.
    """
    groups = _grouped(tensors, max_shard_bytes)
    count = len(groups)
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
    return {name: _write_shard(directory / name, group) for name, group in zip(names, groups, strict=True)}


def _grouped(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][key] = tensor
        size += tensor.nbytes
    return groups


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    write_safetensors(path, tensors, {"format": "pt"}, digest.update)
    return digest.hexdigest()


def read_headers(directory: Path, shards: list[str], pairs: set[str]) -> dict[str, Stored]:
    """Read what the shards hold, from their headers only.

    Args:
        directory: where they lie.
        shards: their file names.
        pairs: the tensors that are complex, stored as pairs.
    """
    found: dict[str, Stored] = {}
    for shard in shards:
        if not SHARD.fullmatch(shard):
            raise CheckpointError(f"{directory}: shard name {shard!r}; expected a plain name like model.safetensors")
        with opened(directory, shard) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key in found:
                    raise CheckpointError(f"tensor {key!r} is in two shards, {found[key].shard} and {shard}")
                view = file.get_slice(key)
                found[key] = _stored(key, shard, tuple(view.get_shape()), view.get_dtype(), key in pairs)
    if pairs - set(found):
        raise CheckpointError(f"{directory}: complex tensors {sorted(pairs - set(found))[:5]} are in no shard")
    _check_index(directory, shards, found)
    return found


def _stored(key: str, shard: str, shape: tuple[int, ...], name: str, pair: bool) -> Stored:
    if len(shape) > MOST_AXES or any(size > LARGEST_AXIS for size in shape):
        raise CheckpointError(f"tensor {key!r} in {shard}: shape {shape}; axes go up to {LARGEST_AXIS}")
    if name not in DTYPES:
        raise CheckpointError(f"tensor {key!r} in {shard}: dtype {name}; expected one of {sorted(DTYPES)}")
    dtype = DTYPES[name]
    if not pair:
        return Stored(shard, shape, dtype)
    if shape[-1:] != (2,) or dtype not in COMPLEX:
        raise CheckpointError(f"tensor {key!r} in {shard}: {name} {shape}; a complex tensor is stored as float pairs")
    return Stored(shard, shape[:-1], COMPLEX[dtype])


def _check_index(directory: Path, shards: list[str], found: Mapping[str, Stored]) -> None:
    if len(shards) > 1:
        index = read_json(directory, INDEX)
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if listed != {key: stored.shard for key, stored in found.items()}:
            raise CheckpointError(f"{directory / INDEX}: its weight_map differs from what the shards hold; save again")


@contextmanager
def opened(directory: Path, shard: str) -> Iterator[Any]:
    """Open a shard; whatever goes wrong with it is a CheckpointError."""
    path = plain_file(directory, shard)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except CheckpointError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def check_hashes(directory: Path, hashes: Mapping[str, str]) -> None:
    """Compare the sha256 of every shard."""
    for shard, expected in hashes.items():
        digest = hashlib.sha256()
        with plain_file(directory, shard).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise CheckpointError(
                f"{directory / shard}: sha256 {digest.hexdigest()}, expected {expected}; the file was changed, copy it "
                "again (or load with check_hashes=False if you changed it)"
            )


def read_tensors(
    directory: Path, tensors: Mapping[str, Stored], device: Callable[[str], torch.device]
) -> dict[str, Tensor]:
    """Read tensors into fresh memory of their devices."""
    values: dict[str, Tensor] = {}
    for shard in sorted({stored.shard for stored in tensors.values()}):
        with opened(directory, shard) as file:
            for key in [key for key, stored in tensors.items() if stored.shard == shard]:
                # A copy: the mapped file must not live on in a tensor's storage.
                value = file.get_tensor(key).to(device(key), copy=True)
                values[key] = torch.view_as_complex(value) if tensors[key].dtype.is_complex else value
                if (tuple(values[key].shape), values[key].dtype) != (tensors[key].shape, tensors[key].dtype):
                    raise CheckpointError(f"{directory / shard}: changed while it was read")
    return values

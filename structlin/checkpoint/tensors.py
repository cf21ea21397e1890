"""Safetensors files: the project's one writer, and shards that are read with every check made."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structlin.checkpoint import bounded
from structlin.checkpoint._directory import INDEX, SHARD, CheckpointError, explaining, naming, plain_file, read_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# safetensors before 0.6 has no complex numbers: they are stored as pairs, in a trailing axis of size 2.
COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64, torch.float16: torch.complex32}

MOST_TENSORS = 200_000  # a model of 60 layers, 384 experts and scales has 140,000


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def obstacle(tensor: Tensor) -> str | None:
    """Say why a tensor cannot be written and what to do about it; return None if it can."""
    kind = type(tensor)
    if is_lazy(tensor):
        return "is not initialised; run the model once before saving"
    if tensor.is_meta:
        return "is on the meta device; load values before saving"
    # A subclass (a quantised weight, say) may have no memory, or other memory than its shape and dtype say.
    if kind not in (Tensor, nn.Parameter):
        return f"is a {kind.__name__}; gather or dequantise it, only plain tensors are stored"
    if tensor.is_nested:  # of no single shape
        return "is a nested tensor; pad it, only tensors with a shape are stored"
    if tensor.layout is not torch.strided or _real(tensor.dtype) not in NAMES:
        return f"is {tensor.dtype}, {tensor.layout}; expected a dense tensor of one of {sorted(DTYPES)}"
    if tensor.numel() and not _has_memory(tensor):
        return "has no memory of its size, as weights that are sharded or offloaded; gather them before saving"
    return None


def _has_memory(tensor: Tensor) -> bool:
    """Whether the storage holds the last entry: it is read by address, and FSDP frees storages of live parameters."""
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() != 0 and (last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write one safetensors file and force it to the disk, copying one tensor at a time to the CPU.

    Complex tensors become pairs of floats, in a trailing axis of size 2; the caller records which they are.
    `safetensors.torch.save_file` needs numpy, refuses tensors that share memory and makes the file private (0600).

    Args:
        path: the file; an existing one is overwritten.
        tensors: plain dense tensors on any device.
        metadata: strings for the header.
    Returns:
        The sha256 of the file.
    Raises:
        CheckpointError: if a tensor cannot be stored, or on a big-endian machine; nothing is written.
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors files are little-endian and this machine is not; save on another one")
    for key, tensor in tensors.items():
        if reason := obstacle(tensor):
            raise CheckpointError(f"tensor {key!r} {reason}")
    # Wide items first: then every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda key: (-_real(tensors[key].dtype).itemsize, key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for key in order:
        tensor = tensors[key]
        shape = [*tensor.shape, 2] if tensor.is_complex() else [*tensor.shape]
        stop = start + tensor.nbytes
        header[key] = {"dtype": NAMES[_real(tensor.dtype)], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with naming(path), path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for key in order:
            plain = tensors[key].detach().resolve_conj().resolve_neg().cpu().contiguous()
            if plain.nbytes:
                # By address: torch's tensors have no buffer interface, and `numpy()` needs numpy. `plain` outlives it.
                put(memoryview((ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file onto the CPU, and its metadata; errors are those of safetensors."""
    with safe_open(path, framework="pt") as file:
        # Copies: the mapped file must not live on in the tensors' storage.
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a shard, as the header describes it; `key` where the file has another name for it."""

    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str = ""


def write_shards(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> dict[str, str]:
    """Write tensors into as few shards as hold them, with an index if several; return the sha256 of each by name."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][key] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        shards = {"model.safetensors": groups[0]}
    else:
        shards = {f"model-{k:05d}-of-{len(groups):05d}.safetensors": group for k, group in enumerate(groups, 1)}
        weight_map = {key: name for name, group in shards.items() for key in group}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with naming(directory / INDEX):
            (directory / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
    return {name: write_safetensors(directory / name, group, {"format": "pt"}) for name, group in shards.items()}


def read_headers(directory: Path, shards: list[str], pairs: set[str]) -> dict[str, Stored]:
    """Read the headers of the shards, not their data; `pairs` names the complex tensors, stored as pairs of floats."""
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
            if len(found) > MOST_TENSORS:
                raise CheckpointError(f"{directory}: more than {MOST_TENSORS} tensors")
    if pairs - set(found):
        raise CheckpointError(f"{directory}: complex tensors {sorted(pairs - set(found))[:5]} are in no shard")
    if len(shards) > 1:
        index = read_json(directory, INDEX)
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if listed != {key: stored.shard for key, stored in found.items()}:
            raise CheckpointError(f"{directory / INDEX}: its weight_map differs from the shards' headers; save again")
    return found


def _stored(key: str, shard: str, shape: tuple[int, ...], name: str, pair: bool) -> Stored:
    if len(shape) > bounded.ITEMS or (shape and max(shape) > bounded.LARGEST_AXIS):
        expected = f"expected up to {bounded.ITEMS} axes of up to {bounded.LARGEST_AXIS}"
        raise CheckpointError(f"tensor {key!r} in {shard}: shape {shape}; {expected}")
    if name not in DTYPES:
        raise CheckpointError(f"tensor {key!r} in {shard}: dtype {name}; expected one of {sorted(DTYPES)}")
    dtype = DTYPES[name]
    if not pair:
        return Stored(shard, shape, dtype)
    if shape[-1:] != (2,) or dtype not in COMPLEX:
        expected = "expected pairs of floats, as complex tensors are stored"
        raise CheckpointError(f"tensor {key!r} in {shard}: {name} {shape}; {expected}")
    return Stored(shard, shape[:-1], COMPLEX[dtype])


@contextmanager
def opened(directory: Path, shard: str) -> Iterator[Any]:
    """Open a shard; any error in the block becomes a CheckpointError, as safetensors and torch raise many kinds."""
    path = plain_file(directory, shard)
    with explaining(f"{path}: cannot be read"):
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            yield file


def _check_header(path: Path) -> None:
    """Refuse a header that would take long to parse; safetensors refuses those that are wrong."""
    with path.open("rb") as file:
        if (size := int.from_bytes(file.read(8), "little")) > bounded.BYTES:
            raise ValueError(f"a header of {size} B; expected at most {bounded.BYTES} B")
        bounded.check_marks(file.read(size))


def check_hashes(directory: Path, hashes: Mapping[str, str | None]) -> None:
    """Compare the sha256 of every shard where it is known."""
    for shard, expected in hashes.items():
        if expected is None:
            continue
        digest = hashlib.sha256()
        with plain_file(directory, shard).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != expected:
            found = f"{directory / shard}: sha256 {digest.hexdigest()}, expected {expected}"
            raise CheckpointError(
                f"{found}; copy the file again, or pass check_hashes=False if you changed it yourself"
            )


def read_tensors(
    directory: Path, tensors: Mapping[str, Stored], places: Mapping[str, torch.device], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Read tensors into new memory on their devices, casting floats to the dtype if one is given."""
    values: dict[str, Tensor] = {}
    for shard in sorted({stored.shard for stored in tensors.values()}):
        with opened(directory, shard) as file:
            for key in [key for key, stored in tensors.items() if stored.shard == shard]:
                # A copy: the mapped file must not live on in a tensor's storage.
                value = file.get_tensor(tensors[key].key or key).to(places[key], copy=True)
                value = torch.view_as_complex(value) if tensors[key].dtype.is_complex else value
                if (tuple(value.shape), value.dtype) != (tensors[key].shape, tensors[key].dtype):
                    raise CheckpointError(f"{directory / shard}: changed while it was read")
                values[key] = cast(value, dtype)
    return values


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Convert a floating tensor to the dtype; leave integers and complex numbers alone."""
    return tensor.to(dtype) if tensor.is_floating_point() and dtype is not None else tensor

"""The project's one writer of safetensors files, and what it can store."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# safetensors before 0.6 has no complex numbers: they are stored as pairs, in a trailing axis of size 2.
COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64, torch.float16: torch.complex32}


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged, or does not fit the model; nothing was changed."""


def obstacle(tensor: Tensor) -> str | None:
    """Say why a tensor cannot be written and what to do about it, None if it can."""
    kind = type(tensor)
    if is_lazy(tensor):
        return "is not initialised; run the model once before saving"
    # The memory of a subclass (DTensor, a quantised weight) need not be what its shape and dtype say.
    if kind not in (Tensor, nn.Parameter):
        return f"is a {kind.__name__}; gather or dequantise it, only plain tensors are stored"
    if tensor.is_meta:
        return "is on the meta device; load values before saving"
    if tensor.layout is not torch.strided or _real(tensor.dtype) not in NAMES:
        return f"is {tensor.dtype}, {tensor.layout}; dense ones of {sorted(DTYPES)} are stored"
    return None


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    see: Callable[[Any], object] | None = None,
) -> None:
    """Write one safetensors file and force it to the disk, with one tensor at a time on the CPU.

    Complex tensors become pairs of floats, in a trailing axis of size 2; the caller records which they are.
    `safetensors.torch.save_file` needs numpy, refuses tensors that share memory and makes the file private (0600).

    Args:
        path: the file; one of that name is overwritten.
        tensors: plain dense tensors on any device.
        metadata: texts for the header.
        see: called with every piece of the file, in order; `hashlib.sha256().update`, say.
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
    with path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            if see is not None:
                see(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for key in order:
            plain = tensors[key].detach().resolve_conj().resolve_neg().cpu().contiguous()
            if plain.nbytes:
                # By address: torch's tensors have no buffer interface, and `numpy()` needs numpy. `plain` outlives it.
                put(memoryview((ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())))
        file.flush()
        os.fsync(file.fileno())


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a file onto the CPU, and its metadata; errors are those of safetensors."""
    with safe_open(path, framework="pt") as file:
        # Copies: the mapped file must not live on in the tensors' storage.
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype

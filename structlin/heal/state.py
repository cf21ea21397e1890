"""The file of an interrupted healing: safetensors with JSON in its metadata, no pickle."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

VERSION = 1
KEY = "structlin_heal"

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip

Tensors = dict[str, Tensor]


def write_state(path: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write tensors and JSON content into one file, which takes the place of an older one at once.

    `safetensors.torch.save_file` needs numpy, which we do not require, and `serialize_file` differs by version.
    """
    paired = [name for name, tensor in tensors.items() if tensor.is_complex()]
    text = json.dumps({"version": VERSION, **content, "complex": paired})
    header: dict[str, Any] = {"__metadata__": {KEY: text}}
    start = 0
    order = sorted(tensors, key=lambda name: (-_real(tensors[name].dtype).itemsize, name))  # so all are aligned
    for name in order:
        tensor = tensors[name]
        shape = [*tensor.shape, 2] if tensor.is_complex() else [*tensor.shape]
        stop = start + tensor.nbytes
        header[name] = {"dtype": DTYPES[_real(tensor.dtype)], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.tmp")
    with fresh.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            plain = tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous()
            if plain.nbytes:
                file.write(memoryview((ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def read_state(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what `write_state` wrote, onto the CPU.

    Raises:
        ValueError: if the file is not a checkpoint of a healing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[KEY])
            # Copies: the mapped file must not live on in the tensors' storage.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        version = content["version"]
    except Exception as error:  # safetensors and torch raise many kinds
        raise ValueError(
            f"{path}: not a checkpoint of heal ({type(error).__name__}: {error}); delete it to start anew"
        ) from error
    if version != VERSION:
        raise ValueError(f"{path}: format version {version}, this structlin reads {VERSION}; delete it to start anew")
    return tensors | {name: torch.view_as_complex(tensors[name]) for name in content["complex"]}, content


def stored_tensors(model: nn.Module) -> Tensors:
    """Return the parameters and buffers of a model's state dict, the very objects, each once."""
    found: Tensors = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Say where names, shapes or dtypes differ."""
    lines = [f"{name} is missing in the file" for name in expected if name not in found]
    lines += [f"{name} is missing in the student" for name in found if name not in expected]
    for name in expected:
        if name in found and (expected[name].shape, expected[name].dtype) != (found[name].shape, found[name].dtype):
            here, there = (f"{tuple(each.shape)} {each.dtype}" for each in (expected[name], found[name]))
            lines.append(f"{name} is {here} in the student, {there} in the file")
    return lines


# The optimizer -------------------------------------------------------------------------------------------------------


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> tuple[Tensors, Any]:
    """Take an optimizer apart: tensors by name, and JSON for all else; parameters are told by their names.

    Raises:
        TypeError: if its state holds something else than tensors, numbers, texts, lists, tuples and dicts of them.
    """
    tensors: Tensors = {}
    groups = [
        {
            "names": [names[parameter] for parameter in group["params"]],
            "options": _pack(_options(group), f"group{index}", tensors),
        }
        for index, group in enumerate(optimizer.param_groups)
    ]
    foreign = [key for key in optimizer.state if key not in names]
    if foreign:
        raise TypeError(
            f"the state of {type(optimizer).__name__} is not by parameter: {foreign[0]!r}; use checkpoint=None"
        )
    states = {names[p]: _pack(dict(state), f"state.{names[p]}", tensors) for p, state in optimizer.state.items()}
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "states": states}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor], content: Any
) -> None:
    """Put stored state into an optimizer of the same kind for the same parameters.

    `load_state_dict` would cast every tensor to its parameter's dtype.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    states = {
        parameters[name]: _unpack(packed, tensors, parameters[name]) for name, packed in content["states"].items()
    }
    for group, packed in zip(optimizer.param_groups, content["groups"], strict=True):
        group.update(_unpack(packed["options"], tensors, group["params"][0]))
    optimizer.state.clear()
    optimizer.state.update(states)


def optimizer_differences(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], content: Any) -> list[str]:
    """Say where the kind of an optimizer or its parameters differ from the stored ones."""
    kind = type(optimizer).__name__
    if kind != content["class"]:
        return [f"the optimizer is {kind}, in the file {content['class']}"]
    ours = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    theirs = [group["names"] for group in content["groups"]]
    if ours == theirs:
        return []
    moved = sorted({name for group in ours for name in group} ^ {name for group in theirs for name in group})
    return [f"{moved[0]} is trained in one of them only" if moved else "the parameters have another order or grouping"]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group; the learning rate is the schedule's."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names", "lr")}


def _pack(value: Any, key: str, tensors: Tensors) -> Any:
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key, "cpu": value.device.type == "cpu"}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        items = [_pack(item, f"{key}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _pack(item, f"{key}.{name}", tensors) for name, item in value.items()}}
    raise TypeError(f"the optimizer's {key} is a {type(value).__name__}, which is not stored; use checkpoint=None")


def _unpack(packed: Any, tensors: Mapping[str, Tensor], parameter: Tensor) -> Any:
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        value = tensors[packed["tensor"]]
        device = torch.device("cpu") if packed["cpu"] else parameter.device
        if value.shape != parameter.shape:
            return value.to(device, copy=True)
        return torch.empty_like(parameter, dtype=value.dtype, device=device).copy_(value)  # with its strides
    if "dict" in packed:
        return {name: _unpack(item, tensors, parameter) for name, item in packed["dict"].items()}
    ((kind, items),) = packed.items()
    values = [_unpack(item, tensors, parameter) for item in items]
    return tuple(values) if kind == "tuple" else values

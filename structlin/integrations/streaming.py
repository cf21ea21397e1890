"""Folders of transformers larger than memory: a skeleton without values, its tensors one by one, and a new folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from structlin.checkpoint import CheckpointError
from structlin.checkpoint._directory import INDEX, explaining, read_json, readable
from structlin.checkpoint._skeleton import slots_of
from structlin.checkpoint.journal import Journal
from structlin.checkpoint.tensors import Stored, read_headers, read_tensors
from structlin.compress import Report
from structlin.compress.config import Compression
from structlin.compress.data import Data
from structlin.compress.plan import CompressionPlan
from structlin.compress.processes import ranks
from structlin.compress.stream import compress_stream
from structlin.integrations.folders import check_free, class_of, copy_others, hub_id
from structlin.integrations.model_card import CARD, model_card

HALVES = (torch.float16, torch.bfloat16)
MOST = 5  # names in a message


def stream_folder(
    source: str,
    target: Path,
    config: Compression,
    *,
    batches: Sequence[Any] = (),
    dtype: torch.dtype | None = None,
    device: str | None = None,
    run_dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Report:
    """Compress a folder of safetensors into a new one, block by block; unfinished work is gone on with.

    Args:
        source: a local folder of transformers, or an id whose snapshot is in the cache of the hub.
        target: the new folder.
        config: settings, or a plan without statistics. `allocation` is uniform and there is no output metric.
        batches: of calibration.
        dtype: of the weights; None keeps the stored one.
        device: where blocks are fitted and run.
        run_dtype: in which they are; they are stored in `dtype` in any case.
        progress: as in `compress_model`.
    Raises:
        ValueError: if a setting needs the whole model or lacks batches, the model has no chain of blocks, or there are
            several ranks.
        CheckpointError: if the folder's tensors are not those of the model by name.
        FileExistsError: if the target holds files.
    """
    check_free(target)  # before the work, not after it
    check_settings(config)
    config.check_batches(batches)
    if ranks()[1] > 1:
        raise ValueError(
            f"{ranks()[1]} processes cannot stream a model together; run one, without torchrun, or compress the "
            "model in memory, without --stream"
        )
    folder = readable(Path(source))
    model, places = open_skeleton(folder, dtype)
    about = {
        "work": 1, "config": config.to_record(), "dtypes": [str(model.dtype), str(run_dtype)],
        "batches": _digest(batches),
        "files": {s: _identity(folder / s) for s in sorted({stored.shard for stored in places.values()})},
    }  # fmt: skip

    def read(names: Sequence[str]) -> Mapping[str, Tensor]:
        chosen = {name: places[name] for name in names}
        return read_tensors(folder, chosen, dict.fromkeys(names, torch.device("cpu")), model.dtype)

    data = Data(batches=tuple(batches))
    with Journal.opened(target, about) as journal:
        report = compress_stream(model, config, data, read, journal, device=device, dtype=run_dtype, progress=progress)
        with explaining(f"{target}: cannot be written", OSError):
            copy_others(str(folder), journal.shards)
            _write_config(model, journal.shards)
            if any(row.structure for row in report.layers):
                (journal.shards / CARD).write_text(model_card(model, report, base_model=hub_id(source)), "utf-8")
        journal.finish()
    return report


def check_settings(config: Compression) -> None:
    """Refuse what needs the whole model.

    Raises:
        ValueError: naming the setting.
    """
    if isinstance(config, CompressionPlan):
        if config.fitted_with is not None:
            raise ValueError(
                "the plan was made with statistics of the whole model, which a streamed model does not have; make it "
                "without calibration"
            )
    elif config.allocation == "global":
        raise ValueError("allocation='global' runs the whole model; a streamed model takes 'uniform'")
    if config.model_epochs:
        raise ValueError(f"model_epochs={config.model_epochs} trains the whole model; heal a streamed one afterwards")


# The skeleton --------------------------------------------------------------------------------------------------------


class _EmptyOnMeta(TorchFunctionMode):
    """Put uninitialised tensors, as most parameters begin, on the meta device; buffers are computed as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def open_skeleton(folder: Path, dtype: torch.dtype | None) -> tuple[Any, dict[str, Stored]]:
    """Build the model of a folder without values, and find the stored tensor of each of its own.

    Args:
        folder: of transformers, with safetensors.
        dtype: of the weights; None keeps that of the config.
    Returns:
        The model, in evaluation mode: parameters and persistent buffers on meta. And the places by name.
    Raises:
        CheckpointError: if a stored tensor is not one of the model by name, or the other way round.
    """
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{folder}: the model is quantised or compressed already; give the original one")
    stored = read_headers(folder, _shards(folder), set())
    first = next(s.dtype for s in stored.values() if s.dtype.is_floating_point)
    dtype = dtype or getattr(config, "dtype", None) or first
    with _EmptyOnMeta():
        model = class_of(config)._from_config(config, dtype=dtype).eval()
    keep = [*(model._keep_in_fp32_modules_strict or ())] if dtype in HALVES else []
    keep += [*(model._keep_in_fp32_modules or ())] if dtype is torch.float16 else []
    if keep:
        raise CheckpointError(f"{type(model).__name__} keeps {sorted(keep)} in float32; pass --dtype float32")
    for slot in list(slots_of(model.named_modules())):
        value = slot.tensor.detach().to("meta")
        new = nn.Parameter(value, slot.tensor.requires_grad) if isinstance(slot.tensor, nn.Parameter) else value
        setattr(slot.module, slot.attribute, new)
    model.tie_weights()
    if left := [name for name, buffer in _transient(model).items() if buffer.is_meta]:
        raise CheckpointError(f"buffers {left[:MOST]} are not stored, and have no values; compress the model in memory")
    return model, _places(model, stored)


def _shards(folder: Path) -> list[str]:
    if not (folder / INDEX).exists():
        return ["model.safetensors"]
    index = read_json(folder, INDEX)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map; download the folder again")
    return sorted({str(name) for name in listed.values()})


def _places(model: Any, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the stored tensor of each tensor of the model, under its first name."""
    slots = list(slots_of(model.named_modules(remove_duplicate=False)))
    known = {slot.name: slot for slot in slots}
    prefix = f"{model.base_model_prefix}."
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ())]
    transient = _transient(model)
    found: dict[int, Stored] = {}
    for key, tensor in stored.items():
        name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in known), None)
        if name is not None:
            expected = tuple(known[name].tensor.shape)
            if tensor.shape != expected:
                raise CheckpointError(f"tensor {key!r} is {tensor.shape}; {type(model).__name__} expects {expected}")
            found.setdefault(id(known[name].tensor), Stored(tensor.shard, tensor.shape, tensor.dtype, key))
        elif key not in transient and not any(re.search(pattern, key) for pattern in ignored):
            raise CheckpointError(_not_as_stored(model, f"the folder's tensor {key!r} is none of the model"))
    for slot in slots:
        if id(slot.tensor) not in found:
            raise CheckpointError(_not_as_stored(model, f"the model's tensor {slot.name!r} is not in the folder"))
    return {slot.name: found[id(slot.tensor)] for slot in slots}


def _not_as_stored(model: Any, what: str) -> str:
    return (
        f"{what}: transformers converts or renames tensors of this {type(model).__name__} when it loads them; compress "
        "it in memory (without --stream), or save it again by save_pretrained"
    )


def _transient(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


# The new folder ------------------------------------------------------------------------------------------------------


def _write_config(model: Any, folder: Path) -> None:
    """Write config.json and generation_config.json as `save_pretrained` does."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _identity(path: Path) -> list[int]:
    """Tell a shard from one that was trained further meanwhile: its size is the same."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _digest(batches: Sequence[Any]) -> str:
    """Tell batches apart by a hash of their tensors."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)} {batch[name].flatten().tolist()}".encode())
    return digest.hexdigest()

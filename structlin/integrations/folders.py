"""Whole folders of transformers: load a model with what lies beside it, calibration text, and a compressed folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from structlin.checkpoint.table import METHOD
from structlin.compress import Report
from structlin.integrations.model_card import CARD, save_pretrained
from structlin.layers.factored import Factored

# Weights in any format: everything else in a folder (tokenizer, pooling, generation settings) is copied.
WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf", ".npz",
}  # fmt: skip
NOT_COPIED = {"config.json", "README.md", "structlin.json"}  # written anew


def load_model(source: str, *, dtype: torch.dtype | None, device: str | None) -> Any:
    """Load a model by the class that its config names, `AutoModel` where it names none.

    Args:
        source: a local folder, or an id on the hub.
        dtype: of the weights; None keeps the stored one.
        device: where to; None stays on the CPU.
    Raises:
        OSError: if there is no such model.
    """
    cls = class_of(AutoConfig.from_pretrained(source))
    model: Any = cls.from_pretrained(source, dtype="auto" if dtype is None else dtype).eval()
    return model if device is None else model.to(device)


def class_of(config: Any) -> Any:
    """Return the class that a config names, `AutoModel` where it names none that is known."""
    names = config.architectures or ()
    return next((found for name in names if (found := getattr(transformers, name, None))), AutoModel)


def read_texts(path: Path) -> list[str]:
    """Read texts: the values of "text" in JSON lines (*.jsonl, *.json), else the lines that are not empty.

    Raises:
        ValueError: naming the line that holds no text.
    """
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    if path.suffix not in (".jsonl", ".json"):
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; expected one JSON object a line") from error
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise ValueError(f'{path}, line {number}: expected a string or an object with the string "text"')
        texts.append(text)
    return texts


def batches_of(source: str, texts: Sequence[str], *, batch_size: int, max_length: int) -> list[dict[str, Any]]:
    """Tokenise texts by the tokenizer of a model, and pad them to batches."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return [
        dict(
            tokenizer(
                list(texts[k : k + batch_size]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
        )
        for k in range(0, len(texts), batch_size)
    ]


def save_folder(model: nn.Module, source: str, target: Path, report: Report | None) -> None:
    """Write a model as transformers does, with the tokenizer and all other files of its source.

    Args:
        model: compressed, or merged back.
        source: the folder or hub id that it was loaded from.
        target: the folder to write.
        report: of the compression, for the model card. Without it a model with structured layers gets a card too, that
            names what its source was made of.
    Raises:
        FileExistsError: if the target holds files.
    """
    check_free(target)
    target.mkdir(parents=True, exist_ok=True)
    copy_others(source, target)
    if report is None and not any(isinstance(module, Factored) for module in model.modules()):
        model.save_pretrained(target)  # type: ignore[operator]
    else:
        save_pretrained(model, target, report, base_model=hub_id(source) or _base_of(Path(source, CARD)))


def hub_id(source: str) -> str | None:
    """Return the id of a model on the hub, None for a local folder, whose path is nobody else's business."""
    return None if Path(source).is_dir() else source


def _base_of(card: Path) -> str | None:
    """Return the model on the hub that a compressed one was made from, by its card; other cards tell something else."""
    about = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.exists() else {}
    base = about.get("base_model")
    return base if METHOD in (about.get("tags") or ()) and isinstance(base, str) else None


def copy_others(source: str, target: Path) -> None:
    """Copy what lies beside the weights of a model, but for hidden files and a target in its folder."""
    top = beside(source)
    modules = _modules(top)

    def left_out(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).relative_to(top)
        unwanted = {n for n in names if n.startswith(".") or (inside == Path() and n in NOT_COPIED)}
        if not any(inside.is_relative_to(module) for module in modules):
            unwanted |= {n for n in names if Path(n).suffix in WEIGHTS or n.endswith(".index.json")}
        return unwanted | {n for n in names if target.resolve().is_relative_to(Path(folder, n).resolve())}

    shutil.copytree(top, target, ignore=left_out, dirs_exist_ok=True)


def beside(source: str) -> Path:
    """Return the folder with what lies beside a model's weights; of a model on the hub it is downloaded, if it can be.

    Raises:
        OSError: if there is no such model.
    """
    if Path(source).is_dir():
        return Path(source)
    weights = [f"*{suffix}" for suffix in sorted(WEIGHTS)]
    folder = Path(snapshot_download(source, ignore_patterns=[*weights, "*.index.json"]))
    if modules := _modules(folder):
        snapshot_download(source, allow_patterns=[f"{module}/*" for module in modules])
    return folder


def _modules(folder: Path) -> list[str]:
    """Return the folders of sentence-transformers' modules behind the model: their weights belong to the folder."""
    path = folder / "modules.json"
    return [entry["path"] for entry in json.loads(path.read_text("utf-8")) if entry["path"]] if path.exists() else []


def check_free(target: Path) -> None:
    """Refuse to write into a folder that holds files.

    Raises:
        FileExistsError: naming the folder.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; give a new folder")

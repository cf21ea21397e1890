"""The model card of a compressed model, and the functions that write and push it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from structlin.checkpoint.table import METHOD
from structlin.compress.report import Report
from structlin.integrations.transformers import prepare
from structlin.layers.factored import Factored
from structlin.layers.quantized import QuantizedFactor

CARD = "README.md"


def model_card(
    model: Any, report: Report | None = None, *, base_model: str | None = None, repo_id: str | None = None
) -> str:
    """Write the model card of a compressed model: what it was made of, its layers and size, and how to load it.

    Args:
        model: a `PreTrainedModel` with structured layers.
        report: of `compress_model`, for the model's size before and its quality.
        base_model: id of the dense model on the hub; None takes the name that it was loaded by.
        repo_id: id of this model on the hub, for the lines that load it.
    Returns:
        The text of a README.md, with the hub's metadata in front.
    Raises:
        ValueError: if the model has no structured layers.
    """
    layers = [module for module in model.modules() if isinstance(module, Factored)]
    if not layers:
        raise ValueError("the model has no structured layers; compress it first, or write a card of its own")
    base = base_model or (model.name_or_path if not Path(model.name_or_path).exists() else None) or None
    about = [f"base_model: {json.dumps(base)}", "base_model_relation: quantized"] if base else []
    head = ["---", *about, "library_name: transformers", "tags:", f"- {METHOD}", "---"]
    name = repo_id or "path/to/this/folder"
    kind = type(model).__name__
    title = f"# {(repo_id or base or kind).rpartition('/')[2]}, compressed by structlin"
    made = f" of [{base}](https://huggingface.co/{base})" if base else ""
    return "\n".join(
        [
            *head,
            "",
            title,
            "",
            f"A smaller version{made}: dense layers are replaced by structured ones. {_sizes(model, layers, report)}",
            "",
            "```python",
            f"import structlin.hf; from transformers import {kind}",
            f"model = {kind}.from_pretrained({json.dumps(name)})",
            "```",
            "",
            "Without `pip install structlin` and the import, loading fails.",
            "",
            *_table(layers),
            *_quality(report),
        ]
    )


def save_pretrained(
    model: Any, folder: str | Path, report: Report | None = None, *, base_model: str | None = None, **settings: Any
) -> None:
    """Call `model.save_pretrained` and write the model card beside it.

    Args:
        model: a `PreTrainedModel` with structured layers.
        folder: where to.
        report: see `model_card`, as for base_model.
        base_model: id of the dense model.
        **settings: for `model.save_pretrained`, such as max_shard_size.
    """
    card = model_card(prepare(model), report, base_model=base_model)
    model.save_pretrained(folder, **settings)
    (Path(folder) / CARD).write_text(card, "utf-8")


def push_to_hub(
    model: Any,
    repo_id: str,
    report: Report | None = None,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model compressed by structlin",
    **settings: Any,
) -> str:
    """Upload a compressed model with its model card, which `model.push_to_hub` would overwrite by an empty one.

    Args:
        model: a `PreTrainedModel` with structured layers.
        repo_id: "user/name"; the repository is made if there is none.
        report: see `model_card`, as for base_model.
        base_model: id of the dense model.
        private: whether a new repository is private; None takes the default of the account.
        token: of the hub; None takes the stored one.
        commit_message: of the upload.
        **settings: for `model.save_pretrained`, such as max_shard_size.
    Returns:
        The address of the commit.
    """
    card = model_card(prepare(model), report, base_model=base_model, repo_id=repo_id)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, **settings)
        (Path(folder) / CARD).write_text(card, "utf-8")
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(commit.commit_url)


def _sizes(model: Any, layers: list[Factored], report: Report | None) -> str:
    kept = sum(layer.num_parameters for layer in layers)
    dense = sum(math.prod(_shape(layer)) for layer in layers)
    integers = [module for layer in layers for module in layer.modules() if isinstance(module, QuantizedFactor)]
    codes = sum(each.unfolding.rows * each.unfolding.columns * math.prod(each.stack) for each in integers)
    whole = f"{model.num_parameters() + codes:,} parameters"
    if report is not None:
        whole += f" of {report.parameters_before:,}"
    said = f"It has {whole}; {len(layers)} layers keep {kept:,} of {dense:,} parameters ({kept / dense:.3f})."
    if integers:
        formats = " and ".join(dict.fromkeys(str(each.form) for each in integers))
        said += f" {len(integers)} factors are {formats}: {sum(each.nbytes for each in integers):,} bytes with scales."
    return said


def _shape(layer: Factored) -> tuple[int, ...]:
    return *layer.stack, layer.out_features, layer.in_features


def _table(layers: list[Factored]) -> list[str]:
    rows = Counter(
        f"{' x '.join(map(str, _shape(layer)))} | `{layer.structure}` | {layer.spec.ratio:.3f}" for layer in layers
    )
    lines = [f"| {count} | {row} |" for row, count in rows.items()]
    return ["| layers | weight | structure | kept |", "|---|---|---|---|", *lines, ""]


def _quality(report: Report | None) -> list[str]:
    if report is None or not report.qualities:
        return []
    return ["Quality:", "", *(f"- {quality}" for quality in report.qualities), ""]

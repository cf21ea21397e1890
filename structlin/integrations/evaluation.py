"""Compressed folders judged by lm-eval (the language model evaluation harness of EleutherAI)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoTokenizer

from structlin.integrations.folders import load_model


def evaluate(
    source: str,
    tasks: Sequence[str],
    *,
    include: str | None = None,
    samples: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Return the results of lm-eval's tasks for a language model, compressed or not.

    lm-eval is given the loaded model: by the name of a folder it loads models itself, and knows no structured layers.

    Args:
        source: a local folder with its tokenizer, or an id on the hub.
        tasks: names of tasks or groups.
        include: a folder with further tasks as YAML.
        samples: judge the first samples of each task only, None judges all.
        shots: examples in front of each sample; None is each task's own number.
        batch_size: of the samples.
        dtype: of the weights; None keeps the stored one.
        device: where the model runs; None is the CPU.
    Raises:
        ValueError: if a task is unknown.
    """
    manager = TaskManager(include_path=include)
    if unknown := sorted({*tasks} - {*manager.all_tasks}):
        raise ValueError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, --include adds a folder")
    model = load_model(source, dtype=dtype, device=device)
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(source), batch_size=batch_size)
    found: dict[str, Any] = simple_evaluate(
        model=harness, tasks=[*tasks], task_manager=manager, limit=samples, num_fewshot=shots
    )
    return found


def shown(results: dict[str, Any]) -> str:
    """Return the results as lm-eval's own table."""
    return str(make_table(results))

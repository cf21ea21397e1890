"""The verbs: plan a compression, carry it out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from structlin.batches import Forward
from structlin.compress import pipeline
from structlin.compress.config import Compression, Value, with_settings
from structlin.compress.data import Data
from structlin.compress.evaluate import Evaluate, Evaluator
from structlin.compress.patched import Patched
from structlin.compress.plan import CompressionPlan
from structlin.compress.processes import check_same
from structlin.compress.report import Report
from structlin.compress.statistics import Statistics
from structlin.compress.targets import openings

Calibration = Statistics | Iterable[Any]


def compress_model(
    model: nn.Module,
    structure: Value | Compression,
    *,
    calibration: Calibration | None = None,
    validation: Iterable[Any] | None = None,
    forward: Forward | None = None,
    evaluate: Evaluate | Evaluator | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
    **settings: Any,
) -> Report:
    """Replace the linear layers of a model, in place, by structured ones fitted to their weights.

    All layers are fitted before any is swapped: on an error the model is as it was. Biases, dtype, device,
    `requires_grad`, the training flag and forward and backward hooks are kept. A module reachable under several names
    stays one module; layers that share a weight share its factors. Fits run on as many threads as torch has.

    Where torch.distributed is initialised, every rank must call this with the same model and all batches: work is
    shared, and every rank's model and report become those of a single process.

    Args:
        model: any module.
        structure: a structure or its name, as in `Compression`; or a `Compression`; or a plan of `plan_compression`.
        calibration: `Statistics`, or batches to collect them from: fits then minimise the layers' output errors. A plan
            that was made with calibration needs the same here, unless it still lives in memory.
        validation: batches for checks from end to end; None holds back a share of the calibration batches.
        forward: `forward(model, batch)` calls the model, where a batch is not what it takes.
        evaluate: a function of the model that measures a task; the report has its value before and after. Or an
            `Evaluator` of the dense model, which has batches of its own: then none are held back.
        dry_run: fit and report, but leave the model as it is.
        progress: show a progress bar on stderr (needs tqdm); None shows it on a terminal.
        **settings: `ratio`, `rules`, `allocation` and all other fields of `Compression`.
    Returns:
        The report; `report.model` is the model, another object only where the root itself was a linear layer.
    Raises:
        ValueError: if a setting, a rule, a plan or a weight is bad, naming the layer. Nothing was changed, and nothing
            has run.
        TypeError: if a setting is unknown or of the wrong kind.
    Example:
        >>> import torch
        >>> mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = compress_model(mlp, "lowrank", ratio=0.5, calibration=[torch.randn(200, 64)])
        >>> mlp[0].structure, report.ratio
        (LowRank(rank=16), 0.5)
    """
    check_model(model)
    config = with_settings(structure, settings, "compress_model")
    if isinstance(evaluate, Evaluator):
        validation = ()
    data = Data.gather(calibration, validation, forward, config.held_back)
    check_same(model, (data.batches, data.held_back))
    checks = bool(evaluate.batches if isinstance(evaluate, Evaluator) else data.held_back)
    return pipeline.compress(pipeline.find(model, config, data, checks), evaluate, dry_run, progress)


def plan_compression(
    model: nn.Module,
    structure: Value | Compression,
    *,
    calibration: Calibration | None = None,
    validation: Iterable[Any] | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> CompressionPlan:
    """Decide what each linear layer of a model becomes; the model is not touched.

    Where a ratio leaves a choice (of factor shapes, of blocks, of the structure for "auto"), real fits decide. The plan
    keeps them in memory, so that `compress_model(model, plan)` need not repeat them. A model on the meta device can be
    planned where sizes follow from the ratio alone (low rank, say).

    Args:
        model: see `compress_model`, as for all other arguments.
        structure: a structure or its name, or a `Compression`.
        calibration: `Statistics` or batches.
        validation: batches for checks from end to end.
        forward: calls the model.
        progress: show a progress bar on stderr (needs tqdm); None shows it on a terminal.
        **settings: the fields of `Compression`.
    Returns:
        The plan, for `compress_model(model, plan)`; it can be printed, and edited as JSON.
    Raises:
        ValueError: if a rule matches no linear layer, a weight is not finite, or a setting is out of range; the
            message names the layer.
        TypeError: if a setting is unknown or of the wrong kind.
    Example:
        >>> mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> print(plan_compression(mlp, "lowrank", ratio=0.5))
        layer  shape  becomes                                                               kept
        0      64x64  lowrank(rank=16)                                                      0.500
        2      10x64  dense: it is the output layer; pass skip_last=False or name it in a rule  1.000
        linear weights: 4,736 -> 2,688 parameters
    """
    check_model(model)
    config = with_settings(structure, settings, "plan_compression")
    data = Data.gather(calibration, validation, forward, config.held_back)
    check_same(model, (data.batches, data.held_back))
    found = pipeline.observe(pipeline.find(model, config, data, bool(data.held_back), meta=True))
    ratios = pipeline.divide(found, Evaluator.of(model, found.data, None))
    patched = Patched(model, openings(found.targets))
    outcomes, _ = pipeline.work(found, ratios, patched, False, progress)
    return CompressionPlan.of(found.config, [outcome.entry for outcome in outcomes], found.data.statistics)


def check_model(model: object) -> None:
    """Refuse what is not a module, and models with adapters of peft, which would be compressed as layers.

    Raises:
        TypeError: saying what to pass.
        ValueError: naming the first adapter.
    """
    if isinstance(model, str):
        raise TypeError(
            f"the model is the string {model!r}; load it first, by transformers' AutoModel.from_pretrained({model!r}), "
            "or run the command: structlin compress"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; pass a torch.nn.Module")
    for name, module in model.named_modules():
        if any(cls.__module__.startswith("peft.tuners") for cls in type(module).__mro__):
            raise ValueError(
                f"module {name!r} holds adapters of peft; call merge_and_unload() first, or unload() to drop them, and "
                "add adapters to the compressed model"
            )

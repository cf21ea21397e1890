"""Carry a plan out: fit every layer first, then swap all of them or none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn

from structlin.compress.plan import CompressionPlan, PlanEntry, by_name, plan_compression, show
from structlin.compress.report import Coverage, LayerReport, Report
from structlin.compress.rules import Rules, Value
from structlin.compress.targets import Target, find_targets, module_names, unreached
from structlin.embedding import StructuredEmbedding
from structlin.fit import fit
from structlin.layer import StructuredLinear, build, from_fit

T = TypeVar("T")

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

Swap = tuple[nn.Module, str, nn.Module]  # parent, attribute, new module


def compress_model(
    model: nn.Module,
    structure: Value | CompressionPlan,
    *,
    ratio: float | None = None,
    rules: Rules | None = None,
    skip_last: bool = True,
    tied: str = "skip",
    refine: int | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Replace the linear layers of a model, in place, by structured ones fitted to their weights.

    All layers are fitted before any is swapped: on an error the model is as it was. Biases, dtype, device,
    `requires_grad`,
    the training flag and forward and backward hooks are kept; a module reachable under several names stays one module;
    layers that share a weight share its factors.

    Args:
        model: any module.
        structure: a plan of `plan_compression`, or its `structure` argument.
        ratio: see `plan_compression`, as for all other arguments up to `refine`.
        rules: pattern -> structure.
        skip_last: leave the output layer dense unless a rule names it.
        tied: "skip" or "replace".
        refine: refinement steps.
        dry_run: fit and report, but leave the model as it is.
        progress: show a progress bar on stderr (needs tqdm); None shows it on a terminal.
    Returns:
        The report; `report.model` is the model, another object only where the root itself was a linear layer.
    Raises:
        ValueError: if an argument, a rule or a weight is bad, naming the layer; nothing is changed.
    Example:
        >>> mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = compress_model(mlp, "lowrank", ratio=0.5)
        >>> mlp[0].structure, report.ratio
        (LowRank(rank=16), 0.5)
    """
    if isinstance(structure, CompressionPlan):
        if ratio is not None or rules is not None or refine is not None:
            raise ValueError(
                "a plan holds its ratio, rules and refinement; edit the plan instead of passing them again"
            )
        plan = structure
    else:
        plan = plan_compression(
            model, structure, ratio=ratio, rules=rules, skip_last=skip_last, tied=tied, refine=refine
        )
    targets = find_targets(model, tied=plan.tied)
    pairs = list(by_name(plan.entries, targets))
    coverage = _coverage(model, targets, {entry.name for entry in plan.entries if entry.structure})
    rows: list[LayerReport] = []
    swaps: dict[nn.Module, nn.Module] = {}
    for entry, target in _bar(pairs, progress):
        row, replacements = _fitted(entry, target)
        rows.append(row)
        swaps |= replacements
    root = model if dry_run else swap_modules(model, swaps)
    return Report(root, tuple(rows), coverage)


def to_dense_(model: nn.Module) -> nn.Module:
    """Merge every structured layer back into an `nn.Linear`, in place; tied embeddings get the dense table.

    Hooks are kept; layers that shared factors share the dense weight.

    Args:
        model: any module.
    Returns:
        The model, another object only where the root itself was a structured layer.
    """
    weights: dict[int, nn.Parameter] = {}
    swaps: dict[nn.Module, nn.Module] = {}
    for module in module_names(model):
        if isinstance(module, StructuredLinear):
            linear = module.to_linear()
            linear.bias = module.bias
            assert isinstance(linear.weight, nn.Parameter)
            linear.weight = weights.setdefault(id(module.factors[0]), linear.weight)
            swaps[module] = _with_hooks(linear, module)
    for module in module_names(model):
        if isinstance(module, StructuredEmbedding):
            rows, columns = module.num_embeddings, module.embedding_dim
            embedding = nn.Embedding(rows, columns, padding_idx=module.padding_idx, device="meta")
            embedding.weight = weights[id(module.linear.factors[0])]
            swaps[module] = _with_hooks(embedding.train(module.training), module)
    return swap_modules(model, swaps)


def _coverage(model: nn.Module, targets: Sequence[Target], chosen: set[str]) -> Coverage:
    seen: set[int] = set()
    counts = {True: 0, False: 0}
    for compressed in (True, False):  # a shared bias counts where its layer is compressed
        for target in targets:
            if (target.name in chosen) == compressed:
                for parameter in target.parameters():
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        counts[compressed] += _numel(parameter)
    return Coverage(counts[True], counts[False], unreached(model, seen))


def _numel(parameter: nn.Parameter) -> int:
    return 0 if isinstance(parameter, nn.parameter.UninitializedParameter) else parameter.numel()


def _fitted(entry: PlanEntry, target: Target) -> tuple[LayerReport, dict[nn.Module, nn.Module]]:
    """Fit one layer and build what takes the place of each module that uses its weight."""
    base = LayerReport(
        entry.name, entry.aliases, entry.in_features, entry.out_features, None,
        parameters_before=entry.parameters_before, parameters_after=entry.parameters_before,
        flops_before=2 * entry.parameters_before, flops_after=2 * entry.parameters_before, reason=entry.reason,
    )  # fmt: skip
    if entry.structure is None:
        return base, {}
    start = time.perf_counter()
    try:
        fitted = fit(target.linear.weight, entry.structure, refine=entry.refine)
        replacements = _replacements(target, from_fit(fitted, target.linear))
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"layer {entry.name!r}: {error}; the model is unchanged") from error
    layer = next(iter(replacements.values()))
    assert isinstance(layer, StructuredLinear)
    row = LayerReport(
        entry.name, entry.aliases, entry.in_features, entry.out_features, show(entry.structure),
        parameters_before=entry.parameters_before, parameters_after=layer.num_parameters,
        flops_before=2 * entry.parameters_before, flops_after=layer.flops_per_token,
        error=fitted.error, seconds=time.perf_counter() - start,
        hooks=sum(len(getattr(m, h)) for m, _ in target.linears for h in _HOOKS if not h.endswith(("kwargs",
        "called"))),
    )  # fmt: skip
    return row, replacements


def _replacements(target: Target, layer: StructuredLinear) -> dict[nn.Module, nn.Module]:
    """Build the new module of each user of the weight: all share the factors, each keeps its bias parameter."""
    result: dict[nn.Module, nn.Module] = {}
    for linear, _ in target.linears:
        twin = layer
        if result:
            twin = build(layer.structure, layer.in_features, layer.out_features, linear.bias is not None, device="meta")
            for factor in layer.spec.factors:
                setattr(twin, factor.name, getattr(layer, factor.name))
        twin.bias = linear.bias
        result[linear] = _with_hooks(twin.train(linear.training), linear)
    for embedding, _ in target.embeddings:
        tied = StructuredEmbedding(layer, embedding.padding_idx)
        result[embedding] = _with_hooks(tied.train(embedding.training), embedding)
    return result


def _with_hooks(new: nn.Module, old: nn.Module) -> nn.Module:
    """Hand the hook dictionaries over, so that the handles that callers hold still remove their hooks."""
    for attribute in (*_HOOKS, "_is_full_backward_hook"):
        setattr(new, attribute, getattr(old, attribute))
    return new


def swap_modules(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in place of old ones under all of their names, all or none.

    Args:
        model: the root.
        swaps: old module -> new module.
    Returns:
        The root, or its replacement.
    """
    found: list[Swap] = [
        (parent, attribute, swaps[child])
        for parent in module_names(model)
        for attribute, child in parent._modules.items()
        if child in swaps
    ]
    for parent, attribute, new in found:  # dictionary entries only: nothing here can fail halfway
        parent._modules[attribute] = new
    return swaps.get(model, model)


def _bar(items: Sequence[T], progress: bool | None) -> Iterable[T]:
    if progress is False:
        return items
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415  # optional, and `import structlin` must not import it
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc="compress", unit="layer", disable=None if progress is None else False)
    return bar

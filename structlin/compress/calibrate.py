"""Run a model over calibration batches and collect the statistics of its linear maps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from structlin.batches import Forward, check_several, copied, device_of, evaluating, kept, run, to_device
from structlin.compress.config import Compression, Mask, check_mask
from structlin.compress.data import Data
from structlin.compress.gradients import add_gradients, sampled_loss, through, watch
from structlin.compress.observe import OutputSearch, hooked, replaced
from structlin.compress.output import vocabulary_of
from structlin.compress.patched import Pass, Patched, model_passes, model_runs
from structlin.compress.processes import dealt, shared, summed
from structlin.compress.scramble import scarce, widened
from structlin.compress.sequential import collect_behind
from structlin.compress.statistics import Statistics
from structlin.compress.sums import Sums, scalar, sum_dtype, zeros
from structlin.compress.targets import Target, User, find_targets, module_names, openings
from structlin.compress.workers import seeded
from structlin.layers.factored import Factored

Loss = Callable[[Any, Any], Tensor]

CLIP = 10.0  # of a compression's output gradients, see `Collecting`
# Outputs up to which output="auto" keeps the full matrix: with it a step of a fit costs 2 in out^2 FLOPs more.
FULL = 1024


@dataclass(frozen=True)
class Collecting:
    """How statistics are collected; checked when made.

    Args:
        output: "full" for (out, out) output Grams, "diagonal" for their diagonals; "auto" is full up to 1024 outputs.
        dtype: torch.float32 or torch.float64, of the sums and of the products in them, for models of any dtype. Complex
            layers take its complex counterpart.
        mask: which tokens count. "auto" takes a 2-D `attention_mask` of a mapping, shape (b, t), for inputs of shape
            (b, t, in). An input with other leading axes (a pooled vector, flattened tokens, a decoder's other length)
            takes all rows. None takes all rows. A callable(batch) returns a mask of zeros and ones for inputs whose
            leading axes have its shape, or None.
        tied: "skip" or "replace", as in `Compression`.
        clip: limit on the norm of a token's output gradient in multiples of the batch's mean, and the reciprocal of the
            least one; None takes all gradients as they are.
        exact: see `Sums`.
    Raises:
        ValueError: if an option is out of range.
    """

    output: str = "full"
    dtype: torch.dtype = torch.float32
    mask: Mask = "auto"
    tied: str = "skip"
    clip: float | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={self.dtype} is too narrow for sums; use torch.float32 or torch.float64")
        check_mask(self.mask)
        if self.output not in ("full", "diagonal", "auto"):
            raise ValueError(f"output={self.output!r} is unknown; use 'full', 'diagonal' or 'auto'")
        if self.clip is not None and not self.clip >= 1:
            raise ValueError(f"clip={self.clip} is below 1; give a multiple of the mean norm, or None")

    def diagonal(self, out_features: int) -> bool:
        """Whether the output Gram of so many outputs is its diagonal only."""
        return self.output == "diagonal" or (self.output == "auto" and out_features > FULL)


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    names: Iterable[str] | None = None,
    loss: Loss | None = None,
    **options: Any,
) -> Statistics:
    """Run a model over batches and sum x x^H over the inputs x of each linear map, dense or structured.

    The model runs in evaluation mode, and is as it was afterwards, also on an error. Layers that receive one and the
    same tensor (query, key and value) share one Gram. Layers whose module is never called (its weight is read by other
    code) have 0 tokens.

    Memory: in^2 * itemsize B for each distinct input, and for the inputs at work once more; with a loss out^2 *
    itemsize B for each layer, and the activations and output gradients of one batch. Time: the forward passes, and
    2 in^2 FLOPs per token and distinct input; with a loss the backward passes, and 2 out^2 per token and layer.

    Args:
        model: any module that `torch.compile` did not wrap.
        batches: each a mapping (`model(**batch)`), a tuple or list (`model(*batch)`) or a tensor (`model(batch)`),
            moved to the model's device; or anything that `forward` takes.
        forward: calls the model on a batch, as `forward(model, batch)`; the batch is passed on as it is.
        names: dotted names of the layers to watch, or aliases of them, also of layers that `compress_model` skips; None
            watches all others.
        loss: `loss(output, batch)`, a real scalar whose gradients at the layers' outputs make `output_grams`. With
            `lambda y, batch: (y * torch.randn_like(y)).sum()` on an embedding y they are the Gauss-Newton (K-FAC)
            metric of its squared error. Gradients in `.grad` stay untouched.
        **options: `output`, `dtype`, `mask` and `tied`, see `Collecting`.
    Returns:
        The statistics by first dotted name, in module order and structured layers last, on the devices of the inputs.
    Raises:
        ValueError: if a name, a mask or an argument is bad, or inputs or gradients are not finite, naming the layer.
        TypeError: if a batch needs `forward`.
    Source: second moments as in OBS (Hassibi & Stork 1993), output gradients as in K-FAC (Martens & Grosse 2015).
    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> statistics = collect_statistics(mlp, [torch.randn(10, 4), torch.randn(6, 4)])
        >>> statistics
        Statistics(tokens={'0': 16, '2': 16})
        >>> statistics.grams["2"].shape
        torch.Size([8, 8])
    """
    how = Collecting(**options)
    check_several("batches", batches)
    return collect(model, _chosen(model, names, how.tied), batches, forward, loss, how)


def collect(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Any],
    forward: Forward | None,
    loss: Loss | None,
    how: Collecting,
    search: OutputSearch | None = None,
) -> Statistics:
    """Collect the statistics of targets that are found already, and search for the output layer on the way.

    See `collect_statistics`.
    """
    leaves = [(leaf, keys_of(target)) for target in targets for leaf in target.leaves]
    opened = openings(targets)
    sums, output_grams = Sums(how.dtype, how.exact), {}
    with (
        evaluating(model, *opened.values()),
        replaced(opened),
        torch.inference_mode(False),
        torch.set_grad_enabled(loss is not None),
    ):
        if loss is not None:
            output_grams = {
                name: zeros(
                    t, size, sum_dtype(how.dtype, 1 if how.diagonal(size) else size, how.exact), how.diagonal(size)
                )
                for t in targets
                for size in (t.linear.out_features,)
                for name in t.parts
            }
        for given in batches:
            batch = given if forward else to_device(given, device_of(model))
            keep = _mask_of(how.mask, batch)
            outputs: list[tuple[str, GradientEdge]] = []
            watchers: list[Callable[[Any, Tensor], Tensor]] = [] if loss is None else [partial(watch, outputs)]
            watchers += [search.note] if search and search.open else []
            give = partial(through, watchers) if watchers else None
            with hooked(leaves, partial(sums.add, keep=keep), give):
                result = run(model, copied(batch), forward)
            if search and search.open:
                search.settle(result)
            sums.settle()
            if loss is not None:
                add_gradients(output_grams, outputs, loss(result, batch), keep, how.dtype, how.clip)
        (grams,), tokens = sums.result(targets, 1)
    return Statistics(grams, tokens, output_grams)


def statistics_by_layer(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_bytes: int,
    forward: Forward | None = None,
    names: Iterable[str] | None = None,
    loss: Loss | None = None,
    **options: Any,
) -> Iterator[Statistics]:
    """Collect statistics in as many passes over the batches as their memory needs, a few layers in each.

    Memory: at most `max_bytes` for the matrices, or those of one layer, counted as if no input was shared, beside what
    `collect_statistics` needs while running. Time: one run over all batches for each group of layers.

    Args:
        model: as in `collect_statistics`, like every argument that is not listed here.
        batches: a list or a data loader, which can be iterated several times.
        max_bytes: for the matrices of one pass, in B.
    Returns:
        An iterator over the statistics of consecutive layers; the next pass starts when the next item is asked for.
    Raises:
        ValueError: at once, if several passes are needed and `batches` is an iterator; or see `collect_statistics`.
    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [list(part.grams) for part in statistics_by_layer(mlp, [torch.randn(10, 4)], max_bytes=300)]
        [['0'], ['2']]
    """
    how = Collecting(**options)
    groups, size = list[list[str]](), 0
    for target in _chosen(model, names, how.tied):
        square, outs = target.linear.in_features**2, target.linear.out_features
        entries = square + (0 if loss is None else outs if how.diagonal(outs) else outs**2)
        nbytes = entries * scalar(target, how.dtype).itemsize * len(target.parts)
        if not groups or size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(target.name)
        size += nbytes
    if len(groups) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"max_bytes={max_bytes} needs {len(groups)} passes, and batches is an iterator that ends after one; pass a "
            "list or a data loader, or a larger max_bytes"
        )
    return (collect_statistics(model, batches, forward=forward, names=group, loss=loss, **options) for group in groups)


def collect_shifted(
    model: nn.Module,
    batches: Iterable[Any],
    swaps: Mapping[nn.Module, nn.Module],
    names: Iterable[str],
    *,
    forward: Forward | None = None,
    **options: Any,
) -> Statistics:
    """Sum the inputs x' of layers in a partly compressed model, and their products with the original inputs x.

    G = sum x' x'^H goes to `grams` and C = sum x x'^H to `cross_grams`: the weight with the smallest ||W x - V x'||^2
    is V = W C G^-1. Each batch runs twice, through the model as it is and with the swaps answering, and stops after the
    last layer of `names` unless the first batch called one of them several times (or not at all). The model keeps its
    modules.

    Memory: 2 in^2 * itemsize B for each distinct pair of inputs, for those at work twice, and the original inputs of
    one batch. Time: two forward passes, and 4 in^2 FLOPs per token and distinct pair.

    Args:
        model: as in `collect_statistics`, like every argument that is not listed here.
        swaps: module of the model -> what answers in its place; a layer of `names` may be among them.
        names: dotted names of the layers to watch, any of their aliases.
    Returns:
        The statistics by first dotted name, in module order.
    Raises:
        ValueError: if `swaps` has a module that the model has not, or a layer gets other numbers of inputs from the two
            models; or see `collect_statistics`.
    """
    targets, how = _chosen(model, names, "replace"), Collecting(**options)
    opened = openings(targets)
    owned, known = module_names(model), {leaf for part in opened.values() for leaf in part.modules()}
    for module in swaps:
        if module not in owned and module not in known:
            raise ValueError(
                f"swaps has a {type(module).__name__} that is not a module of the model; take it from there"
            )
    batches = list(batches)
    patched = Patched(model, opened, dict(swaps))
    passes = model_passes(patched, model_runs(model, batches, forward), masks_of(how.mask, batches))
    return collect_behind(targets, passes, how.dtype)


def collect_passes(
    targets: Sequence[Target], passes: Sequence[Pass], how: Collecting, blanks: Collection[str] = ()
) -> Statistics:  # fmt: skip
    """Collect the input Grams of targets in the part of the model that the passes run, on its dense inputs.

    Of `blanks` only which layers share inputs is wanted: their Grams stay zero. If these are all the targets, the
    passes end as soon as each was called.
    """
    leaves = [(leaf, keys_of(target)) for target in targets for leaf in target.leaves]
    sums = Sums(how.dtype, how.exact, blanks)
    for each in passes:
        with hooked(leaves, partial(sums.add, keep=each.keep)):
            each.dense()
        sums.settle()
        if len(blanks) == len(targets) and frozenset(blanks) <= frozenset().union(*sums.totals):
            break
    (grams,), tokens = sums.result(targets, 1)
    return Statistics(grams, tokens)


def both_sides(
    model: nn.Module, targets: Sequence[Target], data: Data, config: Compression, metric: bool, search: OutputSearch
) -> Statistics:  # fmt: skip
    """Collect the statistics of a compression: Grams of the inputs and, with `metric`, of sampled loss gradients.

    The batches are dealt to the ranks. A model that gradients do not pass is a warning, and its fits go without.
    """
    how = Collecting(mask=config.mask, output="auto", clip=CLIP, exact=True)
    few = scarce(data.batches, targets)
    wide = widened(data.batches, config.seed, vocabulary_of(model), few) if few else data.batches

    def batches() -> Iterator[Any]:
        for number, batch in dealt(tuple(enumerate(wide))):
            torch.manual_seed(config.seed * 1_000_003 + number)  # the same labels are drawn on whichever rank
            yield batch

    def collected(loss: Loss | None) -> Statistics:
        with seeded(config.seed):
            statistics = summed(lambda: collect(model, targets, batches(), data.forward, loss, how, search))
        search.key = shared(lambda: search.key)
        return statistics

    if metric:
        try:
            return collected(sampled_loss)
        except (RuntimeError, TypeError, ValueError) as error:  # a run without a loss raises again what is not about it
            statistics = collected(None)
            warnings.warn(f"fitted without the metric of the model's outputs: {error}", stacklevel=5)
            return statistics
    return collected(None)


def keys_of(target: Target) -> str | tuple[str, ...]:
    """Return the key under which a leaf is watched: its name, or the names of the matrices of a stack."""
    return target.parts if target.stacked else target.name


# Arguments -----------------------------------------------------------------------------------------------------------


def masks_of(mask: Mask, batches: Iterable[Any]) -> list[Tensor | None]:
    """Return the mask of each batch."""
    return [_mask_of(mask, batch) for batch in batches]


def _mask_of(mask: Mask, batch: Any) -> Tensor | None:
    """Return the mask of a batch as booleans, None for all rows."""
    if callable(mask):
        found = mask(batch)
    else:
        found = batch.get("attention_mask") if mask == "auto" and isinstance(batch, Mapping) else None
        found = found if isinstance(found, Tensor) and found.ndim == 2 else None
    return None if found is None else kept(found)


def _chosen(model: nn.Module, names: Iterable[str] | None, tied: str) -> list[Target]:
    layers = [(module, found) for module, found in module_names(model).items() if isinstance(module, Factored)]
    targets = find_targets(model, tied=tied) + [Target((User(m, found, m, m),)) for m, found in layers]
    if names is None:
        return [target for target in targets if not target.reason and not target.on_request]
    wanted = set(names)
    if unknown := sorted(wanted - {name for target in targets for name in target.names}):
        raise ValueError(f"names {unknown} are not linear layers; there are {[t.name for t in targets][:20]}")
    return [target for target in targets if wanted & set(target.names)]

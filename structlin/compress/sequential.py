"""Sequential compensation: the weight that a layer should have behind compressed layers."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from structlin.compress.data import Aim
from structlin.compress.observe import run_until
from structlin.compress.patched import Pass
from structlin.compress.processes import dealt, summed
from structlin.compress.statistics import Statistics
from structlin.compress.sums import Held, Sums
from structlin.compress.targets import Target
from structlin.fitting.objective import InputGram

# Share of the way from the weight itself to the regression towards the dense outputs, as GPTAQ and PIFA publish it: all
# of the way overfits the calibration text.
TOWARDS = 0.25


def shifted(
    group: Sequence[Target],
    passes: Sequence[Pass],
    shrinkage: float,
    towards: float = TOWARDS,
    names: Container[str] | None = None,
) -> dict[str, Aim]:
    """Find the weights and input Grams that stand for the layers of a group behind compressed layers.

    With original inputs x and those x' of the compressed model, sum ||W x - V x'||^2 + s ||W - V||^2 is
    tr((T - V) G (T - V)^H) and a constant, with G = sum x' x'^H + s I and T = W (sum x x'^H + s I) G^-1. W + a (T - W)
    takes the place of W. The shrinkage s is that of `Statistics.shrunken`. Source: GPTAQ, SAES-SVD.

    Memory: 8 in^2 B beside the sums, since T - W = W (sum (x - x') x'^H) G^-1 needs one Cholesky factor in float64.

    Args:
        group: layers with the same inputs.
        passes: of the part of the model that they are in; they are dealt to the ranks.
        shrinkage: relative to the mean eigenvalue.
        towards: a, from 0 (the weight itself) to 1.
        names: of the layers of the group that this rank fits; None for all.
    Returns:
        The weight to approximate and G by name; the weight in float32 or wider.
    """
    statistics = summed(lambda: collect_behind(group, dealt(passes), exact=True))
    group = [target for target in group if names is None or target.name in names]
    grams, changes = statistics.grams, dict[str, Tensor]()
    for target in group:
        gram, cross = grams[target.name], statistics.cross_grams[target.name]
        changes[target.name] = (cross - gram).mH @ target.linear.weight.detach().to(gram.dtype).mH  # (in, out)
        del cross
    del statistics  # a wide layer's are large
    found: dict[str, Aim] = {}
    for gram in {id(gram): gram for gram in grams.values()}.values():  # which layers share
        sharing = [target for target in group if grams[target.name] is gram]
        mean = gram.diagonal().real.mean()
        factor = _factor(gram, shrinkage * mean) if mean > 0 else None
        for target in sharing:
            weight = target.linear.weight.detach()
            aim = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if factor is not None:
                aim = aim + towards * _solved(factor, changes.pop(target.name)).mH.to(aim.dtype)
            found[target.name] = aim, None
        del factor  # before the Gram is normalised: a wide layer's are large
        shrunken = InputGram.of(gram, shrinkage)
        found |= {target.name: (found[target.name][0], shrunken) for target in sharing}
    return found


def _factor(gram: Tensor, ridge: Tensor) -> Tensor:
    """Return the Cholesky factor in float64 of a Gram with a ridge on its diagonal."""
    wide = gram.to(torch.promote_types(gram.dtype, torch.float64), copy=True)
    wide.diagonal().add_(ridge)
    columns = wide.mH.resolve_conj() if wide.is_complex() else wide.mT  # LAPACK's order: no copy of a wide layer's
    return torch.linalg.cholesky(columns, out=columns)


def _solved(factor: Tensor, columns: Tensor) -> Tensor:
    """Solve for some columns at a time, in the dtype of the factor; `cholesky_solve` would copy the factor."""
    parts = []
    for part in columns.split(128, dim=1):
        half = torch.linalg.solve_triangular(factor, part.to(factor.dtype), upper=False)
        parts.append(torch.linalg.solve_triangular(factor.mH, half, upper=True).to(columns.dtype))
    return torch.cat(parts, dim=1)


def collect_behind(
    targets: Sequence[Target], passes: Sequence[Pass], dtype: torch.dtype = torch.float32, exact: bool = False
) -> Statistics:
    """Collect the shifted statistics of targets that are found already; see `calibrate.collect_shifted`.

    Args:
        targets: in the part of the model that the passes run.
        passes: see `Pass`.
        dtype: of the sums.
        exact: see `Sums`.
    """
    label: dict[nn.Module, str] = {leaf: target.name for target in targets for leaf in target.leaves}
    watched = {linear: linear for linear in label}
    sums, stop = Sums(dtype, exact), False
    with torch.inference_mode(False), torch.no_grad():
        for number, each in enumerate(passes):
            held = Held(each.keep, dtype)
            run_until(each.dense, watched, held.add, stop)
            run_until(each.drifted, watched, partial(_pair, sums, held, label), stop)
            sums.settle()
            for linear, name in label.items():
                if len(held.rows[linear]) != held.taken[linear]:
                    raise ValueError(
                        f"layer {name!r}: called {len(held.rows[linear])} times without and {held.taken[linear]} times "
                        "with the swaps; leave it out of names"
                    )
            stop = (stop or number == 0) and all(held.taken[linear] == 1 for linear in label)
        (grams, cross_grams), tokens = sums.result(targets, 2)
    return Statistics(grams, tokens, cross_grams=cross_grams)


def _pair(sums: Sums, held: Held, label: Mapping[nn.Module, str], linear: nn.Module, x: Tensor) -> None:
    rows = held.take(linear)
    if rows is not None:
        sums.add(label[linear], x, held.keep, rows)

"""Attacks on statistics: mutated files, and fits of all kinds of weights to all kinds of Grams."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from structlin.fitting.fit import Fit, fit
from structlin.runtime.contract import to_dense
from structlin.structures import families, family

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
EXPECTED = re.compile(  # what a fit may answer, and nothing else
    "holds NaN or infinite|on its diagonal; give sum|is not Hermitian|has negative eigenvalues"
    "|no .* structure of a|approximates the weight by entries up to|the norm of the weight exceeds"
)
REFUSED = {"negative", "asymmetric", "antisymmetric", "nan", "inf", "hollow"}  # Grams, whatever the shape
SLACK = {torch.float16: 0.05, torch.bfloat16: 0.1}  # of a relative error of 1, by rounded factors


def weight_of(attack, rows: int, columns: int, dtype: torch.dtype) -> tuple[str, Tensor]:
    """A weight of one kind, its largest entry at any scale that the dtype has."""
    kind = attack.random.choice(["random", "low rank", "zero", "constant", "repeated", "one", "nan", "inf"])
    wide = torch.complex128 if dtype.is_complex else torch.float64
    weight = torch.randn(rows, columns, dtype=wide)
    if kind == "low rank":
        weight = weight[:, :1] @ torch.randn(1, columns, dtype=wide)
    elif kind == "zero":
        weight = torch.zeros_like(weight)
    elif kind == "constant":
        weight = torch.ones_like(weight)
    elif kind == "repeated":
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        weight = left @ right
    elif kind == "one":
        weight = torch.zeros_like(weight)
        weight[attack.random.randrange(rows), attack.random.randrange(columns)] = 1
    limits = torch.finfo(dtype)
    extremes = [limits.max, limits.max / 4, limits.tiny, limits.tiny * 16, math.sqrt(limits.max), 1.0, 1.0, 0.02]
    scale = attack.random.choice([*extremes, 10.0 ** attack.random.uniform(-300, 300)])
    scale = min(max(scale, limits.tiny), limits.max / (1.5 if dtype.is_complex else 1))
    weight = weight / weight.abs().max().clamp_min(1e-300) * scale
    weight = (weight.clamp(-limits.max, limits.max) if not dtype.is_complex else weight).to(dtype)
    if kind in ("nan", "inf"):
        weight[0, -1] = float(kind)
    return kind, weight


def gram_of(attack, size: int, dtype: torch.dtype) -> tuple[str, Tensor | None]:
    """A Gram of one kind, at any scale that float32 or float64 has."""
    kinds = ["none", "good", "singular", "zero", "diagonal", "indefinite", "negative", "asymmetric", "antisymmetric"]
    kind = attack.random.choice([*kinds, "nan", "inf", "hollow"])
    if kind == "none":
        return kind, None
    x = torch.randn(3 * size if kind != "singular" else attack.random.randint(1, size), size, dtype=torch.float64)
    gram = x.T @ x
    if kind == "zero":
        gram = torch.zeros_like(gram)
    elif kind == "diagonal":
        gram = torch.diag(torch.rand(size, dtype=torch.float64))
    elif kind == "indefinite":
        gram = torch.ones_like(gram) + gram.diagonal().mean() * (torch.ones_like(gram) - torch.eye(size).double())
    elif kind == "negative":
        gram = -gram
    elif kind == "asymmetric":
        gram = gram + gram.abs().max() * torch.rand_like(gram).triu(1)
    elif kind == "antisymmetric":
        gram = gram.triu(1) - gram.triu(1).T
    elif kind == "hollow":
        gram = gram - torch.diag(gram.diagonal())
    narrow = attack.random.random() < 0.5
    most = 36 if narrow else 290
    gram = gram / gram.abs().max().clamp_min(1e-300) * 10.0 ** attack.random.uniform(-most, most)
    if kind in ("nan", "inf"):
        gram[-1, 0] = float(kind)
    gram = gram.to(torch.float32 if narrow else torch.float64)
    return kind, gram.to(gram.dtype.to_complex()) if dtype.is_complex else gram


def agrees(found: Fit, weight: Tensor) -> bool:
    """Whether `found.error` is the error of the matrix that the factors make."""
    wide = torch.complex128 if weight.is_complex() else torch.float64
    dense, weight = to_dense(found.spec, [factor.to(wide) for factor in found.factors]), weight.to(wide)
    largest = weight.abs().max().clamp_min(1e-323)
    scale = 2.0 ** -min(max(math.frexp(largest.item())[1], -1020), 1020)
    total = torch.linalg.vector_norm(weight * scale).item()
    error = torch.linalg.vector_norm((weight - dense) * scale).item()
    return found.error == pytest.approx(error / total if total else 0.0, rel=1e-3, abs=1e-6)


def test_fits_of_all_kinds_of_weights_and_grams(attack):
    names = sorted(families())
    for number in attack.rounds(160, 7000):
        name, dtype = names[number % len(names)], attack.random.choice(DTYPES)
        rows, columns = (attack.random.choice([4, 6, 8, 9, 12]) for _ in range(2))
        kind, weight = weight_of(attack, rows, columns, dtype)
        (left, gram), (right, metric) = gram_of(attack, columns, dtype), gram_of(attack, rows, dtype)
        if metric is not None and attack.random.random() < 0.3:
            metric, right = metric.diagonal().real.clone(), f"{right} diagonal"
        try:
            found = fit(weight, family(name), ratio=0.9, gram=gram, output_gram=metric, refine=3)
        except ValueError as error:
            reason = EXPECTED.search(str(error))
            if reason is None:
                raise
            attack.count(reason[0])
            continue
        assert kind not in ("nan", "inf")
        assert not {left, right} & REFUSED, (left, right)
        assert all(torch.isfinite(factor).all() for factor in found.factors), (name, kind, left, right)
        assert agrees(found, weight), (name, kind, left, right)
        judged = found.minimised
        assert 0 <= judged <= 1 + SLACK.get(dtype, 0.01), (name, kind, left, right, judged, weight.dtype)
        attack.count("fitted")

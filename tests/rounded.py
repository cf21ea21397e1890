"""Layers with factors rounded to integers, for tests and benchmarks of what runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from structlin.equation.unfolding import unfoldings
from structlin.layers.linear import StructuredLinear
from structlin.runtime.kernels.quantized import QuantizedChain, quantized_chain_of
from structlin.runtime.quantized import blocks, format_for, pack, spread, unfold

Rounded = tuple[QuantizedChain, list[Tensor], list[Tensor | None]]


def rounded(layer: StructuredLinear, bits: int, group: int = 128, outliers: bool = False) -> Rounded:
    """Round a layer's learned factors to nearest: the chain that runs them, codes and scales.

    With `outliers` the formats are those of rows that have one large entry.
    """
    forms, codes, scales = [], [], []
    for factor, parameter, unfolding in zip(layer.spec.factors, layer.factors, unfoldings(layer.spec), strict=True):
        value = parameter.detach()
        large = [torch.eye(unfolding.rows, unfolding.columns)] * outliers
        forms.append(form := format_for(bits, unfolding, group, large) if factor.learned else None)
        if form is None:
            codes.append(value)
            scales.append(None)
            continue
        matrix = unfold(value, unfolding)
        scales.append(scale := blocks(matrix, form).abs().amax(-1).clamp(min=1e-9) / form.most)
        codes.append(pack((matrix / spread(scale, form, *matrix.shape)).round(), form))
    return quantized_chain_of(layer.spec, tuple(forms)), codes, scales

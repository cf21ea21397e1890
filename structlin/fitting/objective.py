"""The objective of a fit: the error of a weight in the norm of its inputs and, where given, of its outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from structlin.fitting import linalg

# Eigenvalues below this share of the largest are rounding errors.
_NOISE = 1e-13


@dataclass(frozen=True)
class Objective:
    """The squared error ||inputs (W - What)^T outputs||^2 = tr(H (W - What) G (W - What)^H).

    `inputs` and `outputs` are Gram square roots, of G and H: at most `in_features` rows stand for all calibration
    tokens. None is the identity; without both, this is the Frobenius error.
    """

    weight: Tensor  # the target W, (out_features, in_features), with entries near 1
    inputs: Tensor | None = None  # (rows, in_features) with inputs^T conj(inputs) = G
    outputs: Tensor | None = None  # (out_features, out_features) with outputs outputs^H = conj(H), invertible

    @property
    def plain(self) -> bool:
        """Whether the objective is the Frobenius error."""
        return self.inputs is None and self.outputs is None

    @cached_property
    def targets(self) -> Tensor:
        """Outputs of the weight for `inputs`, which the approximation is to match: (rows, out_features)."""
        return self.error(self.weight)

    @cached_property
    def gram(self) -> Tensor | None:
        """The conjugate of G, inputs^H inputs."""
        return None if self.inputs is None else self.inputs.mH @ self.inputs

    @cached_property
    def total(self) -> float:
        """Norm of the targets, the denominator of relative errors; 1 if it is zero."""
        return norm(self.targets) or 1.0

    def error(self, difference: Tensor) -> Tensor:
        """Map a difference of weights (out, in) to the residual (rows, out) whose norm is the error."""
        rows = difference.mT if self.inputs is None else self.inputs @ difference.mT
        return rows if self.outputs is None else rows @ self.outputs

    def relative_error(self, approximation: Tensor) -> float:
        """Compute the error of a dense approximation (out, in) relative to the norm of the targets."""
        return norm(self.error(self.weight - approximation.to(self.weight.dtype))) / self.total

    def low_rank(self, difference: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Factor the best approximation of a difference (out, in) whose outputs lie in the span of a basis (out, rank).

        The basis is orthonormal, in the coordinates of `targets`. Returns left (out, rank) and right (rank, in), of
        equal norms in each term. No inverse of G is needed.
        """
        if self.outputs is None:
            left, right = basis.conj(), basis.mT @ difference
        else:
            left, right = torch.linalg.solve(self.outputs.mT, basis.conj()), (self.outputs @ basis).mT @ difference
        large, small = torch.linalg.vector_norm(right, dim=1), torch.linalg.vector_norm(left, dim=0)
        share = torch.where((large > 0) & (small > 0), (large / small).sqrt(), 1.0).to(left.dtype)
        return left * share, right / share.unsqueeze(1)

    def to(self, dtype: torch.dtype) -> Objective:
        """Convert all tensors to a dtype."""
        roots = (None if root is None else root.to(dtype) for root in (self.inputs, self.outputs))
        return Objective(self.weight.to(dtype), *roots)


@dataclass(frozen=True)
class GramRoot:
    """Gram square root: rows X (rows, n) with X^T conj(X) = G / (mean of its diagonal)."""

    rows: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> GramRoot | None:
        """Compute the root of a positive semi-definite G (n, n) in float64 or complex128, of any scale, even singular.

        None for G = 0, which carries no information.
        """
        gram = gram.detach().to(linalg.working_dtype(gram))
        largest = gram.abs().max()
        if largest == 0:
            return None
        gram = gram / largest  # its entries may be near the largest or smallest floats
        mean = gram.diagonal().real.mean()
        values, vectors = torch.linalg.eigh((gram + gram.mH) / (2 * mean))
        kept = values > _NOISE * values[-1]
        return cls((values[kept].sqrt() * vectors[:, kept]).mT)


def make_objective(
    weight: Tensor, gram: Tensor | GramRoot | None = None, output_gram: Tensor | None = None
) -> tuple[Objective, float]:
    """Check and normalise the arguments of a fit (`fit` describes them).

    Returns:
        The objective in float64 (complex128), and the scale that its weight was divided by. Weight and targets have a
        root mean square of 1 unless they are zero.
    Raises:
        ValueError: if a Gram has the wrong shape or values that are not finite.
    """
    out_features, in_features = weight.shape
    exact = weight.detach().to(linalg.working_dtype(weight))
    scale = norm(exact) / math.sqrt(exact.numel()) or 1.0
    exact = exact / scale
    inputs = outputs = None
    if gram is not None:
        if isinstance(gram, Tensor):
            _check("gram", gram, [(in_features, in_features)])
        root = GramRoot.of(gram) if isinstance(gram, Tensor) else gram
        inputs = None if root is None else root.rows.to(exact, copy=True)
    if output_gram is not None:
        _check("output_gram", output_gram, [(out_features, out_features), (out_features,)])
        metric = (torch.diag(output_gram) if output_gram.ndim == 1 else output_gram).to(exact)
        mean = metric.diagonal().real.mean()
        if mean > 0:
            # The ridge makes a singular H invertible, as `low_rank` needs it.
            root = GramRoot.of(metric / mean + 1e-6 * torch.eye(out_features).to(exact))
            assert root is not None
            outputs = root.rows.mT
    size = norm(Objective(exact, inputs, outputs).targets) / math.sqrt(exact.numel()) or 1.0
    if inputs is not None:
        inputs.div_(size)  # in place: a wide layer's is the largest matrix of its fit
    elif outputs is not None:
        outputs = outputs / size
    return Objective(exact, inputs, outputs), scale


def _check(name: str, gram: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if tuple(gram.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(gram.shape)}; this weight needs {' or '.join(map(str, shapes))}")
    if not torch.isfinite(gram).all():
        raise ValueError(f"{name} holds NaN or infinite values; collect it in float64, or from finite inputs")


def leading_basis(rows: Tensor, rank: int) -> Tensor:
    """Compute the orthonormal basis (n, rank) of the leading right singular vectors (conjugated) of rows (m, n)."""
    exact = rows.to(linalg.working_dtype(rows))
    if exact.shape[0] >= exact.shape[1]:  # the eigenproblem of the smaller side
        return torch.linalg.eigh(exact.mH @ exact)[1][:, -rank:].to(rows.dtype)
    left = torch.linalg.eigh(exact @ exact.mH)[1][:, -rank:]
    images = exact.mH @ left
    if rank > left.shape[1]:  # more columns than rows can give: qr completes the basis
        images = torch.nn.functional.pad(images, (0, rank - left.shape[1]))
    return torch.linalg.qr(images)[0].to(rows.dtype)


def norm(tensor: Tensor) -> float:
    """Return the Frobenius norm, computed in float64."""
    wide = torch.promote_types(tensor.dtype, torch.float64)  # the squares of 1e30 overflow float32
    return torch.linalg.vector_norm(tensor, dtype=wide).item()

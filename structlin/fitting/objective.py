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
    tokens. Where a root of G is larger than the weight, G itself is there in its place. None is the identity; without
    all, this is the Frobenius error. G or its root may have fewer digits than the weight: products with it do too.
    """

    weight: Tensor  # the target W, (out_features, in_features), with entries near 1
    inputs: Tensor | None = None  # (rows, in_features) with inputs^T conj(inputs) = G
    outputs: Tensor | None = None  # (out_features, out_features) with outputs outputs^H = conj(H), invertible
    gram: Tensor | None = None  # conj(G), (in_features, in_features), in place of `inputs`

    @property
    def plain(self) -> bool:
        """Whether the objective is the Frobenius error."""
        return self.inputs is None and self.outputs is None and self.gram is None

    @cached_property
    def targets(self) -> Tensor:
        """Outputs of the weight for `inputs` or `gram`, which the approximation is to match: (rows, out_features)."""
        return self._product(self.weight)

    @cached_property
    def total(self) -> float:
        """Norm of the weight, the denominator of relative errors; 1 if it is zero."""
        return self.error(self.weight) or 1.0

    def error(self, difference: Tensor) -> float:
        """Compute the root of the squared error that a difference of weights (out, in) is."""
        if self.gram is None:
            return norm(self._image(difference))
        return math.sqrt(max(inner(self._columns(difference), self._image(difference)), 0.0))

    def relative_error(self, approximation: Tensor) -> float:
        """Compute the error of a dense approximation (out, in) relative to the norm of the weight."""
        return self.error(self.weight - approximation.to(self.weight.dtype)) / self.total

    def basis(self, difference: Tensor, rank: int) -> Tensor:
        """Compute the orthonormal basis (out, rank) of outputs on which a difference (out, in) is the largest."""
        if self.gram is None:
            return leading_basis(self._image(difference), rank)
        return linalg.leading_vectors(self._energy(difference), rank).to(difference.dtype)

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Return the energies of the weight's outputs, ascending, and their orthonormal directions (out, number)."""
        if self.gram is not None:
            return torch.linalg.eigh(self._energy(self.weight))
        rows = self.targets
        if rows.shape[0] >= rows.shape[1]:
            return torch.linalg.eigh(rows.mH @ rows)
        energy, left = torch.linalg.eigh(rows @ rows.mH)
        vectors = rows.mH @ left
        return energy, vectors / torch.linalg.vector_norm(vectors, dim=0).clamp_min(1e-300)

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
        others = (None if each is None else each.to(dtype) for each in (self.inputs, self.outputs, self.gram))
        return Objective(self.weight.to(dtype), *others)

    def _columns(self, difference: Tensor) -> Tensor:
        return difference.mT if self.outputs is None else difference.mT @ self.outputs  # (in, out)

    def _image(self, difference: Tensor) -> Tensor:
        return self.targets if difference is self.weight else self._product(difference)

    def _product(self, difference: Tensor) -> Tensor:
        """Multiply the columns of a difference by `inputs` or `gram`: (rows, out)."""
        columns, factor = self._columns(difference), self.inputs if self.gram is None else self.gram
        return columns if factor is None else (factor @ columns.to(factor.dtype)).to(columns.dtype)

    def _energy(self, difference: Tensor) -> Tensor:
        energy = self._columns(difference).mH @ self._image(difference)  # (out, out)
        return energy.to(linalg.working_dtype(energy))


@dataclass(frozen=True)
class InputGram:
    """G of the inputs of layers, of a mean diagonal of about 1, and a square root, computed once if needed."""

    matrix: Tensor

    @classmethod
    def of(cls, gram: Tensor, shrinkage: float = 0.0) -> InputGram | None:
        """Normalise a positive semi-definite G (n, n) of any scale, even singular, in float32 or more.

        The shrinkage, relative to the mean of the diagonal, is added to it. None for G = 0, which carries no
        information.
        """
        gram = gram.detach().to(torch.promote_types(gram.dtype, torch.float32))
        largest = torch.linalg.vector_norm(gram, math.inf)
        if largest == 0:
            return None
        gram = gram / largest  # its entries may be near the largest or smallest floats
        gram.div_(gram.diagonal().real.mean()).diagonal().add_(shrinkage)
        return cls(gram)

    @cached_property
    def root(self) -> Tensor:
        """Rows X (rows, n) with X^T conj(X) = G: the Cholesky factor, or from eigenvectors if G is singular."""
        gram = self.matrix.to(linalg.working_dtype(self.matrix))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            values, vectors = torch.linalg.eigh((gram + gram.mH) / 2)
            kept = values > _NOISE * values[-1]
            factor = values[kept].sqrt() * vectors[:, kept]
        return factor.mT.to(self.matrix.dtype)


def make_objective(
    weight: Tensor, gram: Tensor | InputGram | None = None, output_gram: Tensor | None = None
) -> tuple[Objective, float]:
    """Check and normalise the arguments of a fit (`fit` describes them).

    Returns:
        The objective in float64 (complex128), but for a Gram of fewer digits if the weight has no more; and the scale
        that its weight was divided by. The weight has a root mean square of 1 unless it is zero, as have the roots.
    Raises:
        ValueError: if a Gram has the wrong shape or values that are not finite.
    """
    out_features, in_features = weight.shape
    exact = weight.detach().to(linalg.working_dtype(weight))
    scale = norm(exact) / math.sqrt(exact.numel()) or 1.0
    exact = exact / scale
    inputs = outputs = matrix = None
    if isinstance(gram, Tensor):
        _check("gram", gram, [(in_features, in_features)])
        gram = InputGram.of(gram)
    if gram is not None:
        digits = torch.promote_types(gram.matrix.dtype, weight.dtype)
        if in_features > out_features:  # a root would have as many entries, and cost more than all the rest
            matrix = gram.matrix.to(digits).conj().resolve_conj()
        else:
            inputs = gram.root.to(digits)
    if output_gram is not None:
        _check("output_gram", output_gram, [(out_features, out_features), (out_features,)])
        metric = (torch.diag(output_gram) if output_gram.ndim == 1 else output_gram).to(exact)
        mean = metric.diagonal().real.mean()
        if mean > 0:
            # The ridge makes a singular H invertible, as `low_rank` needs it.
            root = InputGram.of(metric / mean + 1e-6 * torch.eye(out_features).to(exact))
            assert root is not None
            outputs = root.root.mH.resolve_conj()
    return Objective(exact, inputs, outputs, matrix), scale


def _check(name: str, gram: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if tuple(gram.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(gram.shape)}; this weight needs {' or '.join(map(str, shapes))}")
    if not torch.isfinite(gram).all():
        raise ValueError(f"{name} holds NaN or infinite values; collect it in float64, or from finite inputs")


def leading_basis(rows: Tensor, rank: int) -> Tensor:
    """Compute the orthonormal basis (n, rank) of the leading right singular vectors (conjugated) of rows (m, n)."""
    exact = rows.to(linalg.working_dtype(rows))
    if exact.shape[0] >= exact.shape[1]:  # the eigenproblem of the smaller side
        return linalg.leading_vectors(exact.mH @ exact, rank).to(rows.dtype)
    left = linalg.leading_vectors(exact @ exact.mH, min(rank, exact.shape[0]))
    images = exact.mH @ left
    if rank > left.shape[1]:  # more columns than rows can give: qr completes the basis
        images = torch.nn.functional.pad(images, (0, rank - left.shape[1]))
    return torch.linalg.qr(images)[0].to(rows.dtype)


def norm(tensor: Tensor) -> float:
    """Return the Frobenius norm, computed in float64."""
    wide = torch.promote_types(tensor.dtype, torch.float64)  # the squares of 1e30 overflow float32
    return torch.linalg.vector_norm(tensor, dtype=wide).item()


def inner(a: Tensor, b: Tensor) -> float:
    """Return the real part of the inner product of two matrices of one shape."""
    pairs = zip(a.split(1024), b.split(1024), strict=True)  # small copies of what is not contiguous
    return sum(torch.vdot(x.reshape(-1), y.reshape(-1)).real.item() for x, y in pairs)

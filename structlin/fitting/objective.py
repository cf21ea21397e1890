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
RIDGE = 1e-6  # of an output Gram's mean eigenvalue, added to all: a singular one becomes invertible
_INDEFINITE = "has negative eigenvalues; give sum x x^H, which has none"
PART = 512  # rows or columns of a weight of which an error is computed at a time
SLACK = 1e-3  # relative asymmetry and negative eigenvalues that rounded sums over many tokens may have


@dataclass(frozen=True)
class Objective:
    """The squared error ||inputs (W - What)^T outputs||^2 = tr(H (W - What) G (W - What)^H).

    `inputs` and `outputs` are Gram square roots, of G and H: at most `in_features` rows stand for all calibration
    tokens. Where a root of G is larger than the weight, G itself is there in its place. None is the identity; without
    all, this is the Frobenius error. G or its root may have fewer digits than the weight: products with it do too.
    """

    weight: Tensor  # the target W, (out_features, in_features), with entries near 1
    inputs: Tensor | None = None  # (rows, in_features) with inputs^T conj(inputs) = G
    outputs: Tensor | None = None  # (out, out) with outputs outputs^H = conj(H), invertible; (out,) for a diagonal H
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
        columns = self.weighted(difference.mT)
        parts = columns.split(PART, dim=1)  # the products of all at once would be as large as the weight
        images = self.targets.split(PART, dim=1) if difference is self.weight else map(self._times, parts)
        square = sum(inner(part, image) for part, image in zip(parts, images, strict=True))
        if square < 0 and square < -SLACK * norm(columns) ** 2:
            raise ValueError(f"gram {_INDEFINITE}")
        return math.sqrt(max(square, 0.0))

    def relative_error(self, approximation: Tensor) -> float:
        """Compute the error of a dense approximation (out, in) relative to the norm of the weight."""
        return self.error(self.weight - approximation.to(self.weight.dtype)) / self.total

    def scales(self) -> Tensor:
        """Return the product of the diagonals of H and G at each entry of the weight, (out, in)."""
        found = torch.ones_like(self.weight)
        if self.inputs is not None:
            found = found * torch.linalg.vector_norm(self.inputs, dim=0).square()
        if self.gram is not None:
            found = found * self.gram.diagonal().real.clamp_min(0)
        if self.outputs is not None:
            roots = self.outputs if self.outputs.ndim == 1 else torch.linalg.vector_norm(self.outputs, dim=1)
            found = found * roots.square().unsqueeze(1)
        return found.to(self.weight.dtype)

    def gradient(self, difference: Tensor) -> Tensor:
        """Return half the gradient of the squared error for a difference (out, in)."""
        if self.gram is None:
            image = self._image(difference)
            back = image if self.inputs is None else (self.inputs.mH @ image.to(self.inputs.dtype)).to(image.dtype)
        else:
            back = self._image(difference)
        if self.outputs is None:
            return back.mT
        return (back * self.outputs if self.outputs.ndim == 1 else back @ self.outputs.mH).mT

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
        elif self.outputs.ndim == 1:
            roots = self.outputs.unsqueeze(1)
            left, right = basis.conj() / roots, (roots * basis).mT @ difference
        else:
            left, right = torch.linalg.solve(self.outputs.mT, basis.conj()), (self.outputs @ basis).mT @ difference
        large, small = torch.linalg.vector_norm(right, dim=1), torch.linalg.vector_norm(left, dim=0)
        share = torch.where((large > 0) & (small > 0), (large / small).sqrt(), 1.0).to(left.dtype)
        return left * share, right / share.unsqueeze(1)

    def to(self, dtype: torch.dtype) -> Objective:
        """Convert all tensors to a dtype."""
        others = (None if each is None else each.to(dtype) for each in (self.inputs, self.outputs, self.gram))
        return Objective(self.weight.to(dtype), *others)

    def weighted(self, rows: Tensor) -> Tensor:
        """Multiply rows of outputs (n, out) by the root of H."""
        if self.outputs is None:
            return rows
        return rows * self.outputs if self.outputs.ndim == 1 else rows @ self.outputs

    def _image(self, difference: Tensor) -> Tensor:
        return self.targets if difference is self.weight else self._product(difference)

    def _product(self, difference: Tensor) -> Tensor:
        """Multiply the columns of a difference by `inputs` or `gram`: (rows, out)."""
        return self._times(self.weighted(difference.mT))

    def _times(self, columns: Tensor) -> Tensor:
        factor = self.inputs if self.gram is None else self.gram
        return columns if factor is None else (factor @ columns.to(factor.dtype)).to(columns.dtype)

    def _energy(self, difference: Tensor) -> Tensor:
        energy = self.weighted(difference.mT).mH @ self._image(difference)  # (out, out)
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
            if values[0] < -SLACK * torch.linalg.vector_norm(values):
                raise ValueError(f"a Gram {_INDEFINITE}")
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
        ValueError: if a Gram has the wrong shape or is none, see `defect`; or if the weight's norm overflows.
    """
    out_features, in_features = weight.shape
    exact = weight.detach().to(linalg.working_dtype(weight))
    scale = norm(exact) / math.sqrt(exact.numel()) or 1.0
    if scale == math.inf:
        raise ValueError(f"the norm of the weight exceeds the largest {exact.dtype}; divide the weight by 2**20")
    exact = divided(exact, scale)
    inputs = outputs = matrix = None
    if gram is not None:
        _check("gram", gram, [(in_features, in_features)])
        gram = InputGram.of(gram) if isinstance(gram, Tensor) else gram
    if gram is not None:
        digits = torch.promote_types(gram.matrix.dtype, weight.dtype)
        if in_features > out_features:  # a root would have as many entries, and cost more than all the rest
            matrix = gram.matrix.to(digits).conj().resolve_conj()
        else:
            inputs = gram.root.to(digits)
    if output_gram is not None:
        _check("output_gram", output_gram, [(out_features, out_features), (out_features,)])
        metric = output_gram.detach().to(exact)
        mean = (metric if metric.ndim == 1 else metric.diagonal()).real.mean()
        if mean > 0 and metric.ndim == 1:
            outputs = (metric / mean + RIDGE).sqrt()
        elif mean > 0:
            outputs = _invertible_root(metric / mean + RIDGE * torch.eye(out_features).to(exact))
    return Objective(exact, inputs, outputs, matrix), scale


def _invertible_root(metric: Tensor) -> Tensor:
    """Return the square root (n, n) that `Objective.outputs` is, of H (n, n) with a ridge."""
    found = InputGram.of(metric)
    assert found is not None
    if len(found.root) == len(metric):
        return found.root.mH.resolve_conj()
    # Rounding has left eigenvalues below minus the ridge: the root was cut, and would have no inverse.
    values, vectors = torch.linalg.eigh((found.matrix + found.matrix.mH) / 2)
    return (values.clamp_min(RIDGE * values[-1]).sqrt() * vectors).conj().resolve_conj()


def _check(name: str, gram: Tensor | InputGram, shapes: list[tuple[int, ...]]) -> None:
    shape = tuple((gram if isinstance(gram, Tensor) else gram.matrix).shape)
    if shape not in shapes:
        raise ValueError(f"{name} has shape {shape}; this weight needs {' or '.join(map(str, shapes))}")
    if isinstance(gram, Tensor) and (reason := defect(gram)):
        raise ValueError(f"{name} {reason}")


def defect(gram: Tensor) -> str | None:
    """Say why a matrix (n, n), or a diagonal (n,), cannot be a sum of x x^H, as far as its entries show; else None."""
    if not (gram.is_floating_point() or gram.is_complex()):
        return f"has dtype {gram.dtype}; use a float or complex one"
    if not torch.isfinite(gram).all():
        return "holds NaN or infinite values; collect it in float64, or from finite inputs"
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    if (diagonal.real < 0).any():
        least = diagonal.real.min().item()
        return f"has {least:.4g} on its diagonal; give sum x x^H, whose diagonal is a sum of squares"
    if gram.ndim == 1 or not gram.any():
        return None
    unit = _unit(gram)
    asymmetry = torch.linalg.vector_norm(unit - unit.mH, math.inf).item()
    if asymmetry > _slack(gram):
        return f"is not Hermitian: it differs from its adjoint by {asymmetry:.2g} of its largest entry; give sum x x^H"
    roots = unit.diagonal().real.sqrt()
    if (unit.abs() > roots * roots.unsqueeze(1) + _slack(gram)).any():  # Cauchy and Schwarz
        return _INDEFINITE
    return None


def indefinite(gram: Tensor) -> str | None:
    """Say so if a Hermitian matrix has negative eigenvalues, up to `SLACK`; else None.  Cost: n^3 / 3 in float32."""
    if not gram.any():
        return None
    unit = _unit(gram)
    unit.diagonal().add_(_slack(gram) * torch.linalg.vector_norm(unit))
    return _INDEFINITE if torch.linalg.cholesky_ex(unit)[1] else None


def _slack(gram: Tensor) -> float:
    return max(SLACK, 4 * torch.finfo(gram.dtype).eps)


def _unit(gram: Tensor) -> Tensor:
    """Divide by the largest entry, in float32."""
    return (gram / torch.linalg.vector_norm(gram, math.inf)).to(torch.complex64 if gram.is_complex() else torch.float32)


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
    found: float = torch.linalg.vector_norm(tensor, dtype=wide).item()
    if 1e-140 < found < math.inf:
        return found
    largest = torch.linalg.vector_norm(tensor, math.inf, dtype=wide).item()
    if largest == 0 or not math.isfinite(largest):
        return found
    # The squares of 1e200 overflow float64, and those of 1e-200 are 0.
    scale = 2.0 ** (1 - max(math.frexp(largest)[1], -1020))
    return float(torch.linalg.vector_norm(tensor.to(wide) * scale).item()) / scale


def divided(tensor: Tensor, scale: float) -> Tensor:
    """Divide by a scale, also by one that has no reciprocal in float64: torch divides complex numbers by it."""
    lift = 1.0 if 1e-140 < scale < 1e140 else 2.0 ** -max(math.frexp(scale)[1], -1020)
    return (tensor if lift == 1 else tensor * lift) / (scale * lift)


def inner(a: Tensor, b: Tensor) -> float:
    """Return the real part of the inner product of two matrices of one shape."""
    pairs = zip(a.split(1024), b.split(1024), strict=True)  # small copies of what is not contiguous
    return sum(torch.vdot(x.reshape(-1), y.reshape(-1)).real.item() for x, y in pairs)

"""The geometry of a structured matrix: the dimension of the set of its matrices, and the maps it is composed of."""

from __future__ import annotations

from collections import Counter

from structlin.equation.spec import Absorption, Equation, Factor, Spec


def dimension(spec: Spec) -> int:
    """Return how many independent directions the entries of the matrix have: at most the parameters, and in x out.

    Factors that share modes can be changed against each other without a change of the product. On bonds that only two
    factors hold, any invertible matrix may stand (a gauge), one for each value of the other modes that they share.
    Along a tree of pairs of factors such changes are independent, so the dimension is at most the parameters less those
    of the best tree. That is the rank of the Jacobian at generic factors, but for padding and for products with gauges
    of their own (several Kronecker sums, say), where it is an upper bound.

    Example:
        >>> from structlin.equation.spec import Spec, equation
        >>> low_rank = equation("o r, r i -> o i", ("left", "right"), {"o": 6, "r": 2, "i": 5})
        >>> dimension(Spec(5, 6, (low_rank,)))  # r (in + out - r)
        18
    """
    kept = spec.num_parameters - sum(_gauge(eq) for eq in spec.equations)
    return min(kept, spec.in_features * spec.out_features)


def _gauge(eq: Equation) -> int:
    """Return the dimension of the gauges along the best tree that joins the learned factors."""
    holders = Counter(mode for factor in eq.factors for mode in factor.modes)
    outside = {*eq.outputs, *eq.inputs}

    def between(a: Factor, b: Factor) -> int:
        shared = [mode for mode in a.modes if mode in b.modes]
        free = [mode for mode in shared if holders[mode] == 2 and mode not in outside]
        return eq.numel(shared) * eq.numel(free)

    joined, *left = [factor for factor in eq.factors if factor.learned]
    best = [(between(joined, factor), factor) for factor in left]
    total = 0
    while best:  # Prim's algorithm
        gain, nearest = max(best, key=lambda pair: pair[0])
        total += gain
        best = [(max(old, between(nearest, factor)), factor) for old, factor in best if factor is not nearest]
    return total


def applied(eq: Equation) -> tuple[Absorption, ...]:
    """Return the steps that apply the factors to an input one by one, from the end where that costs less."""
    numbers = range(len(eq.factors))
    return min((eq.absorb(numbers), eq.absorb(numbers[::-1])), key=lambda steps: sum(step.flops(eq) for step in steps))


def composition(spec: Spec) -> str:
    """Describe the map as a sequence of geometric ones, the summands joined by a plus.

    A factor that makes fewer numbers than it reads is a projection, one that makes more an embedding, one that makes
    as many a rotation and scaling (its SVD). It is blockwise where it has a block for each value of some modes, and a
    Kronecker factor, A (x) I, where it leaves other modes alone.

    Example:
        >>> from structlin.equation.spec import Spec, equation
        >>> low_rank = equation("o r, r i -> o i", ("left", "right"), {"o": 6, "r": 2, "i": 5})
        >>> composition(Spec(5, 6, (low_rank,)))
        'projection to 2, embedding into 6'
    """
    return " + ".join(", ".join(_step(eq, step) for step in applied(eq)) for eq in spec.equations)


def _step(eq: Equation, step: Absorption) -> str:
    before, after = eq.numel(step.batch + step.free + step.summed), eq.numel(step.kept)
    kind = "blockwise " * bool(step.batch) + "Kronecker " * bool(step.free)
    if after == before:
        return f"{kind}rotation and scaling"
    return f"{kind}projection to {after}" if after < before else f"{kind}embedding into {after}"

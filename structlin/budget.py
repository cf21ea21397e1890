"""Sizes from a ratio: the largest members of a structure within a parameter budget."""

from __future__ import annotations

from structlin.structure import Structure

# Where the steps of a structure are so coarse that more than COARSE of the budget stays unused, SLACK more is allowed
# (PHM-2 is half of the dense parameters plus eight numbers).
COARSE = 0.05
SLACK = 0.01


def within(cls: type[Structure], in_features: int, out_features: int, ratio: float) -> list[Structure]:
    """Return the candidates of a structure that keep at most `ratio` of the dense parameters.

    One candidate per choice of shape, each as large as fits; the fit decides between them.

    Args:
        cls: the structure's class.
        in_features: size of the input.
        out_features: size of the output.
        ratio: parameters kept / dense parameters (bias excluded), in (0, 1].
    Returns:
        Resolved structures, at least one.
    Raises:
        ValueError: if ratio is out of range, or so small that no member fits.
    """
    check_ratio(ratio)
    dense = in_features * out_features
    found = _sized(cls, in_features, out_features, int(ratio * dense + 1e-9))
    if not found or max(found.values()) < (1 - COARSE) * ratio * dense:
        found |= _sized(cls, in_features, out_features, int((1 + SLACK) * ratio * dense))
    if not found:
        raise ValueError(
            f"no {cls.name} structure of a {out_features} x {in_features} layer keeps {ratio:.3g} of its parameters or "
            "fewer; use a larger ratio or another structure"
        )
    return list(found)


def check_ratio(ratio: float) -> None:
    """Refuse a ratio that is not a share of the dense parameters.

    Raises:
        ValueError: if it is outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} is outside (0, 1]; it is parameters kept / dense parameters")


def _sized(cls: type[Structure], in_features: int, out_features: int, budget: int) -> dict[Structure, int]:
    """Candidates and their parameters."""
    resolved = [c.resolve(in_features, out_features) for c in cls.candidates(in_features, out_features, budget)]
    sizes = {structure: structure.spec(in_features, out_features).num_parameters for structure in resolved}
    return {structure: size for structure, size in sizes.items() if size <= budget}

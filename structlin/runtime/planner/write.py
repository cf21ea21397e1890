"""Write products down as data: numbers of operands, and how they are read."""

from __future__ import annotations

from collections.abc import Callable

from structlin.equation.spec import Equation, Modes
from structlin.runtime.planner.plan import TOKENS, Merge, Shape, Step, View
from structlin.runtime.planner.products import Groups, Merged, Product, blocks


class Writer:
    """Numbers the factors of an equation and what comes of merging them, and notes their shapes.

    Args:
        eq: the equation.
        merged: how the factors lo..hi-1 are merged.
    """

    def __init__(self, eq: Equation, merged: Callable[[int, int], Merged]) -> None:
        self.eq = eq
        self.merged = merged
        self.shapes = [self.encoded(factor.modes) for factor in eq.factors]
        self.merges: list[Merge] = []

    def merge(self, lo: int, hi: int) -> int:
        """Append what merges the factors lo..hi-1; return the number of the result."""
        merged = self.merged(lo, hi)
        if merged.product is None:
            return lo
        a, b = self.merge(lo, merged.middle), self.merge(merged.middle, hi)
        left, right = (b, a) if merged.product.swapped else (a, b)
        left_side, right_side = merged.product.sides
        left_view, right_view = self.view(*left_side, self.shapes[left]), self.view(*right_side, self.shapes[right])
        self.merges.append(
            Merge(left, right, left_view, right_view, merged.product.broadcast, merged.product.cost)
        )  # fmt: skip
        self.shapes.append(self.shape_of(merged.product))
        return len(self.shapes) - 1

    def step(self, lo: int, hi: int, product: Product, shape: Shape) -> Step:
        """The product of activations of a shape with the merged factors lo..hi-1."""
        factor = self.merge(lo, hi)
        left, right = product.sides
        operand, side = (left, right) if product.swapped else (right, left)
        factor_view, view = self.view(*operand, self.shapes[factor]), self.view(*side, shape)
        return Step(factor, factor_view, view, product.swapped, product.broadcast, product.cost)

    def dense(self) -> View:
        """Merge all factors; how the result is read as (outputs, inputs)."""
        count = len(self.eq.factors)
        last = self.merge(0, count)
        return self.view(self.merged(0, count).modes, ((), self.eq.outputs, self.eq.inputs), False, self.shapes[last])

    def shape_of(self, product: Product) -> Shape:
        """Shape of what a product gives."""
        return self.stacked((product.right_groups[0], product.left_groups[1], product.right_groups[2]))

    def view(self, modes: Modes, groups: Groups, copy: bool, shape: Shape) -> View:
        """How to read a tensor of a shape, with these modes, by groups."""
        order = tuple(mode for group in groups for mode in group)
        target = self.stacked(groups)
        if modes == order:
            return View(None, None, target if target != shape else None, copy)
        parts = blocks(modes, order)  # torch turns matrices faster than it permutes
        axes = tuple(sorted(range(len(parts)), key=lambda k: order.index(parts[k][0])))
        split = tuple(map(self.extent, parts))
        permuted = tuple(split[k] for k in axes)
        return View(split if split != shape else None, axes, target if target != permuted else None, copy)

    def stacked(self, groups: Groups) -> Shape:
        shape = tuple(self.extent(group) for group in groups)
        return shape if groups[0] else shape[1:]

    def encoded(self, modes: Modes) -> tuple[int, ...]:
        return tuple(self.extent((mode,)) for mode in modes)

    def extent(self, modes: Modes) -> int:
        return -1 if TOKENS in modes else self.eq.numel(modes)

"""Write the products that the search has found as merges and steps of a plan."""

from __future__ import annotations

from collections.abc import Callable

from structlin.equation.spec import Equation, Modes
from structlin.runtime.planner.plan import TOKENS, Merge, Shape, Step, View
from structlin.runtime.planner.products import Groups, Merged, Product, blocks


class Writer:
    """Give each factor of an equation, and each result of a merge, a slot with a known shape."""

    def __init__(self, eq: Equation, merged: Callable[[int, int], Merged]) -> None:
        self.eq = eq
        self.merged = merged  # says how to merge the factors lo..hi-1
        self.shapes: list[Shape] = [eq.shape(factor.modes) for factor in eq.factors]
        self.merges: list[Merge] = []

    def merge(self, lo: int, hi: int) -> int:
        """Append the merges of the factors lo..hi-1 and return the slot of the result."""
        merged = self.merged(lo, hi)
        if merged.product is None:
            return lo
        a, b = self.merge(lo, merged.middle), self.merge(merged.middle, hi)
        left, right = (b, a) if merged.product.swapped else (a, b)
        left_side, right_side = merged.product.sides
        left_view, right_view = self.view(*left_side, self.shapes[left]), self.view(*right_side, self.shapes[right])
        self.merges.append(Merge(left, right, left_view, right_view, merged.product.broadcast, merged.product.cost))
        self.shapes.append(self.shape_of(merged.product))
        return len(self.shapes) - 1

    def step(self, lo: int, hi: int, product: Product, shape: Shape) -> Step:
        """Return the product of activations of this shape with the merged factors lo..hi-1."""
        factor = self.merge(lo, hi)
        left, right = product.sides
        operand, side = (left, right) if product.swapped else (right, left)
        factor_view, view = self.view(*operand, self.shapes[factor]), self.view(*side, shape)
        return Step(factor, factor_view, view, product.swapped, product.broadcast, product.cost)

    def dense(self) -> View:
        """Merge all factors and return how to read the result as the dense matrix (outputs, inputs)."""
        count = len(self.eq.factors)
        last = self.merge(0, count)
        return self.view(self.merged(0, count).modes, ((), self.eq.outputs, self.eq.inputs), False, self.shapes[last])

    def shape_of(self, product: Product) -> Shape:
        """Return the shape of a product's result."""
        return self.stacked((product.right_groups[0], product.left_groups[1], product.right_groups[2]))

    def view(self, modes: Modes, groups: Groups, copy: bool, shape: Shape) -> View:
        """Return how to read a tensor with these modes and this shape as (batch, rows, columns)."""
        order = tuple(mode for group in groups for mode in group)
        target = self.stacked(groups)
        if modes == order:
            return View(None, None, target if target != shape else None, copy)
        # Permute runs of neighbouring modes as one axis: torch transposes matrices faster than it permutes stacks.
        parts = blocks(modes, order)
        axes = tuple(sorted(range(len(parts)), key=lambda k: order.index(parts[k][0])))
        split = tuple(map(self.extent, parts))
        permuted = tuple(split[k] for k in axes)
        return View(split if split != shape else None, axes, target if target != permuted else None, copy)

    def stacked(self, groups: Groups) -> Shape:
        shape = tuple(self.extent(group) for group in groups)
        return shape if groups[0] else shape[1:]

    def extent(self, modes: Modes) -> int:
        return -1 if TOKENS in modes else self.eq.numel(modes)

"""Any permutation as a K-matrix of width 1: a Benes network."""

from __future__ import annotations

import torch
from torch import Tensor

from structlin.exact.steps import Program, Step, to_layer
from structlin.exact.transforms import Device, binary
from structlin.structures.butterfly import Digits
from structlin.structures.kaleidoscope import KaleidoscopeLinear


def permutation(order: Tensor, *, dtype: torch.dtype = torch.float32, device: Device = None) -> KaleidoscopeLinear:
    """Write y = x[order] as a K-matrix of width 1, a network of switches.

    Cost: 2 n (2 log2(n) - 1) entries; finding the switches takes O(n log n) steps.

    Args:
        order: the numbers 0 to n - 1 in any order, n a power of two.
        dtype: any float or complex dtype.
        device: of the layer.
    Raises:
        ValueError: if the numbers are not a permutation, or n is no power of two.
    Source: Benes 1965; Waksman 1968 (finding the switches).
    Example:
        >>> permutation(torch.tensor([2, 0, 3, 1]))(torch.tensor([10.0, 11.0, 12.0, 13.0])).tolist()
        [12.0, 10.0, 13.0, 11.0]
    """
    sizes = binary(len(order))
    return to_layer(switches(order, sizes), sizes, 1, dtype, device)


def switches(order: Tensor, sizes: Digits) -> Program:
    """Find the switches of y = x[order] over binary digits: from the first digit to the last, and back."""
    wanted = order.tolist()
    if sorted(wanted) != list(range(len(wanted))):
        raise ValueError(f"order must hold each of 0 to {len(wanted) - 1} once")
    if len(wanted) == 1:
        return []
    parts, before, after = [wanted], list[Step](), list[Step]()
    for d in range(len(sizes) - 1):
        found = [_halved(part) for part in parts]
        others = sizes[:d] + sizes[d + 1 :]  # which half of which half, then the place in it
        before.append(_switch(d, [crossed for crossed, _, _ in found], others))
        after.append(_switch(d, [crossed for _, crossed, _ in found], others))
        parts = [half for _, _, halves in found for half in halves]
    middle = _switch(len(sizes) - 1, [[part[0] == 1] for part in parts], sizes[:-1])
    return [*before, middle, *reversed(after)]


def _halved(order: list[int]) -> tuple[list[bool], list[bool], tuple[list[int], list[int]]]:
    """Split a permutation: which inputs l and l + half cross, which outputs do, and what each half then has to do."""
    half = len(order) // 2
    source = [0] * len(order)
    for place, number in enumerate(order):
        source[number] = place
    side = [-1] * len(order)  # of each output: the half that it comes through
    for start in range(half):
        place = start
        while side[place] < 0:
            mate = (place + half) % len(order)
            side[place], side[mate] = 0, 1
            place = source[(order[mate] + half) % len(order)]  # what the mate's input shares a switch with
    halves = ([0] * half, [0] * half)
    for place, number in enumerate(order):
        halves[side[place]][place % half] = number % half
    return [side[source[k]] == 1 for k in range(half)], [side[k] == 1 for k in range(half)], halves


def _switch(digit: int, crossed: list[list[bool]], others: Digits) -> Step:
    flags = torch.tensor(crossed).view(*others, 1, 1)
    straight = torch.eye(2, dtype=torch.float64)
    return Step(digit, torch.where(flags, straight.flip(0), straight))

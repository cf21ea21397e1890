"""Linear arithmetic circuits as K-matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from structlin.exact.permutations import switches
from structlin.exact.steps import Program, Step, to_layer
from structlin.exact.transforms import Device, binary
from structlin.structures.butterfly import Digits
from structlin.structures.kaleidoscope import KaleidoscopeLinear

Gate = tuple[int, float, int, float]  # (i, a, j, b): a value_i + b value_j


def circuit(
    gates: Sequence[Gate],
    n: int,
    outputs: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = None,
) -> KaleidoscopeLinear:
    """Write a linear circuit of depth d with s gates as a K-matrix of width at most 4 d + 3 and expansion O(1 + s / n).

    Every value has a place, and every gate a second place beside its own. For each level of depth, the operands of all
    gates go to their places (a permutation that packs them, a butterfly that copies, a permutation), and the two places
    of each gate are added.

    Args:
        gates: (i, a, j, b) computes a value_i + b value_j. Values 0 to n - 1 are the inputs, n + k is gate k's.
        n: number of inputs and of outputs, a power of two.
        outputs: the values to return, n of them; None takes the last n.
        dtype: any float or complex dtype.
        device: of the layer.
    Raises:
        ValueError: if a gate reads a value that is not there yet, or there are not n outputs.
    Source: Dao et al. 2020, Kaleidoscope, theorem 1. Copies: Lee 1988 (nonblocking copy networks).
    Example:
        >>> circuit([(0, 1.0, 1, 2.0), (2, 3.0, 0, 1.0)], 2).to_dense().tolist()
        [[1.0, 2.0], [4.0, 6.0]]
    """
    count = n + len(gates)
    wanted = list(range(count - n, count) if outputs is None else outputs)
    if len(wanted) != n or not all(0 <= value < count for value in wanted):
        raise ValueError(f"outputs={wanted}; give {n} values from 0 to {count - 1}")
    depth = [0] * n
    for k, (i, _, j, _) in enumerate(gates):
        if not (0 <= i < n + k and 0 <= j < n + k):
            raise ValueError(f"gate {k} reads values {i} and {j}; there are {n + k} before it")
        depth.append(1 + max(depth[i], depth[j]))
    sizes = binary(n)
    expansion = 1
    while expansion * n < n + n % 2 + 2 * len(gates):
        expansion *= 2
    total = expansion * n
    place = [*range(n), *(n + n % 2 + 2 * k for k in range(len(gates)))]  # a gate's second place is the next
    bits = binary(total)
    steps: Program = []
    for level in range(1, max(depth) + 1):
        reads, scales = dict(zip(range(total), range(total), strict=True)), torch.ones(total, dtype=torch.float64)
        added = torch.zeros(total, dtype=torch.bool)
        for k, (i, a, j, b) in enumerate(gates):
            if depth[n + k] == level:
                at = place[n + k]
                reads[at], reads[at + 1] = place[i], place[j]
                scales[at], scales[at + 1] = a, b
                added[at] = True
        pair = torch.diag_embed(scales.view(-1, 2))
        pair[added[0::2], 0, 1] = pair[added[0::2], 1, 1]
        steps += [*copies(reads, bits), Step(len(bits) - 1, pair.view(*bits[:-1], 2, 2))]
    final = {k: place[wanted[k]] if k < n else k for k in range(total)}
    return to_layer(_wider([*steps, *copies(final, bits)], sizes, bits), sizes, expansion, dtype, device)


def copies(reads: Mapping[int, int], bits: Digits) -> Program:
    """Write y[k] = x[reads[k]] over binary digits; several k may read one entry, and others none."""
    total = len(reads)
    order = sorted(range(total), key=lambda k: reads[k])  # all readers of an entry side by side
    sources = sorted(set(reads.values()))
    rank = {source: q for q, source in enumerate(sources)}
    unread = [k for k in range(total) if k not in rank]
    packed = torch.tensor([*sources, *unread])  # place q holds the q-th entry that is read
    spread, origin = list[Step](), [rank[reads[k]] for k in order]
    for d in range(len(bits)):
        # Before this digit, a copy for k stands where the higher digits are k's and the others those of its origin.
        low = 1 << (len(bits) - 1 - d)
        blocks = torch.zeros(total // 2, 2, 2, dtype=torch.float64)
        for k, q in enumerate(origin):
            new, old = k // low % 2, q // low % 2
            blocks[k // (2 * low) * low + q % low, new, old] = 1
        spread.append(Step(d, blocks.view(*bits[:-1], 2, 2)))
    back = torch.empty(total, dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(total)
    return [*switches(packed, bits), *spread, *switches(back, bits)]


def _wider(steps: Program, sizes: Digits, bits: Digits) -> Program:
    """Merge the leading binary digits into one, the expanded first digit of a K-matrix."""
    merged = len(bits) - len(sizes) + 1
    if merged == 1:
        return steps
    first = 2**merged
    found = []
    for step in steps:
        if step.digit >= merged:
            others = step.blocks.expand(*bits[:-1], 2, 2).reshape(first, *sizes[1:-1], 2, 2)
            found.append(Step(step.digit - merged + 1, others))
            continue
        full = step.blocks.expand(*bits[:-1], 2, 2)  # (other digits .., new, old)
        high = full.reshape(2**step.digit, 2 ** (merged - 1 - step.digit), -1, 2, 2)
        wide = torch.zeros(high.shape[2], *(2**step.digit, 2, high.shape[1]) * 2, dtype=full.dtype)
        a, c = torch.arange(high.shape[0])[:, None], torch.arange(high.shape[1])[None]
        wide[:, a, :, c, a, :, c] = high
        found.append(Step(0, wide.reshape(*sizes[1:], first, first)))
    return found

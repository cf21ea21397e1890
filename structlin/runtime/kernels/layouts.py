"""Choose directions of chains and layouts of activations for the native kernel: modes only, no tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile, zip_longest
from typing import Any, NamedTuple

from structlin.equation.spec import Absorption, Equation, Modes, Spec
from structlin.runtime.costs import FAR, LANES, MOVED, NEAR, SHARED_FLOP, SHARED_RUN, TURNED, VECTOR

_BEAM = 4  # layouts kept per position of the chain

_State = tuple[float, Modes, Any]  # seconds, layout, and the links so far as nested pairs (last link, those before)


@dataclass(frozen=True)
class Link:
    """One absorbed factor, with the layouts of the activations before and after it."""

    absorbed: Absorption
    before: Modes
    after: Modes

    @property
    def outer(self) -> Modes:
        """The modes of the activations that stay, in their layout: first those that the factor holds too."""
        absorbed = self.absorbed
        return tuple(sorted(absorbed.batch + absorbed.free, key=lambda m: (m in absorbed.free, self.before.index(m))))

    def run(self, eq: Equation) -> int:
        """Count the innermost outer indices that share a block of the factor and are contiguous before and after."""
        same = takewhile(
            lambda pair: pair[0] == pair[1], zip(reversed(self.before), reversed(self.after), strict=False)
        )
        return eq.numel(tuple(takewhile(lambda mode: mode in self.absorbed.free, (mode for mode, _ in same))))

    def in_order(self, eq: Equation) -> bool:
        """Return whether the kernel reads the factor as stored: its last modes are those summed, or a batch mode."""
        modes, summed = eq.factors[self.absorbed.factor].modes, self.absorbed.summed
        return modes[len(modes) - len(summed) :] == summed or modes[-1] in self.absorbed.batch

    def cost(self, eq: Equation) -> Cost:
        """Count the cost for one token."""
        absorbed, flops = self.absorbed, self.absorbed.flops(eq)
        if self.run(eq) >= SHARED_RUN:  # vectors run along outer indices
            return Cost(flops, flops, 0, 0, 0)
        vectors = eq.numel(absorbed.kept) * (-(-eq.numel(absorbed.summed) // LANES) + 2)
        entries = 0 if self.in_order(eq) else eq.numel(eq.factors[absorbed.factor].modes)
        return Cost(flops, 0, vectors, entries if entries <= NEAR else FAR * entries, 0)


class Cost(NamedTuple):
    """The cost of a chain for one token."""

    flops: int  # of all stages
    shared: int  # FLOPs of the stages whose vectors run along outer indices that share a block of the factor
    vectors: int  # in all other stages: vectors of the factors' rows, and two for each sum across lanes
    turned: int  # entries of factors that are gathered into order first; those of large factors count FAR times
    moved: int  # entries of input and output that are copied into another layout

    @property
    def seconds(self) -> float:
        """Predicted time for a single token."""
        moved = self.turned * TURNED + self.moved * MOVED
        return 1e-9 * (self.shared * SHARED_FLOP + self.vectors * VECTOR + moved)


@lru_cache(maxsize=1024)
def links(spec: Spec, few: bool) -> tuple[tuple[Link, ...], ...]:
    """Choose the chain of each equation, for tiles of tokens or (`few`) for single tokens.

    Tiles are fast in any layout, because their vectors run over tokens; summing over neighbours suits the caches best.
    Vectors of a single token run over modes, so its layouts are searched: a tensor train of rank 4 then takes a third
    to a half of the time that it takes in the tiles' layouts. A single equation may also permute its input and output;
    several equations share theirs, in natural order.
    """
    return tuple(_cheaper(eq, few, len(spec.equations) == 1) for eq in spec.equations)


def links_of(spec: Spec, absorbed: Sequence[Sequence[Absorption]]) -> tuple[tuple[Link, ...], ...]:
    """Choose the layouts for single tokens of chains whose directions are given."""
    alone = len(spec.equations) == 1
    return tuple(_searched(eq, chain, alone) for eq, chain in zip(spec.equations, absorbed, strict=True))


@lru_cache(maxsize=1024)
def cost(spec: Spec, few: bool) -> Cost:
    """Count the cost of all equations; cheap even where the tables would be huge."""
    return _sum(_cost(eq, chain) for eq, chain in zip(spec.equations, links(spec, few), strict=True))


def _cost(eq: Equation, chain: Sequence[Link]) -> Cost:
    moved = [_moved(eq, eq.inputs, chain[0].before), _moved(eq, eq.outputs, chain[-1].after)]
    return _sum([*moved, *(link.cost(eq) for link in chain)])


def _moved(eq: Equation, natural: Modes, layout: Modes) -> Cost:
    return Cost(0, 0, 0, 0, 0 if layout == natural else eq.numel(natural))


def _sum(costs: Iterable[Cost]) -> Cost:
    return Cost(*map(sum, zip(*costs, strict=True)))


def _cheaper(eq: Equation, few: bool, alone: bool) -> tuple[Link, ...]:
    """Take the direction with fewer FLOPs; where they nearly tie, the one that gathers fewer entries into order."""
    numbers = range(len(eq.factors))
    both = [eq.absorb(order) for order in (numbers, numbers[::-1])]
    if few:
        return min((_searched(eq, absorbed, alone) for absorbed in both), key=lambda chain: _cost(eq, chain).seconds)

    def weight(chain: tuple[Link, ...]) -> float:
        cost = _cost(eq, chain)
        return cost.flops + 0.1 * cost.turned

    return min((_as_read(eq, absorbed) for absorbed in both), key=weight)


def _as_read(eq: Equation, absorbed: Sequence[Absorption]) -> tuple[Link, ...]:
    """Lay out the activations so that the next sum runs over neighbours."""
    inner = (_read_by(eq, one, following) for one, following in pairwise(absorbed))
    return tuple(
        Link(one, *around) for one, around in zip(absorbed, pairwise([eq.inputs, *inner, eq.outputs]), strict=True)
    )


def _read_by(eq: Equation, absorbed: Absorption, following: Absorption) -> Modes:
    """Move the modes along which the next factor is read to the innermost place: its summed modes, or a batch mode."""
    final = eq.factors[following.factor].modes[-1]
    innermost = (final,) if final in following.batch else following.summed
    return tuple(mode for mode in absorbed.kept if mode not in innermost) + innermost


def _in_place(absorbed: Absorption, before: Modes) -> Modes:
    """Put the new modes where the first of the summed ones stood: the modes behind stay contiguous."""
    place = min(before.index(mode) for mode in absorbed.summed)
    return (*before[:place], *absorbed.new, *(mode for mode in before[place:] if mode not in absorbed.summed))


def _searched(eq: Equation, absorbed: Sequence[Absorption], alone: bool) -> tuple[Link, ...]:
    """Find the fastest layouts for a single token, by beam search over the positions of the chain.

    Two layouts are tried after each factor: the one that the next factor reads along (`_read_by`), and the one that
    keeps runs of untouched modes contiguous (`_in_place`), so that vectors can run along them.
    """
    when = {mode: step for step, one in enumerate(absorbed) for mode in one.summed}
    as_summed = tuple(sorted(eq.inputs, key=lambda mode: when.get(mode, len(absorbed))))
    first = [eq.inputs, as_summed] if alone else [eq.inputs]
    states: list[_State] = [(_moved(eq, eq.inputs, layout).seconds, layout, None) for layout in first]
    for one, following in zip_longest(absorbed, absorbed[1:]):
        found: list[_State] = []
        for seconds, before, chain in states:
            afters = [_read_by(eq, one, following) if following else eq.outputs]
            if one.summed and (following or alone):
                afters.append(_in_place(one, before))
            for after in afters:
                link = Link(one, before, after)
                moved = 0.0 if following else _moved(eq, eq.outputs, after).seconds
                found.append((seconds + link.cost(eq).seconds + moved, after, (link, chain)))
        best: dict[Modes, _State] = {}
        for state in sorted(found, key=lambda state: state[0]):
            best.setdefault(state[1], state)
        states = list(best.values())[:_BEAM]
    links, rest = [], states[0][2]
    while rest:
        link, rest = rest
        links.append(link)
    return tuple(reversed(links))

"""Choose directions of chains and layouts of activations for the native kernel: modes only, no tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile, zip_longest
from typing import Any, NamedTuple

from structlin.equation.spec import Equation, Modes, Spec

# What a single token costs, in ns, as measured: a FLOP in vectors along outer indices that share their block of the
# factor; a vector of a row of a factor, or two of its sum, in any other way; an entry of a factor that is put in order
# first, and of an input or output.
SHARED_FLOP, VECTOR, TURNED, MOVED = 0.007, 0.4, 0.4, 1.0
RUN = 8  # shared outer indices that are worth vectors of their own
LANES = 16
NEAR, FAR = 1 << 14, 4  # entries that are put in order quickly; of more, each takes so many times longer

_BEAM = 4  # layouts kept per position of the chain

_State = tuple[float, Modes, Any]  # seconds, layout, and the links so far, the last first


@dataclass(frozen=True)
class Role:
    """What one factor does: its modes that stay, those of the activations that it does not touch, new and summed."""

    factor: int
    batch: Modes
    free: Modes
    new: Modes
    summed: Modes

    def flops(self, eq: Equation) -> int:
        """For one token."""
        return 2 * eq.numel(self.batch + self.free + self.new + self.summed)

    def in_order(self, eq: Equation) -> bool:
        """Whether the factor's innermost modes are those that are summed, or one that is shared."""
        modes = eq.factors[self.factor].modes
        return modes[len(modes) - len(self.summed) :] == self.summed or modes[-1] in self.batch


@dataclass(frozen=True)
class Link:
    """A factor absorbed, and the layouts of the activations before and after it."""

    role: Role
    before: Modes
    after: Modes

    @property
    def outer(self) -> Modes:
        """The modes of the activations that stay, those of the factor first, as they are laid out."""
        return tuple(
            sorted(self.role.batch + self.role.free, key=lambda m: (m in self.role.free, self.before.index(m)))
        )

    def run(self, eq: Equation) -> int:
        """How many outer indices in a row share their block of the factor, and stand in a row before and after."""
        same = takewhile(
            lambda pair: pair[0] == pair[1], zip(reversed(self.before), reversed(self.after), strict=False)
        )
        return eq.numel(tuple(takewhile(lambda mode: mode in self.role.free, (mode for mode, _ in same))))

    def cost(self, eq: Equation) -> Cost:
        """What it costs for one token."""
        role, flops = self.role, self.role.flops(eq)
        if self.run(eq) >= RUN:
            return Cost(flops, flops, 0, 0, 0)
        vectors = eq.numel(role.batch + role.free + role.new) * (-(-eq.numel(role.summed) // LANES) + 2)
        entries = 0 if role.in_order(eq) else eq.numel(eq.factors[role.factor].modes)
        return Cost(flops, 0, vectors, entries if entries <= NEAR else FAR * entries, 0)


class Cost(NamedTuple):
    """What a chain costs for one token.

    Args:
        flops: of all stages.
        shared: those of them in shared runs.
        vectors: of the rows of factors, and two for each sum, in the other stages.
        turned: entries of factors that are put in order first, those of large factors counted several times.
        moved: entries of input and output that come into another layout.
    """

    flops: int
    shared: int
    vectors: int
    turned: int
    moved: int

    @property
    def seconds(self) -> float:
        """Predicted for a single token."""
        moved = self.turned * TURNED + self.moved * MOVED
        return 1e-9 * (self.shared * SHARED_FLOP + self.vectors * VECTOR + moved)


@lru_cache(maxsize=1024)
def links(spec: Spec, few: bool) -> tuple[tuple[Link, ...], ...]:
    """Choose the chain of each equation.

    Tiles of tokens are fast in any layout; where the next sum runs over neighbours they make the best of the caches.
    For single tokens the fastest layouts are searched. Then a single equation may lay out its input and output as it
    likes; several share theirs as they are.

    Args:
        spec: the structured matrix.
        few: for single tokens.
    """
    return tuple(_cheaper(eq, few, len(spec.equations) == 1) for eq in spec.equations)


@lru_cache(maxsize=1024)
def cost(spec: Spec, few: bool) -> Cost:
    """The cost of all equations; cheap, also where the tables would be huge."""
    return _sum(_cost(eq, chain) for eq, chain in zip(spec.equations, links(spec, few), strict=True))


def _cost(eq: Equation, chain: Sequence[Link]) -> Cost:
    moved = [_moved(eq, eq.inputs, chain[0].before), _moved(eq, eq.outputs, chain[-1].after)]
    return _sum([*moved, *(link.cost(eq) for link in chain)])


def _moved(eq: Equation, natural: Modes, layout: Modes) -> Cost:
    return Cost(0, 0, 0, 0, 0 if layout == natural else eq.numel(natural))


def _sum(costs: Iterable[Cost]) -> Cost:
    return Cost(*map(sum, zip(*costs, strict=True)))


def _cheaper(eq: Equation, few: bool, alone: bool) -> tuple[Link, ...]:
    """The direction with fewer FLOPs; where they are nearly equal, with factors in order."""
    both = [_roles(eq, forward) for forward in (True, False)]
    if few:
        return min((_searched(eq, roles, alone) for roles in both), key=lambda chain: _cost(eq, chain).seconds)

    def weight(chain: tuple[Link, ...]) -> float:
        cost = _cost(eq, chain)
        return cost.flops + 0.1 * cost.turned

    return min((_as_read(eq, roles) for roles in both), key=weight)


def _roles(eq: Equation, forward: bool) -> tuple[Role, ...]:
    """Absorb the factors of an equation one by one."""
    order = range(len(eq.factors)) if forward else range(len(eq.factors) - 1, -1, -1)
    roles = []
    state: Modes = eq.inputs
    for step, k in enumerate(order):
        modes = eq.factors[k].modes
        needed = {*eq.outputs, *(mode for later in order[step + 1 :] for mode in eq.factors[later].modes)}
        known = [mode for mode in modes if mode in state]
        role = Role(
            k,
            batch=tuple(mode for mode in known if mode in needed),
            free=tuple(mode for mode in state if mode not in modes),
            new=tuple(mode for mode in modes if mode not in state),
            summed=tuple(mode for mode in known if mode not in needed),
        )
        roles.append(role)
        state = role.batch + role.free + role.new
    return tuple(roles)


def _as_read(eq: Equation, roles: Sequence[Role]) -> tuple[Link, ...]:
    """Layouts in which the next sum runs over neighbours."""
    layouts = [eq.inputs, *(_read_by(eq, role, following) for role, following in pairwise(roles)), eq.outputs]
    return tuple(Link(role, *around) for role, around in zip(roles, pairwise(layouts), strict=True))


def _read_by(eq: Equation, role: Role, following: Role) -> Modes:
    """The next sum runs over the innermost modes, in the order of its factor, or its vectors along a shared mode."""
    final = eq.factors[following.factor].modes[-1]
    innermost = (final,) if final in following.batch else following.summed
    return tuple(mode for mode in role.batch + role.free + role.new if mode not in innermost) + innermost


def _in_place(role: Role, before: Modes) -> Modes:
    """The new modes stand where the first of the summed ones stood."""
    place = min(before.index(mode) for mode in role.summed)
    ahead, behind = ([mode for mode in part if mode not in role.summed] for part in (before[:place], before[place:]))
    return (*ahead, *role.new, *behind)


def _as_summed(eq: Equation, roles: Sequence[Role]) -> Modes:
    """The input's modes in the order in which they are summed."""
    when = {mode: step for step, role in enumerate(roles) for mode in role.summed}
    return tuple(sorted(eq.inputs, key=lambda mode: when.get(mode, len(roles))))


def _searched(eq: Equation, roles: Sequence[Role], alone: bool) -> tuple[Link, ...]:
    """The fastest layouts for a single token, by dynamic programming over the positions of the chain."""
    first = [eq.inputs, _as_summed(eq, roles)] if alone else [eq.inputs]
    states: list[_State] = [(_moved(eq, eq.inputs, layout).seconds, layout, None) for layout in first]
    for role, following in zip_longest(roles, roles[1:]):
        found: list[_State] = []
        for seconds, before, chain in states:
            afters = [_read_by(eq, role, following) if following else eq.outputs]
            if role.summed and (following or alone):
                afters.append(_in_place(role, before))
            for after in afters:
                link = Link(role, before, after)
                moved = 0.0 if following else _moved(eq, eq.outputs, after).seconds
                found.append((seconds + link.cost(eq).seconds + moved, after, (link, chain)))
        best: dict[Modes, _State] = {}
        for state in sorted(found, key=lambda state: state[0]):
            best.setdefault(state[1], state)
        states = list(best.values())[:_BEAM]
    links = []
    rest = states[0][2]
    while rest:
        link, rest = rest
        links.append(link)
    return tuple(reversed(links))

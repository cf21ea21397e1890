"""The planner: counts by hand, brute force on toys, overrides; integers only."""

import itertools
import math
import subprocess
import sys

import pytest

from structlin import KroneckerLinear, LowRankLinear, PHMLinear, planner
from structlin.planner import CPU, ORDERS, Machine, Plan, bucket, find_plan, flops_per_token, thinness
from structlin.spec import Spec, equation
from structlin.structures import Butterfly, Kaleidoscope, Kronecker, LowRank, Monarch, TensorTrain


def spec_of(structure, in_features, out_features):
    return structure.resolve(in_features, out_features).spec(in_features, out_features)


# Counts by hand ------------------------------------------------------------------------------------------------------


def test_low_rank_literals():
    plan = find_plan(spec_of(LowRank(rank=4), 64, 32), 8, order="backward")
    # x (8, 64) @ right^T: 2 * 8 * 64 * 4; then @ left^T: 2 * 8 * 4 * 32.
    assert [step.flops for step in plan.parts[0].steps] == [4096, 2048]
    # Bytes of float32: both operands and the result, no copies.
    assert [step.nbytes for step in plan.parts[0].steps] == [4 * (512 + 256 + 32), 4 * (32 + 128 + 256)]
    assert [step.ops for step in plan.parts[0].steps] == [1, 1]
    assert plan.flops == 6144
    assert plan.nbytes == 4864


def test_kronecker_literals_in_both_orders():
    spec = spec_of(Kronecker(terms=3, shape=((2, 5), (7, 11))), 55, 14)
    tokens = 4
    # Left first: (tokens, i1, i2) -> (tokens, t, o1, i2) -> (tokens, o1, o2).
    left = 2 * tokens * 3 * (2 * 5 * 11) + 2 * tokens * 3 * (2 * 7 * 11)
    # Right first: (tokens, i1, i2) -> (tokens, i1, t, o2) -> (tokens, o1, o2).
    right = 2 * tokens * 3 * (7 * 11 * 5) + 2 * tokens * 3 * (2 * 5 * 7)
    assert find_plan(spec, tokens, order="forward").flops == left
    assert find_plan(spec, tokens, order="backward").flops == right
    assert flops_per_token(spec) == min(left, right) // tokens


def test_butterfly_and_kmatrix_literals():
    # Two FLOPs per parameter and token: every stage reads each of its blocks once.
    for structure in (Butterfly(radix=2), Butterfly(), Kaleidoscope(width=2), Monarch(blocks=8)):
        spec = spec_of(structure, 64, 64)
        assert flops_per_token(spec) == 2 * spec.num_parameters
    assert spec_of(Butterfly(radix=2), 64, 64).num_parameters == 2 * 64 * 6
    assert spec_of(Kaleidoscope(width=2), 64, 64).num_parameters == 5 * 64 * 8


def test_materialise_literals():
    spec = spec_of(LowRank(rank=4), 64, 32)
    plan = find_plan(spec, 8, order="materialise")
    assert [step.flops for step in plan.parts[0].steps] == [2 * 32 * 4 * 64, 2 * 8 * 64 * 32]
    assert plan.materialises


# Search --------------------------------------------------------------------------------------------------------------


def sizes_of(eq, tokens):
    return {**eq.size, planner.TOKENS: tokens}


def brute_force(eq, tokens):
    """Fewest FLOPs over all orders that merge neighbours and absorb groups from one end, by plain recursion."""
    size = sizes_of(eq, tokens)
    factors = [set(factor.modes) for factor in eq.factors]
    external = {*eq.outputs, *eq.inputs}

    def cost(a, b, needed):
        return 2 * math.prod(size[m] for m in a | b), (a | b) & needed

    def merge(lo, hi):
        if hi - lo == 1:
            return [(0, factors[lo])]
        needed = external.union(*factors[:lo], *factors[hi:])
        found = []
        for middle in range(lo + 1, hi):
            for (left, a), (right, b) in itertools.product(merge(lo, middle), merge(middle, hi)):
                step, modes = cost(a, b, needed)
                found.append((left + right + step, modes))
        return found

    def absorb(state, lo, hi, forward):
        if lo == hi:
            return 0
        best = math.inf
        for length in range(1, hi - lo + 1):
            cut = (lo, lo + length) if forward else (hi - length, hi)
            rest = (lo + length, hi) if forward else (lo, hi - length)
            needed = {planner.TOKENS, *eq.outputs}.union(*factors[rest[0] : rest[1]])
            for flops, modes in merge(*cut):
                step, after = cost(state, modes, needed)
                best = min(best, flops + step + absorb(after, *rest, forward))
        return best

    start = {planner.TOKENS, *eq.inputs}
    return min(absorb(start, 0, len(factors), forward) for forward in (True, False))


TOYS = {
    "low rank": spec_of(LowRank(rank=3), 10, 12),
    "kronecker": spec_of(Kronecker(terms=3, shape=((2, 5), (7, 2))), 10, 14),
    "phm": spec_of(Kronecker(terms=4, shape=((2, 2), (5, 6))), 12, 10),
    "tt": spec_of(TensorTrain(rank=(3, 4, 2), in_modes=(2, 3, 2, 3), out_modes=(3, 2, 2, 2)), 36, 24),
    "butterfly": spec_of(Butterfly(radix=2), 16, 16),
    "kmatrix": spec_of(Kaleidoscope(width=2), 12, 12),
    "monarch": spec_of(Monarch(blocks=2, rank=2), 8, 12),
    "rectangular": spec_of(Butterfly(in_modes=(2, 3), out_modes=(5, 4)), 6, 20),
}


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("name", TOYS)
def test_search_equals_brute_force(name, tokens, monkeypatch):
    # On a machine where only FLOPs cost, and thin products cost as much as others.
    monkeypatch.setattr(planner, "thinness", lambda *_: 1.0)
    (eq,) = TOYS[name].equations
    machine = Machine(f"flops only, {name}", flops=1.0, bandwidth=math.inf, op=0.0)  # its own entry in the cache
    plan = find_plan(TOYS[name], tokens, machine=machine)
    assert plan.flops == plan.seconds == brute_force(eq, tokens)


@pytest.mark.parametrize("name", TOYS)
def test_auto_is_never_predicted_slower_than_an_order(name):
    for tokens in (1, 16, 512):
        auto = find_plan(TOYS[name], tokens)
        assert all(auto.seconds <= find_plan(TOYS[name], tokens, order=order).seconds for order in ORDERS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", TOYS)
def test_costs_grow_with_the_tokens(name, order):
    plans = [find_plan(TOYS[name], tokens, order=order) for tokens in (1, 4, 64, 1024)]
    for smaller, larger in itertools.pairwise(plans):
        assert smaller.flops <= larger.flops
        assert smaller.seconds <= larger.seconds


def test_materialise_where_it_pays():
    # 96 balanced terms have eight times the FLOPs of the dense product.
    many = spec_of(Kronecker(terms=96), 384, 384)
    assert find_plan(many, 4096).materialises
    assert not find_plan(spec_of(LowRank(rank=8), 384, 384), 4096).materialises
    assert not find_plan(spec_of(Kronecker(terms=4), 1024, 1024), 512).materialises


def test_bytes_and_ops_decide_where_flops_do_not():
    spec = spec_of(TensorTrain(rank=2, in_modes=(4, 4, 4), out_modes=(4, 4, 4)), 64, 64)
    slow_ops = Machine("slow ops", flops=1e12, bandwidth=1e12, op=1.0)
    fewest = find_plan(spec, 64, machine=slow_ops)
    assert sum(step.ops for step in fewest.parts[0].steps) <= min(
        sum(step.ops for step in find_plan(spec, 64, machine=slow_ops, order=order).parts[0].steps)
        for order in ("forward", "backward", "materialise")
    )


def test_plans_of_a_sum_add_up():
    sizes = {"o": 8, "r": 2, "i": 8}
    first = equation("o r, r i -> o i", ("a", "b"), sizes)
    second = equation("o r, r i -> o i", ("c", "d"), sizes)
    plan = find_plan(Spec(8, 8, (first, second)), 4)
    single = find_plan(Spec(8, 8, (first,)), 4)
    assert len(plan.parts) == 2
    assert plan.flops == 2 * single.flops
    assert plan.nbytes == 2 * single.nbytes
    assert plan.seconds == pytest.approx(2 * single.seconds)


@pytest.mark.parametrize(("batch", "rows", "columns", "low", "high"), [
    (1, 512, 512, 1.0, 1.1), (1, 1024, 1, 2, 3), (64, 1024, 1, 25, 35), (64, 192, 2, 15, 20), (8, 1, 64, 2, 3),
])  # fmt: skip
def test_thin_products_are_slow(batch, rows, columns, low, high):
    assert low <= thinness(batch, rows, columns) <= high


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_any_number_of_tokens_plans(tokens):
    for spec in TOYS.values():
        assert find_plan(spec, tokens).seconds >= 0


@pytest.mark.parametrize(("tokens", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (512, 512), (513, 1024)])
def test_bucket(tokens, expected):
    assert bucket(tokens) == expected


# Long chains and printing --------------------------------------------------------------------------------------------


def test_long_chain_plans_quickly():
    spec = spec_of(Kaleidoscope(radix=2), 4096, 4096)
    assert len(spec.factors) == 23
    code = (
        "import time; from structlin.structures import Kaleidoscope; from structlin.planner import find_plan\n"
        "spec = Kaleidoscope(radix=2).resolve(4096, 4096).spec(4096, 4096)\n"
        "start = time.process_time(); find_plan(spec, 32); print(time.process_time() - start)"
    )
    seconds = min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(2))
    assert seconds < 0.5


def test_plan_prints_order_flops_bytes_and_time():
    text = str(LowRankLinear(64, 32, rank=4).plan(tokens=8, order="backward"))
    assert text.splitlines()[0] == "o r, r i -> o i"
    assert "2 products for 8 tokens" in text
    assert "6,144 FLOPs" in text
    assert "4,864 B" in text
    assert "ms predicted" in text
    assert "materialise" in str(LowRankLinear(64, 32, rank=4).plan(tokens=8, order="materialise"))
    assert CPU.name in text


# Overrides -----------------------------------------------------------------------------------------------------------


def test_override_by_order_and_by_plan():
    layer = KroneckerLinear(64, 64, terms=2)
    layer.use_plan("materialise")
    assert layer._plan_for(8).materialises
    chosen = layer.plan(8, "backward")
    layer.use_plan(chosen)
    assert layer._plan_for(1000) is chosen
    layer.use_plan("auto")
    assert layer._plan_for(8) == layer.plan(8)


def test_bad_overrides():
    layer = KroneckerLinear(64, 64, terms=2)
    with pytest.raises(ValueError, match="order='sideways' is unknown; use one of"):
        layer.use_plan("sideways")
    with pytest.raises(ValueError, match="the plan contracts"):
        layer.use_plan(PHMLinear(64, 64).plan(8))
    assert isinstance(layer.plan(8), Plan)

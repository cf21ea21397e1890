"""The planner: counts by hand, brute force on toys, overrides; integers only."""

import itertools
import math
from functools import partial

import pytest
from cases import SMALL

from structlin import KroneckerLinear, LowRankLinear, PHMLinear
from structlin.equation.spec import Spec, equation
from structlin.runtime import costs, planner
from structlin.runtime.planner import CPU, ORDERS, Machine, Plan, bucket, flops_per_token, merge_plan, thinness
from structlin.runtime.planner.products import blocks, needs_copy
from structlin.structures import Butterfly, Kaleidoscope, Kronecker, LowRank, Monarch, TensorTrain

find_plan = partial(planner.find_plan, machine=CPU)


def spec_of(structure, in_features, out_features):
    return structure.resolve(in_features, out_features).spec(in_features, out_features)


# Counts by hand ------------------------------------------------------------------------------------------------------


def test_low_rank_literals():
    plan = find_plan(spec_of(LowRank(rank=4), 64, 32), 8, order="backward")
    # x (8, 64) @ right^T: 2 * 8 * 64 * 4; then @ left^T: 2 * 8 * 4 * 32.
    costs = plan.parts[0].counted
    assert [cost.flops for cost in costs] == [4096, 2048]
    # Bytes of float32: both operands and the result, no copies.
    assert [cost.nbytes for cost in costs] == [4 * (512 + 256 + 32), 4 * (32 + 128 + 256)]
    assert [cost.ops for cost in costs] == [1, 1]
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
    assert [cost.flops for cost in plan.parts[0].counted] == [2 * 32 * 4 * 64, 2 * 8 * 64 * 32]
    assert plan.materialises


def test_activations_literals():
    spec = spec_of(TensorTrain(rank=(3, 4), in_modes=(2, 3, 5), out_modes=(5, 2, 2)), 30, 20)
    # (i1 i2 i3) -> (o1 r1 i2 i3) = 225 -> (o1 i3 o2 r2) = 200 -> (o1 o2 o3): both are copied before they are read.
    plan = find_plan(spec, 8, order="forward")
    assert [step.view.copy for step in plan.parts[0].steps] == [False, True, True]
    assert (plan.inner, plan.widest) == (2 * (225 + 200), 225)
    # (i1 i2 i3) -> (i1 i2 r2 o3) = 48 -> (i1 r1 o2 o3) = 24 -> (o1 o2 o3), without copies.
    plan = find_plan(spec, 8, order="backward")
    assert [step.view.copy for step in plan.parts[0].steps] == [False, False, False]
    assert (plan.inner, plan.widest) == (48 + 24, 48)
    # Backward, a product holds what is saved so far, the gradient that it is given (of outputs: none) and that of what
    # it reads, 30 = x, 48 or 24 per token; and the gradient of its factor.
    assert plan.saved == 48 + 24
    assert plan.parts[0].held == ((0 + 48 + 30, 40), (48 + 24 + 48, 72), (48 + 24 + 0 + 24, 30))
    assert plan.held(8) == 8 * (48 + 24 + 48) + 72 + 30


@pytest.mark.parametrize(("structure", "in_features", "out_features"), SMALL)
def test_flops_per_token_are_those_of_the_cheaper_plan_on_any_machine(structure, in_features, out_features):
    spec = spec_of(structure, in_features, out_features)
    for machine in (CPU, planner.H200):
        plans = [find_plan(spec, 1, machine=machine, order=order) for order in ("forward", "backward")]
        pairs = zip(*(plan.parts for plan in plans), strict=True)
        assert flops_per_token(spec) == sum(min(one.flops, other.flops) for one, other in pairs)


def test_merges_of_the_dense_matrix_follow_the_machine_that_is_given():
    (eq,) = spec_of(TensorTrain(rank=(3, 4), in_modes=(2, 3, 5), out_modes=(5, 2, 2)), 30, 20).equations
    # Last two cores first: 2 * (3 * 6 * 4 * 10 + 10 * 3 * 60). First two first: 2 * (10 * 3 * 6 * 4 + 60 * 4 * 10),
    # which suits a machine with large tiles.
    for machine, flops in ((CPU, 5040), (planner.H200, 6240)):
        merges, _ = merge_plan(eq, machine=machine)
        assert sum(merge.cost.flops for merge in merges) == flops


def test_folding_costs_nothing_for_each_input():
    for name, spec in TOYS.items():
        folded, each = find_plan(spec, 8, folded=True), find_plan(spec, 8)
        assert folded.seconds <= each.seconds, name
        assert all(not step.factor_view.copy for part in folded.parts for step in part.steps), name
    dense = find_plan(spec_of(Kaleidoscope(width=4), 64, 64), 1, folded=True)
    assert dense.materialises
    assert dense.flops == 2 * 64 * 64
    assert "factors folded once" in str(dense)


def test_plans_that_fold_alike_share_it():
    spec = spec_of(LowRank(rank=4), 64, 32)
    assert find_plan(spec, 8, folded=True).folds == find_plan(spec, 16, folded=True).folds
    assert find_plan(spec, 8, order="materialise").folds != find_plan(spec, 8, order="backward").folds


def test_chunks_keep_the_activations_small():
    machine = Machine("a cache", flops=1e9, bandwidth=1e9, op=0.0, core_cache=4 * 225 * 64)
    spec = spec_of(TensorTrain(rank=(3, 4), in_modes=(2, 3, 5), out_modes=(5, 2, 2)), 30, 20)
    # Room for 64 tokens and for 32, where 128 are not much more, for 8, where 32 are not, and for 256.
    for itemsize, tokens in ((4, 128), (8, 128), (32, 32), (1, 256)):
        assert find_plan(spec, 512, order="forward", itemsize=itemsize, machine=machine).chunk == tokens
    assert find_plan(spec, 512, machine=planner.H200).chunk > 1 << 20


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
def test_search_equals_brute_force(name, tokens):
    # On a machine where only FLOPs cost, and thin products cost as much as others.
    (eq,) = TOYS[name].equations
    machine = Machine("flops only", flops=1.0, bandwidth=math.inf, op=0.0, tile=1)
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

    def ops(order):
        return sum(cost.ops for cost in find_plan(spec, 64, machine=slow_ops, order=order).parts[0].counted)

    assert ops("auto") <= min(ops(order) for order in ("forward", "backward", "materialise"))


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


@pytest.mark.parametrize(("batch", "rows", "summed", "columns", "low", "high"), [
    (1, 512, 512, 512, 1.0, 1.1), (1, 1024, 1024, 1, 1.5, 3), (64, 1024, 64, 1, 25, 35), (64, 192, 64, 2, 15, 25),
    (8, 1, 64, 64, 2, 4), (64, 1, 4, 64, 40, 50), (0, 1, 1, 1, 1, 1),
])  # fmt: skip
def test_thin_products_are_slow(batch, rows, summed, columns, low, high):
    assert low <= thinness(batch, rows, summed, columns, CPU.per_row) <= high


def test_a_machine_predicts():
    rates = {"flops": 100.0, "half_flops": 200.0, "bandwidth": 10.0, "far_bandwidth": 5.0, "copy_bandwidth": 4.0}
    rates["transpose_bandwidth"] = 8.0
    machine = Machine("m", op=1.0, cache=100, tile=1, **rates)
    assert machine.product(1, 1, 1, 1, itemsize=4) == 12 / 10 + 1
    assert machine.product(1, 10, 1, 10, itemsize=4) == 4 * 120 / 5 + 1  # beyond the cache
    assert machine.product(1, 1000, 1000, 1000, itemsize=2) == 2e9 / 200 + 1
    assert machine.product(1, 1000, 1000, 1000, itemsize=8) == 2e9 / 50 + 1
    assert machine.copy(2, itemsize=4) == 16 / 4 + 1
    assert machine.copy(2, itemsize=2) == 16 / 4 + 1
    assert machine.copy(2, itemsize=8) == 32 / 4 + 1
    assert machine.copy(2, itemsize=4, run=15) == 16 / 4 + 1
    assert machine.copy(2, itemsize=4, run=16) == 16 / 10 + 1  # a cache line stays together
    assert machine.copy(2, itemsize=4, axes=2) == 16 / 8 + 1  # a transposition
    assert machine.copy(2, itemsize=4, run=16, axes=2) == 16 / 10 + 1
    tiles = Machine("m", flops=1.0, bandwidth=math.inf, op=0.0, tile=64)
    assert tiles.product(1, 1, 10, 65, itemsize=4) == 2 * 64 * 10 * 128


def test_thin_products_in_two_byte_dtypes():
    """On a CPU: few rows and few columns take no less time, a column as long as a row, bytes as long as float32's."""
    compute = Machine("m", flops=1.0, half_flops=2.0, bandwidth=math.inf, op=0.0)
    one, three, twelve = (compute.product(1, rows, 64, 64, itemsize=2) for rows in (1, 3, 12))
    assert one == three < twelve
    assert compute.product(1, 64, 64, 2, itemsize=2) == compute.product(1, 64, 64, 16, itemsize=2)
    assert compute.product(1, 64, 64, 1, itemsize=2) == one
    memory = Machine("m", flops=math.inf, bandwidth=1.0, op=0.0)
    assert memory.product(1, 8, 64, 64, itemsize=2) == memory.product(1, 8, 64, 64, itemsize=4)
    gpu = Machine("m", flops=math.inf, bandwidth=1.0, op=0.0, tile=64)
    assert 2 * gpu.product(1, 8, 64, 64, itemsize=2) == gpu.product(1, 8, 64, 64, itemsize=4)


def test_stacks_that_are_copied_first():
    """The batch is the innermost axis; or, in two-byte dtypes, stands between transposed rows and columns."""
    groups = (("b",), ("r",), ("c",))
    copied = {half: {m for m in itertools.permutations("brc") if needs_copy(m, groups, half)} for half in (False, True)}
    assert copied == {False: {tuple("rcb"), tuple("crb")}, True: {tuple("rcb"), tuple("crb"), tuple("cbr")}}
    assert not needs_copy(("c", "r"), ((), ("r",), ("c",)), half=True)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("abcd", ["abcd"]),
        ("cdab", ["ab", "cd"]),
        ("dabc", ["abc", "d"]),
        ("dcba", ["a", "b", "c", "d"]),
        ("acbd", [*"abcd"]),
    ],
)
def test_modes_that_stay_neighbours(order, expected):
    assert ["".join(block) for block in blocks(tuple("abcd"), tuple(order))] == expected


def test_results_are_transposed_as_matrices():
    plan = find_plan(Butterfly().resolve(1024, 1024).spec(1024, 1024), 512, folded=True)
    result = plan.parts[0].result
    assert result.modes == (32, -1)  # (o2, n o1)
    assert result.axes == (1, 0)
    assert result.copy


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_any_number_of_tokens_plans(tokens):
    for spec in TOYS.values():
        assert find_plan(spec, tokens).seconds >= 0


@pytest.mark.parametrize(("tokens", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (512, 512), (513, 1024)])
def test_bucket(tokens, expected):
    assert bucket(tokens) == expected


# Long chains and printing --------------------------------------------------------------------------------------------


class Counting(Machine):
    """A machine that counts the products that the search has considered."""

    considered = 0

    def product(self, *args, **kwargs):
        Counting.considered += 1
        return super().product(*args, **kwargs)


def test_a_long_chain_plans_quickly():
    spec = spec_of(Kaleidoscope(radix=2), 4096, 4096)
    assert len(spec.factors) == 23
    find_plan(spec, 32, machine=Counting(**costs.CPU))
    assert 0 < Counting.considered < 5000


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


def test_bad_overrides():
    layer = KroneckerLinear(64, 64, terms=2)
    with pytest.raises(ValueError, match="order='sideways' is unknown; use one of"):
        layer.use_plan("sideways")
    with pytest.raises(ValueError, match="the plan contracts"):
        layer.use_plan(PHMLinear(64, 64).plan(8))
    with pytest.raises(ValueError, match="autotune=True chooses between plans"):
        layer.use_plan("forward", autotune=True)
    assert isinstance(layer.plan(8), Plan)

"""Equations: which modes a product sums, what each factor does to the input, and the factors of each equation."""

import pytest

from structlin.equation.spec import Absorption, Contraction, Spec, contraction, equation
from structlin.structures import Butterfly, LowRank, Sum, TensorTrain


def test_modes_of_a_product_are_sorted_in_the_order_of_their_operands():
    found = contraction(("t", "o", "b", "r", "s"), ("s", "i", "r", "b"), {"b", "o", "i", "t"})
    assert found == Contraction(batch=("b",), first=("t", "o"), second=("i",), summed=("r", "s"))


def test_a_train_is_absorbed_from_either_end():
    spec = TensorTrain(rank=2, in_modes=(2, 3), out_modes=(4, 5)).resolve(6, 20).spec(6, 20)
    (eq,) = spec.equations
    assert str(eq) == "o1 i1 r1, r1 o2 i2 -> o1 o2 i1 i2"
    assert eq.absorb([0, 1]) == (
        Absorption(0, batch=(), free=("i2",), new=("o1", "r1"), summed=("i1",)),
        Absorption(1, batch=(), free=("o1",), new=("o2",), summed=("r1", "i2")),
    )
    assert [absorbed.factor for absorbed in eq.absorb([1, 0])] == [1, 0]
    # 2 * (r1 o2 i2) * i1, then 2 * (o1 i1 r1) * o2.
    assert [absorbed.flops(eq) for absorbed in eq.absorb([1, 0])] == [2 * 30 * 2, 2 * 16 * 5]


def test_a_butterfly_shares_modes_with_the_input_that_it_does_not_sum():
    (eq,) = Butterfly(in_modes=(2, 3), out_modes=(5, 4)).resolve(6, 20).spec(6, 20).equations
    first, last = eq.absorb([0, 1])
    assert first.batch == ("i1",)
    assert first.summed == ("i2",)
    assert last.summed == ("i1",)
    assert {*last.kept} == {*eq.outputs}


def test_a_sequence_is_split_by_equation():
    spec = Sum((LowRank(rank=2), TensorTrain(rank=2, cores=3))).resolve(12, 20).spec(12, 20)
    parts = [part for _, part in spec.split(spec.factors)]
    assert parts == [eq.factors for eq in spec.equations]
    assert [list(part) for _, part in spec.split(range(5))] == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(("text", "sizes", "message"), [
    ("o r, r i -> o i", {"o": 2, "i": 2}, "mode 'r' of .* has size None"),
    ("o r, i -> o i", {"o": 2, "r": 2, "i": 2}, "mode 'r' of .* is held by 1 factors; a bond needs two"),
    ("o o2 r, r o2 i -> o i", {"o": 2, "r": 2, "i": 2, "o2": 2}, "must stand after the arrow"),
    ("o r i -> o i", {"o": 2, "r": 2, "i": 2}, "1 factors in .* but names"),
])  # fmt: skip
def test_equations_that_make_no_sense(text, sizes, message):
    with pytest.raises(ValueError, match=message):
        equation(text, ("left", "right"), sizes)


def test_equations_that_are_too_small_or_share_a_name():
    eq = equation("o r, r i -> o i", ("left", "right"), {"o": 4, "r": 2, "i": 3})
    with pytest.raises(ValueError, match="cover 4 x 3, less than the 4 x 5 of the layer"):
        Spec(5, 4, (eq,))
    with pytest.raises(ValueError, match="are not distinct"):
        Spec(3, 4, (eq, eq))

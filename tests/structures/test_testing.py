"""check_structure passes a structure of a third party, and each law catches the fault that it is there for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cases import SMALL_SIZES

from structlin import testing
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Structure
from structlin.fitting.linalg import pad_to
from structlin.layers import factored as layer_module
from structlin.layers.linear import StructuredLinear
from structlin.structures import LowRank
from structlin.testing import LAWS, assert_close, check_structure


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """W = diag(block_1, ..., block_k), written without a name in the registry."""

    name: ClassVar[str] = "blockdiagonal"
    blocks: int

    def resolve(self, in_features, out_features, weight=None):
        if not 1 <= self.blocks <= min(in_features, out_features):
            raise ValueError(f"blocks={self.blocks} is outside 1..{min(in_features, out_features)}")
        return self

    def spec(self, in_features, out_features):
        sizes = {"i1": self.blocks, "i2": -(-in_features // self.blocks)}
        sizes |= {"o1": self.blocks, "o2": -(-out_features // self.blocks)}
        eq = equation("o1 i1, i1 o2 i2 -> o1 o2 i1 i2", ("eye", "blocks"), sizes, constants={"eye": self.eye()})
        return Spec(in_features, out_features, (eq,))

    def eye(self):
        return torch.eye(self.blocks).flatten().tolist()

    def decompose(self, weight):
        eq = self.spec(weight.shape[1], weight.shape[0]).equations[0]
        padded = pad_to(weight, eq.padded_out, eq.padded_in)
        parts = padded.reshape(self.blocks, -1, self.blocks, padded.shape[1] // self.blocks)
        blocks = torch.stack([parts[k, :, k] for k in range(self.blocks)])
        return torch.eye(self.blocks, dtype=weight.dtype), blocks

    @classmethod
    def candidates(cls, in_features, out_features, budget) -> Iterator[BlockDiagonal]:
        yield cls(blocks=max(1, -(-in_features * out_features // budget)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [*SMALL_SIZES, (384, 97)])
def test_a_structure_of_a_third_party_passes(in_features, out_features, dtype):
    check_structure(BlockDiagonal(blocks=4), in_features, out_features, dtype=dtype)


# Faults --------------------------------------------------------------------------------------------------------------

forward, to_dense, initial = StructuredLinear.forward, StructuredLinear.to_dense, layer_module.initial_factors


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.detach() * (1 + 0 * gradient)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


FAULTS = {
    "dense_matches_equation": ("to_dense", lambda self: to_dense(self).flip(0)),
    "forward_matches_dense": ("forward", lambda self, x: 1.001 * forward(self, x)),
    "gradients_match_dense": ("forward", lambda self, x: WrongGradient.apply(forward(self, x))),
    "derivatives_match_differences": ("forward", lambda self, x: OnceDifferentiable.apply(forward(self, x)).square()),
    "counts_agree": ("num_parameters", property(lambda self: self.spec.num_parameters + 1)),
    "copies_are_exact": ("__deepcopy__", lambda self, memo: self),
    "inputs_of_all_kinds_work": ("forward", lambda self, x: forward(self, x).view(*x.shape[:-1], -1)),
    "prints_itself": ("extra_repr", lambda self: ""),
}


def law(name):
    return next(law for law in LAWS if law.__name__ == name)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_layer_are_caught(name, monkeypatch):
    attribute, fault = FAULTS[name]
    monkeypatch.setattr(StructuredLinear, attribute, fault, raising=False)
    monkeypatch.setattr(testing, "LAWS", (law(name),))
    with pytest.raises(AssertionError, match=rf"{name}, LowRank\(rank=2\), 6 -> 4, torch.float64: "):
        check_structure(LowRank(rank=2), 6, 4)


def test_a_wrong_scale_from_scratch_is_caught(monkeypatch):
    monkeypatch.setattr(layer_module, "initial_factors", lambda *a, **k: [1.1 * factor for factor in initial(*a, **k)])
    with pytest.raises(AssertionError, match=r"start_has_the_scale_of_linear.* is 1.21 of nn.Linear's"):
        check_structure(LowRank(rank=2), 6, 4)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (lambda left, right: (left, 1.1 * right), AssertionError, "own_fit_is_exact.*: relative error 0.1, allowed"),
        (lambda left, right: (left, 3 * right), AssertionError, "own_fit_is_exact.*: relative error 2"),
        (
            lambda left, right: (left, right[:, :3]),
            ValueError,
            r"factors of shapes \(\(4, 2\), \(2, 3\)\); its equation",
        ),
        (lambda left, right: (left,), ValueError, r"its equation says \(\(4, 2\), \(2, 6\)\)"),
    ],
)
def test_a_wrong_decomposition_is_caught(fault, error, message, monkeypatch):
    class Faulty(LowRank):
        def decompose(self, weight):
            return fault(*super().decompose(weight))

    monkeypatch.setattr(testing, "LAWS", (law("own_fit_is_exact"),))
    with pytest.raises(error, match=message):
        check_structure(Faulty(rank=2), 6, 4)


def test_a_fit_worse_than_zero_is_caught():
    class Faulty(LowRank):
        refine_steps = 1  # so that it need not recover its own

        def decompose(self, weight):
            left, right = super().decompose(weight)
            return left, 3 * right

    with pytest.raises(AssertionError, match=r"relative error 1.* of a Gaussian weight"):
        law("any_fit_is_better_than_zero")(StructuredLinear(6, 4, structure=Faulty(rank=2)))


def test_assert_close_names_both_errors():
    with pytest.raises(AssertionError, match="y: error 1 of 2, relative error allowed 1e-12"):
        assert_close(torch.tensor([3.0]).double(), torch.tensor([2.0]).double(), "y")
    with pytest.raises(AssertionError, match=r"y: shape \(1,\), expected \(2,\)"):
        assert_close(torch.ones(1), torch.ones(2), "y")
    with pytest.raises(AssertionError, match="y: error nan"):
        assert_close(torch.tensor([float("nan")]), torch.ones(1), "y")


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("derivatives_match_differences", (97, 64, torch.float64), "more than 4096 entries"),
        ("derivatives_match_differences", (6, 4, torch.float32), "need float64 or complex128, not torch.float32"),
        ("own_fit_is_exact", (6, 4, torch.bfloat16), "torch.bfloat16: the closed form need not recover"),
    ],
)
def test_a_law_that_does_not_apply_says_why(name, layer, message):
    in_features, out_features, dtype = layer
    with pytest.raises(testing.NotApplicable, match=message):
        law(name)(StructuredLinear(in_features, out_features, structure=LowRank(rank=2), dtype=dtype))

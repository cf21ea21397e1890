"""Check the laws that every structure obeys, structures of third parties included: one call in a test of yours."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structlin.equation.spec import Equation, Spec
from structlin.equation.structure import Structure
from structlin.fitting.fit import fit
from structlin.layers.linear import StructuredLinear, build
from structlin.runtime.contract import expanded
from structlin.runtime.planner import ORDERS, Order

# Relative Frobenius error between two ways to compute the same. Each product of a chain loses about one rounding
# (float64 2e-16, float32 6e-8, float16 5e-4, bfloat16 4e-3); the longest chains in use have some thirty.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 2e-5,
    torch.complex64: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
FIT_TOLERANCES = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-5, torch.complex64: 1e-5}
STD_TOLERANCE = 0.1  # of the output's standard deviation, relative to nn.Linear's
SMALL = 4096  # numerical derivatives are taken up to this many entries of the dense matrix
LARGEST_PLAN = 1 << 26  # bytes; larger plans are skipped: from the wrong end, a large layer takes outer products


def check_structure(
    structure: Structure, in_features: int, out_features: int, *, dtype: torch.dtype = torch.float64
) -> None:
    """Check a structure against all laws of this library, at one size and in one dtype.

    Args:
        structure: the instance; open fields are resolved.
        in_features: size of the input.
        out_features: size of the output.
        dtype: float64, float32, or their complex counterparts, float16 or bfloat16. Laws that do not apply (numerical
            derivatives below float64, say) are skipped; called directly they raise `NotApplicable`.
    Raises:
        AssertionError: naming the law, the structure, what was found and what was expected.
    Example:
        >>> from structlin.structures import LowRank
        >>> check_structure(LowRank(rank=2), 6, 4)
    """
    for law in LAWS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = build(structure, in_features, out_features, dtype=dtype)
            try:
                law(layer)
            except NotApplicable:
                continue
            except AssertionError as error:
                raise AssertionError(
                    f"{law.__name__}, {layer.structure}, {in_features} -> {out_features}, {dtype}: {error}"
                ) from error


def dense_matches_equation(layer: StructuredLinear) -> None:
    """`to_dense` is what `torch.einsum` computes from the equation, cut to the features."""
    expected = einsum_dense(layer.spec, layer.factors)
    assert expected.shape == (layer.out_features, layer.in_features), f"the equation gives {tuple(expected.shape)}"
    assert_close(layer.to_dense(), expected, "to_dense")
    assert_close(layer.weight, expected, "weight")


def forward_matches_dense(layer: StructuredLinear) -> None:
    """Every plan up to LARGEST_PLAN computes x W^T + b, for one row and for many."""
    dense = layer.to_dense()
    for tokens in (1, 5, 33):
        x = _input(layer, tokens)
        for order in _orders(layer, tokens):
            layer.use_plan(order)
            _assert_linear(layer(x), x, dense, layer.bias, f"forward, order={order}, {tokens} tokens")


def gradients_match_dense(layer: StructuredLinear) -> None:
    """Every plan up to LARGEST_PLAN has the dense path's gradients of the input and of all parameters."""
    x = _input(layer, 3).requires_grad_()
    seed = torch.randn(3, layer.out_features).to(x.dtype)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(F.linear(x, layer.to_dense(), layer.bias), inputs, seed)
    names = ["input", *(name for name, _ in layer.named_parameters())]
    # The summands of a weight may nearly cancel: its input gradient is then rounding, and judged by the usual scale.
    uncancelled = torch.linalg.vector_norm(seed).item() / math.sqrt(3 * layer.in_features)
    for order in _orders(layer, 3):
        layer.use_plan(order)
        for name, actual, wanted in zip(names, torch.autograd.grad(layer(x), inputs, seed), expected, strict=True):
            scale = uncancelled if name == "input" else 0.0
            assert_close(actual, wanted, f"gradient of {name}, order={order}", scale=scale)


def derivatives_match_differences(layer: StructuredLinear) -> None:
    """First and second derivatives equal numerical differences, in float64 or complex128, for a small layer."""
    if layer.in_features * layer.out_features > SMALL:
        raise NotApplicable(f"more than {SMALL} entries are too many for numerical derivatives")
    dtype = layer.factors[0].dtype
    if dtype not in (torch.float64, torch.complex128):
        raise NotApplicable(f"numerical derivatives need float64 or complex128, not {dtype}")
    wide = build(layer.structure, layer.in_features, layer.out_features, dtype=dtype)
    names = [name for name, _ in wide.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        result = torch.func.functional_call(wide, dict(zip(names, values, strict=True)), (x,))
        assert isinstance(result, Tensor)
        return result

    inputs = (_input(wide, 2).requires_grad_(), *(p.detach().clone().requires_grad_() for p in wide.parameters()))
    try:
        torch.autograd.gradcheck(call, inputs, fast_mode=True)
        torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    except RuntimeError as error:  # what gradcheck raises for a wrong derivative
        raise AssertionError(str(error)) from error


def counts_agree(layer: StructuredLinear) -> None:
    """The layer and its equation count the entries of the learned factors, and FLOPs as the sequential plans do."""
    entries = sum(getattr(layer, factor.name).numel() for factor in layer.spec.factors if factor.learned)
    held = sum(p.numel() for p in layer.parameters())
    assert layer.num_parameters == layer.spec.num_parameters == entries, (
        f"num_parameters={layer.num_parameters}, spec {layer.spec.num_parameters}, factors {entries}"
    )
    assert held == entries + layer.out_features, f"parameters() hold {held}, factors and bias {entries} and a bias"
    cheapest = sum(
        min(one.flops, other.flops)
        for one, other in zip(layer.plan(1, "forward").parts, layer.plan(1, "backward").parts, strict=True)
    )
    assert layer.flops_per_token == cheapest, f"flops_per_token={layer.flops_per_token}, sequential plans {cheapest}"


def copies_are_exact(layer: StructuredLinear) -> None:
    """state_dict, deepcopy and pickle reproduce every bit, under the equation's names and in memory of their own."""
    names = [*(factor.name for factor in layer.spec.factors), "bias"]
    assert sorted(layer.state_dict()) == sorted(names), f"state_dict holds {list(layer.state_dict())}, not {names}"
    loaded = build(layer.structure, layer.in_features, layer.out_features, dtype=layer.factors[0].dtype)
    loaded.load_state_dict(layer.state_dict())
    x = _input(layer, 5)
    for name, other in (
        ("state_dict", loaded),
        ("deepcopy", copy.deepcopy(layer)),
        ("pickle", pickle.loads(pickle.dumps(layer))),
    ):
        assert other.structure == layer.structure, f"{name} changed the structure to {other.structure}"
        assert torch.equal(other(x), layer(x)), f"{name} changed the output"
        for key, value in layer.state_dict().items():
            copied = other.state_dict()[key]
            assert torch.equal(copied, value), f"{name} changed {key}"
            assert copied.data_ptr() != value.data_ptr(), f"{name} shares the memory of {key}"


def own_fit_is_exact(layer: StructuredLinear) -> None:
    """The closed form, where there is one, recovers a matrix of its own structure if nothing is padded."""
    dtype = layer.factors[0].dtype
    padded = any(
        (eq.padded_in, eq.padded_out) != (layer.in_features, layer.out_features) for eq in layer.spec.equations
    )
    if layer.structure.refine_steps or padded or dtype not in FIT_TOLERANCES:
        why = "no closed form" if layer.structure.refine_steps else "padding" if padded else f"{dtype}"
        raise NotApplicable(f"{why}: the closed form need not recover the layer")
    error = fit(layer.to_dense(), layer.structure).error
    assert error <= FIT_TOLERANCES[dtype], f"relative error {error:.3g}, allowed {FIT_TOLERANCES[dtype]}"


def any_fit_is_better_than_zero(layer: StructuredLinear) -> None:
    """The fit of an arbitrary weight has the structure's sizes and an error of at most 1, even for zeros."""
    shape = (layer.out_features, layer.in_features)
    for name, weight in (("Gaussian", torch.randn(shape)), ("zero", torch.zeros(shape)), ("ones", torch.ones(shape))):
        fitted = fit(weight.to(layer.factors[0].dtype), layer.structure, refine=0)
        shapes = tuple(tuple(factor.shape) for factor in fitted.factors)
        assert shapes == fitted.spec.shapes, f"decompose gives {shapes}, the equation says {fitted.spec.shapes}"
        limit = 1 + 10 * TOLERANCES[weight.dtype]
        assert 0 <= fitted.error <= limit, f"relative error {fitted.error} of a {name} weight"


def start_has_the_scale_of_linear(layer: StructuredLinear) -> None:
    """A new layer's outputs have the standard deviation of `nn.Linear`'s: for white inputs, |W|_F / sqrt(out)."""
    std = (torch.linalg.vector_norm(layer.to_dense().detach().abs().double()) / math.sqrt(layer.out_features)).item()
    relative = std * math.sqrt(3)  # nn.Linear draws from U(-1, 1) / sqrt(in), of variance 1 / (3 in)
    assert abs(relative - 1) <= STD_TOLERANCE, f"standard deviation of the output is {relative:.3g} of nn.Linear's"


def inputs_of_all_kinds_work(layer: StructuredLinear) -> None:
    """Inputs may have any leading axes or none, zero rows and any strides; the output is never a view."""
    wide = _input(layer, 12)
    kinds = {
        "1-D": wide[0],
        "3-D": wide.reshape(2, 6, -1),
        "zero rows": wide[:0],
        "zero rows within": wide[:0].reshape(3, 0, layer.in_features),
        "transposed": wide.T.contiguous().T,
        "every second column": torch.stack([wide, wide], -1).flatten(1)[:, ::2],
        "every second row": wide[::2],
        "one row expanded": wide[:1].expand(12, -1),
        "one column expanded": wide[:, :1].expand(-1, layer.in_features),
    }
    if wide.is_complex():
        kinds["conjugated"] = wide.conj()
    dense = layer.to_dense()
    for name, x in kinds.items():
        y = layer(x)
        assert y.shape == (*x.shape[:-1], layer.out_features), f"{name}: output of shape {tuple(y.shape)}"
        assert y.dtype == x.dtype, f"{name}: output is {y.dtype}"
        assert not y._is_view(), f"{name}: the output is a view"
        _assert_linear(y, x, dense, layer.bias, f"{name} input")


def prints_itself(layer: StructuredLinear) -> None:
    """`repr` shows the class and the sizes, the printed plan its equation and FLOPs."""
    for part in (type(layer).__name__, f"in_features={layer.in_features}", f"out_features={layer.out_features}"):
        assert part in repr(layer), f"{part} is missing in {layer!r}"
    plan = str(layer.plan(tokens=32))
    assert str(layer.spec.equations[0]) in plan, f"the equation is missing in {plan}"
    assert "FLOPs" in plan, f"FLOPs are missing in {plan}"


class NotApplicable(Exception):  # noqa: N818 - not an error: a law says why it does not apply
    """A law does not apply to this layer; the message gives the reason."""


LAWS: tuple[Callable[[StructuredLinear], None], ...] = (
    dense_matches_equation,
    forward_matches_dense,
    gradients_match_dense,
    derivatives_match_differences,
    counts_agree,
    copies_are_exact,
    own_fit_is_exact,
    any_fit_is_better_than_zero,
    start_has_the_scale_of_linear,
    inputs_of_all_kinds_work,
    prints_itself,
)


def assert_close(
    actual: Tensor, expected: Tensor, what: str, tolerance: float | None = None, *, scale: float = 0.0
) -> None:
    """Assert that two tensors agree in shape and, relative to the norm of the expected one, in value.

    Args:
        actual: the tensor to check.
        expected: the tensor that it should equal.
        what: its name in messages.
        tolerance: relative Frobenius error allowed; None takes that of the dtype.
        scale: the norm that `expected` has when nothing cancels; errors are relative to the larger of the two.
    Raises:
        AssertionError: naming the error and the one allowed.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    allowed = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    wide = torch.promote_types(expected.dtype, torch.float64)
    norm = max(torch.linalg.vector_norm(expected.detach(), dtype=wide).item(), scale)
    error = torch.linalg.vector_norm(actual.detach().to(wide) - expected.detach().to(wide)).item()
    assert error <= allowed * norm, f"{what}: error {error:.3g} of {norm:.3g}, relative error allowed {allowed:.3g}"


def einsum_dense(spec: Spec, factors: Sequence[Tensor]) -> Tensor:
    """Build the dense matrix of a spec by one `torch.einsum` per equation: slow, and independent of the planner."""
    total = torch.zeros(spec.out_features, spec.in_features, dtype=factors[0].dtype, device=factors[0].device)
    for eq, part in spec.split(expanded(spec, factors)):
        total = total + _einsum(eq, part)[: spec.out_features, : spec.in_features]
    return total


def _einsum(eq: Equation, factors: Sequence[Tensor]) -> Tensor:
    number = {mode: k for k, mode in enumerate(eq.size)}  # einsum takes numbers for long mode names
    operands: list[Tensor | list[int]] = []
    for factor, tensor in zip(eq.factors, factors, strict=True):
        operands += [tensor, [number[mode] for mode in factor.modes]]
    dense = torch.einsum(*operands, [number[mode] for mode in (*eq.outputs, *eq.inputs)])
    return dense.reshape(eq.padded_out, eq.padded_in)


def _orders(layer: StructuredLinear, tokens: int) -> list[Order]:
    return [order for order in ORDERS if layer.plan(tokens, order).nbytes <= LARGEST_PLAN or order == "auto"]


def _assert_linear(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None, what: str) -> None:
    with torch.no_grad():
        norms = torch.linalg.vector_norm(x).item() * torch.linalg.vector_norm(dense).item()
        assert_close(y, F.linear(x, dense, bias), what, scale=norms / math.sqrt(dense.shape[1]))


def _input(layer: StructuredLinear, tokens: int) -> Tensor:
    return torch.randn(tokens, layer.in_features).to(layer.factors[0].dtype)

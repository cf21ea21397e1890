"""The laws that every structure obeys, for structures of third parties too: one call in a test of yours."""

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
from structlin.runtime.planner import ORDERS, Order

# Relative Frobenius error between two ways to compute the same. A chain of products loses about one rounding (2e-16,
# 6e-8, 4e-3, 5e-4) per product; the longest chains in use have some thirty.
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
SMALL = 4096  # entries of the dense matrix up to which numerical derivatives are taken
# Bytes moved by a plan up to which it is run: the wrong end first means outer products, too large for large layers.
LARGEST_PLAN = 1 << 26


def check_structure(
    structure: Structure, in_features: int, out_features: int, *, dtype: torch.dtype = torch.float64
) -> None:
    """Hold a structure to all laws of this library, at one size and in one dtype.

    Args:
        structure: the instance; open fields are resolved.
        in_features: size of the input.
        out_features: size of the output.
        dtype: float64, float32, or their complex counterparts; float16 and bfloat16 skip the laws about fits.
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
            except AssertionError as error:
                raise AssertionError(
                    f"{law.__name__}, {layer.structure}, {in_features} -> {out_features}, {dtype}: {error}"
                ) from error


def dense_matches_equation(layer: StructuredLinear) -> None:
    """`to_dense` is the equation as `torch.einsum` reads it, cut to the features."""
    expected = einsum_dense(layer.spec, layer.factors)
    assert expected.shape == (layer.out_features, layer.in_features), f"the equation gives {tuple(expected.shape)}"
    assert_close(layer.to_dense(), expected, "to_dense")
    assert_close(layer.weight, expected, "weight")


def forward_matches_dense(layer: StructuredLinear) -> None:
    """Every plan of a sane size gives x W^T + b, for one row and for many."""
    dense = layer.to_dense()
    for tokens in (1, 5, 33):
        x = _input(layer, tokens)
        for order in _orders(layer, tokens):
            layer.use_plan(order)
            _assert_linear(layer(x), x, dense, layer.bias, f"forward, order={order}, {tokens} tokens")


def gradients_match_dense(layer: StructuredLinear) -> None:
    """Every plan of a sane size has the gradients of the dense path, in the input and in all parameters."""
    x = _input(layer, 3).requires_grad_()
    seed = torch.randn(3, layer.out_features).to(x.dtype)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(_dense_path(layer, x), inputs, seed)
    names = ["input", *(name for name, _ in layer.named_parameters())]
    # The summands of a small weight may cancel: the gradient of the input is then rounding.
    uncancelled = torch.linalg.vector_norm(seed).item() / math.sqrt(3 * layer.in_features)
    for order in _orders(layer, 3):
        layer.use_plan(order)
        for name, actual, wanted in zip(names, torch.autograd.grad(layer(x), inputs, seed), expected, strict=True):
            scale = uncancelled if name == "input" else 0.0
            assert_close(actual, wanted, f"gradient of {name}, order={order}", scale=scale)


def derivatives_match_differences(layer: StructuredLinear) -> None:
    """First and second derivatives equal numerical differences, in float64, where the layer is small."""
    if layer.in_features * layer.out_features > SMALL:
        return
    dtype = torch.promote_types(layer.factors[0].dtype, torch.float64)
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
    except RuntimeError as error:  # gradcheck's way of saying no
        raise AssertionError(str(error)) from error


def counts_agree(layer: StructuredLinear) -> None:
    """Parameters are the entries of the learned factors, for the layer and for the equation."""
    learned = [getattr(layer, factor.name) for factor in layer.spec.factors if factor.learned]
    entries = sum(tensor.numel() for tensor in learned)
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
    """state_dict, deepcopy and pickle give the same bits back, under the names of the equation."""
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
    """A structured matrix is recovered by its own closed form, where there is one and no padding."""
    dtype = layer.factors[0].dtype
    padded = any(
        (eq.padded_in, eq.padded_out) != (layer.in_features, layer.out_features) for eq in layer.spec.equations
    )
    if layer.structure.refine_steps or padded or dtype not in FIT_TOLERANCES:
        return
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
    """Outputs from scratch have the standard deviation of `nn.Linear`'s: for white inputs, |W|_F / sqrt(out)."""
    std = (torch.linalg.vector_norm(layer.to_dense().detach().abs().double()) / math.sqrt(layer.out_features)).item()
    relative = std * math.sqrt(3)
    assert abs(relative - 1) <= STD_TOLERANCE, f"standard deviation of the output is {relative:.3g} of nn.Linear's"


def inputs_of_all_kinds_work(layer: StructuredLinear) -> None:
    """Any leading axes, none at all, zero rows and any strides; the output is never a view."""
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
    """`repr` shows the sizes and the hyperparameters, the plan its steps."""
    for part in (type(layer).__name__, f"in_features={layer.in_features}", f"out_features={layer.out_features}"):
        assert part in repr(layer), f"{part} is missing in {layer!r}"
    plan = str(layer.plan(tokens=32))
    assert str(layer.spec.equations[0]) in plan, f"the equation is missing in {plan}"
    assert "FLOPs" in plan, f"FLOPs are missing in {plan}"


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
        actual: what was computed.
        expected: what it should be.
        what: for the message.
        tolerance: relative Frobenius error allowed; None takes that of the dtype.
        scale: the norm that `expected` has when nothing cancels; errors are relative to the larger of the two.
    Raises:
        AssertionError: naming both errors.
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
    for eq, part in spec.split(factors):
        total = total + _einsum(eq, part)[: spec.out_features, : spec.in_features]
    return total


def _einsum(eq: Equation, factors: Sequence[Tensor]) -> Tensor:
    number = {mode: k for k, mode in enumerate(eq.size)}
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


def _dense_path(layer: StructuredLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.to_dense(), layer.bias)


def _input(layer: StructuredLinear, tokens: int) -> Tensor:
    return torch.randn(tokens, layer.in_features).to(layer.factors[0].dtype)

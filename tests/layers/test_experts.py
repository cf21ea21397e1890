"""Fused experts of every form open into leaves, run as before, take any structure and merge back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, ONE
from expert_forms import (
    EXPERTS,
    FEATURES,
    INNER,
    REAL,
    SWITCHED,
    TOKENS,
    TOYS,
    K,
    Packed,
    Squared,
    make,
)
from torch import nn

from structlin.fitting.fit import fit
from structlin.layers import experts
from structlin.layers.expert_linear import ExpertLinear, StructuredExpertLinear
from structlin.layers.experts import StructuredExperts, form_of, refusal
from structlin.structures import PHM, Kaleidoscope, LowRank
from structlin.testing import TOLERANCES, assert_close

DTYPES = (torch.float32, torch.bfloat16)


def arguments(module: nn.Module, dtype: torch.dtype = torch.float32):
    """Inputs under which some experts see no token and others several."""
    if form_of(module).stacked:
        return (torch.randn(EXPERTS * TOKENS, FEATURES).to(dtype),)
    shape = (3, TOKENS // 3, FEATURES) if "gate" in form_of(module).names else (TOKENS, FEATURES)
    index = torch.rand(TOKENS, EXPERTS).topk(K).indices
    index[index == 1] = 4
    return torch.randn(shape).to(dtype), index, torch.rand(TOKENS, K).to(dtype)


def opened_of(module: nn.Module) -> StructuredExperts:
    assert refusal(module, form_of(module)) is None
    return StructuredExperts.from_experts(module)


@pytest.fixture(params=[*TOYS, *REAL])
def name(request):
    return request.param


# Opening and merging back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_opened_module_computes_the_same(name, dtype):
    module = make(name, dtype)
    opened, given = opened_of(module), arguments(module, dtype)
    assert_close(opened(*given), module(*given), "outputs", 1e-6 if dtype is torch.float32 else TOLERANCES[dtype])
    assert opened(*given).dtype is dtype


def test_an_opened_module_has_the_same_gradients(name):
    module = make(name)
    opened, given = opened_of(module), arguments(module)
    values = [given[0].requires_grad_(), *(w.requires_grad_() for w in given[2:])]
    seed = torch.randn_like(module(*given))
    wanted = torch.autograd.grad(module(*given), [*values, *module.parameters()], seed)
    found = torch.autograd.grad(opened(*given), [*values, *opened.parameters()], seed)
    for expected, actual in zip(wanted[: len(values)], found[: len(values)], strict=True):
        assert_close(actual, expected, "gradient of an input", 1e-5)
    for parameter, gradient in zip(opened.parameters(), found[len(values) :], strict=True):
        parameter.grad = gradient
    form = form_of(module)
    gradients = dict(zip(dict(module.named_parameters()), wanted[len(values) :], strict=True))
    for leaf, (weight, *bias) in form.names.items():
        dense = gradients[weight] if gradients[weight].ndim == 3 else gradients[weight].unflatten(0, (EXPERTS, -1))
        dense = dense.mT if leaf in form.transposed else dense
        assert_close(opened.get_submodule(leaf).weight.grad, dense, leaf, 1e-5)
        for b in bias:
            assert_close(opened.get_submodule(leaf).bias.grad, gradients[b], f"{leaf} bias", 1e-5)


def test_leaves_share_the_parameters_of_the_module(name):
    module = make(name)
    opened, form = opened_of(module), form_of(module)
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in module.parameters())
    for leaf, names in form.names.items():
        sources = [module.get_parameter(n) for n in names]
        held = [p for p in (opened.get_submodule(leaf).weight, opened.get_submodule(leaf).bias) if p is not None]
        assert [p.data_ptr() for p in held] == [p.data_ptr() for p in sources]
        assert opened.get_submodule(leaf).weight.shape == (EXPERTS, *opened.get_submodule(leaf).weight[0].shape)


def test_merging_back_gives_the_same_bits_in_the_same_form(name):
    module = make(name).eval()
    expected = copy.deepcopy(module.state_dict())
    shell = copy.deepcopy(module).to("meta")
    opened = opened_of(module)
    closed = opened.to_experts(shell)
    assert type(closed) is type(module)
    assert not closed.training
    assert all(p.is_meta for p in shell.parameters())
    assert list(closed.state_dict()) == list(expected)
    for key, value in closed.state_dict().items():
        assert torch.equal(value, expected[key])
        assert value.is_contiguous()
        assert value.data_ptr() == module.state_dict()[key].data_ptr()
    given = arguments(module)
    assert torch.equal(closed(*given), module(*given))
    if hasattr(module, "config"):
        assert closed.config is module.config


def test_meta_modules_open_by_their_flags(name):
    module = make(name).to("meta")
    opened = opened_of(module)
    assert all(p.is_meta for p in opened.parameters())
    shapes = {leaf: tuple(opened.get_submodule(leaf).weight.shape) for leaf in form_of(module).names}
    assert shapes.pop("down") == (EXPERTS, FEATURES, INNER)
    wide = 2 * INNER if "gate_up" in shapes else INNER
    assert set(shapes.values()) == {(EXPERTS, wide, FEATURES)}


def test_names_stand_clear_of_conversions_on_save(name):
    """transformers would take `experts.gate_up_proj.left` for the fused weight, and chunk it."""
    keys = opened_of(make(name)).state_dict()
    assert not [key for key in keys if key.startswith(("gate_up_proj", "down_proj", "up_proj"))]


def test_tokens_without_experts_and_empty_inputs():
    module = make("packed")
    opened = opened_of(module)
    x, index, weights = arguments(module)
    index[0] = EXPERTS  # how expert parallelism marks places that belong to another process
    assert opened(x, index, weights)[0].abs().max() == 0
    assert opened(x[:0], index[:0], weights[:0]).shape == (0, FEATURES)


def test_sums_are_accumulated_in_the_dtype_of_the_weights():
    module = make("packed", torch.bfloat16)
    x, index, weights = arguments(module, torch.bfloat16)
    opened = opened_of(module)
    wide = opened.float()(x.float(), index, weights.float())
    narrow = opened.bfloat16()
    given = x, index, weights.float()
    assert narrow(*given).dtype is torch.bfloat16
    assert (narrow(*given) - wide).norm() < (narrow(x, index, weights) - wide).norm()


def test_copies_and_pickles_run(name):
    module = make(name)
    opened, given = opened_of(module), arguments(module)
    for other in (copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))):
        assert torch.equal(other(*given), opened(*given))


# Structured leaves ---------------------------------------------------------------------------------------------------


def structure_opened(module: nn.Module, structure) -> StructuredExperts:
    """Open a module and put random structured leaves in place of its dense ones."""
    opened = opened_of(module)
    for name in form_of(module).names:
        leaf = opened.get_submodule(name)
        made = StructuredExpertLinear(
            EXPERTS, leaf.in_features, leaf.out_features, leaf.bias is not None,
            structure=structure, dtype=leaf.weight.dtype,
        )  # fmt: skip
        if leaf.bias is not None:
            made.bias = leaf.bias
        setattr(opened, name, made)
    return opened


def dense_twin(module: nn.Module, opened: StructuredExperts) -> nn.Module:
    return opened.to_experts(copy.deepcopy(module).to("meta"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", ONE.values(), ids=ONE)
def test_structured_experts_compute_what_their_dense_twin_does(structure, dtype):
    module = make("biased", dtype)
    opened, given = structure_opened(module, fitting(structure)), arguments(module, dtype)
    twin = dense_twin(module, opened)
    assert_close(opened(*given), twin(*given), "outputs", TOLERANCES[dtype])


def fitting(structure):
    """A member that both leaves allow: cases with fixed shapes give way to their family's."""
    try:
        for out, features in ((2 * INNER, FEATURES), (FEATURES, INNER)):
            structure.resolve(features, out)
    except ValueError:
        case = next(case for name, case in CASES.items() if ONE[name] is structure)
        return (*case.fixed, *(family(1) for family in case.families))[0]
    return structure


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", SWITCHED)
def test_structured_experts_equal_their_twin_in_every_mode_of_transformers(name, mode, dtype):
    module = make(name, dtype)
    opened, given = structure_opened(module, LowRank(rank=3)), arguments(module, dtype)
    twin = dense_twin(module, opened)
    twin.config = copy.deepcopy(twin.config)
    twin.config._experts_implementation = mode
    assert_close(opened(*given), twin(*given), "outputs", TOLERANCES[dtype])


def test_structured_leaves_learn_as_their_dense_matrices(name):
    module = make(name).double()
    opened, given = structure_opened(module, Kaleidoscope()).double(), arguments(module, torch.float64)
    leaf = opened.down
    seed = torch.randn_like(module(*given))
    found = torch.autograd.grad(opened(*given), [*leaf.factors], seed)
    dense = leaf.to_dense()
    held = dense.detach().requires_grad_()
    opened.down = ExpertLinear(nn.Parameter(held.detach()), leaf.bias)
    gradient = torch.autograd.grad(opened(*given), opened.down.weight, seed)[0]
    for actual, expected in zip(found, torch.autograd.grad(dense, [*leaf.factors], gradient), strict=True):
        assert_close(actual, expected, "gradient of a factor", 1e-10)


def test_a_structured_leaf_is_one_layer_per_expert():
    layer = StructuredExpertLinear(EXPERTS, FEATURES, INNER, structure=LowRank(rank=3))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "left": (EXPERTS, INNER, 3),
        "right": (EXPERTS, 3, FEATURES),
        "bias": (EXPERTS, INNER),
    }
    assert layer.num_parameters == EXPERTS * 3 * (INNER + FEATURES)
    assert layer.flops_per_token == 2 * 3 * (INNER + FEATURES)
    assert layer.to_dense().shape == (EXPERTS, INNER, FEATURES)
    assert "experts=5" in repr(layer)
    # Each expert is drawn anew, at the scale of nn.Linear.
    assert not torch.equal(layer.left[0], layer.left[1])
    assert layer.to_dense().std().item() == pytest.approx((3 * FEATURES) ** -0.5, rel=0.1)
    with pytest.raises(ValueError, match="last axis must be in_features=16"):
        layer(torch.randn(2, 6), 0)
    with pytest.raises(ValueError, match="sizes are whole numbers from 1"):
        StructuredExpertLinear(0, FEATURES, INNER, structure=LowRank(rank=3))


def test_constant_factors_are_shared_by_all_experts():
    layer = StructuredExpertLinear(EXPERTS, 8, 12, structure=PHM(algebra="hamilton"))
    assert layer.left.shape == (4, 4, 4)
    x = torch.randn(3, 8)
    for expert, dense in enumerate(layer.to_dense()):
        assert_close(layer(x, expert), F.linear(x, dense, layer.bias[expert]), "forward", 1e-6)


def test_fits_become_a_leaf_and_merge_back():
    rank = 3
    dense = ExpertLinear(torch.randn(EXPERTS, INNER, rank) @ torch.randn(EXPERTS, rank, FEATURES), torch.randn(5, 8))
    dense.weight.requires_grad_(False)
    fits = [fit(weight, LowRank(rank=rank)) for weight in dense.weight]
    layer = StructuredExpertLinear.from_fits(fits, dense.eval())
    assert not layer.training
    assert not layer.left.requires_grad
    assert layer.bias.requires_grad
    merged = layer.to_linear()
    assert_close(merged.weight, dense.weight, "weight", 1e-5)
    assert torch.equal(merged.bias, dense.bias)
    assert not merged.weight.requires_grad


# Refusals ------------------------------------------------------------------------------------------------------------


class Broken(Packed):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise RuntimeError("needs a config")


class Renamed(Packed):
    def forward(self, hidden_states, gammas):
        return hidden_states


def spoiled(change: Callable[[nn.Module], object]) -> nn.Module:
    module = Packed()
    change(module)
    return module


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Squared, "something else than act"),
        (Broken, "do not run on a probe: RuntimeError: needs a config"),
        (Renamed, "it takes hidden_states, gammas"),
        (lambda: spoiled(lambda m: setattr(m, "has_post_expert_norm", True)), "a norm after each expert"),
        (lambda: spoiled(lambda m: setattr(m, "_is_expert_parallel", True)), "spread over processes"),
        (lambda: spoiled(lambda m: setattr(m, "scale", nn.Parameter(torch.ones(2)))), "scale beside"),
        (lambda: spoiled(lambda m: m.register_buffer("scale", torch.ones(2))), "scale beside"),
        (lambda: spoiled(lambda m: setattr(m, "forward", m.forward)), "forward is not that of a known form"),
        (lambda: spoiled(lambda m: m.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
        (lambda: spoiled(lambda m: setattr(m, "down_proj", nn.Parameter(torch.ones(4, 16, 8)))), "do not agree"),
        (lambda: spoiled(lambda m: setattr(m, "down_proj_bias", nn.Parameter(torch.ones(5, 8)))), "do not agree"),
        (lambda: spoiled(lambda m: setattr(m, "is_transposed", True)), "do not agree"),
    ],
)
def test_what_is_not_understood_is_refused_with_a_reason(module, why):
    made = module()
    assert why in refusal(made, form_of(made))


def test_a_probe_leaves_the_module_and_the_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(experts, "_PROBED", {})
    module = make("mixtral")
    module.config._experts_implementation = "grouped_mm"
    calls = []
    module.register_forward_hook(lambda *given: calls.append(given))
    state, before = torch.get_rng_state(), copy.deepcopy(module.state_dict())
    assert refusal(module, form_of(module)) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert module.config._experts_implementation == "grouped_mm"
    assert calls == []
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_other_modules_are_not_experts():
    for module in (nn.Linear(3, 4), nn.Sequential(Packed()), nn.ModuleDict({"up_proj": nn.Linear(3, 4)})):
        assert form_of(module) is None
    assert form_of(StructuredExperts.from_experts(Packed())) is None

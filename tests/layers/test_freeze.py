"""freeze_ lets a layer keep what it derives from its factors; every verb that changes them undoes it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import structlin
from structlin.layers.linear import build
from structlin.runtime import planner
from structlin.structures import PHM, Kaleidoscope, Kronecker
from structlin.testing import assert_close

STRUCTURES = {  # way when frozen, at 40 rows without the kernel -> structure
    "kept dense matrix": Kaleidoscope(width=4, radix=2),
    "kept operands: 2 products": Kronecker(terms=2),
}


def chosen(layer, tokens, mode):
    (found,) = [option.way for option in layer.options(tokens) if option.mode == mode and option.chosen]
    return found


@pytest.fixture(params=STRUCTURES)
def layer(request):
    size = 64 if request.param == "kept dense matrix" else 1024
    found = build(STRUCTURES[request.param], size, size).eval()
    assert chosen(found, 40, "frozen") == request.param
    return structlin.freeze_(found)


def inputs(layer):
    return torch.randn(40, layer.in_features)


def assert_right(layer, x):
    assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias), "forward", 1e-5)


def keeps(layer):
    """Whether a write that leaves no trace goes unseen, which is what keeping means."""
    x, factor = inputs(layer), layer.factors[0]
    with torch.no_grad():
        before = layer(x)
        factor.data.mul_(2)
        after = layer(x)
        factor.data.div_(2)
    return torch.equal(before, after)


def test_a_frozen_layer_keeps_what_it_derives(layer):
    assert layer.frozen
    assert keeps(layer)
    with torch.no_grad():
        assert_right(layer, inputs(layer))


UNDO = {
    "unfreeze_": structlin.unfreeze_,
    "train": lambda layer: layer.train(),
    "train of the model": lambda layer: nn.Sequential(layer).train(),
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()),
    "load_state_dict of the model": lambda layer: (m := nn.Sequential(layer)).load_state_dict(m.state_dict()),
    "load_state_dict, assign": lambda layer: layer.load_state_dict(layer.state_dict(), assign=True),
    "double": lambda layer: layer.double().float(),
    "to_empty": lambda layer: layer.to_empty(device="cpu").reset_parameters(),
    "a new factor": lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(layer.out_features))),
    "register_parameter": lambda layer: layer.register_parameter(
        layer.spec.factors[0].name, nn.Parameter(layer.factors[0].detach().clone())
    ),
    "use_plan": lambda layer: layer.use_plan("auto"),
}


@pytest.mark.parametrize("verb", UNDO)
def test_it_is_undone(layer, verb):
    assert keeps(layer)
    UNDO[verb](layer)
    assert not layer.frozen
    assert not keeps(layer)


def test_loading_a_checkpoint_undoes_it(layer, tmp_path):
    model = nn.Sequential(layer)
    structlin.save(model, tmp_path / "model")
    assert not structlin.load(model, tmp_path / "model")[0].frozen


def test_eval_leaves_it_frozen(layer):
    assert layer.eval().frozen
    assert keeps(layer)


def test_copies_keep_nothing_and_are_not_frozen(layer):
    x = inputs(layer)
    names = {"bias", *(factor.name for factor in layer.spec.factors)}
    with torch.no_grad():
        y = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert not twin.frozen
            assert not keeps(twin)
            assert_close(twin(x), y, "copy", 1e-5)
    assert len(pickle.dumps(layer)) == len(pickle.dumps(copy.deepcopy(layer)))
    assert set(layer.state_dict()) == names


def test_calls_with_gradients_run_the_ordinary_way(layer):
    x = inputs(layer)
    assert keeps(layer)
    with torch.no_grad():
        layer.factors[0].data.mul_(2)
    assert_right(layer, x)  # the factors need gradients
    layer.requires_grad_(False)
    x.requires_grad_(True)
    y = layer(x)
    assert_close(y, F.linear(x, layer.to_dense(), layer.bias), "the input needs a gradient", 1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient, layer.to_dense().sum(0).expand_as(x), "gradient of the input", 1e-5)


def test_other_tensors_in_place_of_the_factors_are_used(layer):
    x = inputs(layer)
    other = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
    with torch.no_grad():
        y = layer(x)
        for _ in range(2):
            found = functional_call(layer, other, x)
            twin = build(layer.structure, layer.in_features, layer.out_features)
            twin.load_state_dict(other)
            assert_right(twin, x)
            assert_close(found, twin(x), "functional_call", 1e-5)
            other[layer.spec.factors[0].name].mul_(2)
        assert torch.equal(layer(x), y)
    assert keeps(layer)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def test_under_modes_and_in_inference_mode(layer):
    x = inputs(layer)
    with torch.inference_mode():
        assert_right(layer, x)
        with Watching():
            assert_right(layer, x)


def test_the_same_matrix_is_kept_for_all_numbers_of_rows():
    """Otherwise serving requests of many lengths would keep many dense matrices."""
    layer = structlin.freeze_(build(Kaleidoscope(width=4, radix=2), 64, 64).eval())
    with torch.no_grad():
        layer(torch.randn(1, 64))
        for factor in layer.factors:
            factor.data.zero_()  # a matrix that is built from here on is zero
        for tokens in (2, 3, 40):
            assert (layer(torch.randn(tokens, 64)) - layer.bias).norm() > 0


def test_an_order_that_was_asked_for_keeps_nothing():
    layer = build(Kaleidoscope(width=4), 64, 64).eval()
    layer.use_plan("forward")
    assert not keeps(structlin.freeze_(layer))


def quantized():
    layer = nn.Sequential(build(Kronecker(terms=2), 64, 64)).eval()
    structlin.quantize_(layer, "int8")
    return layer


def test_scales_that_are_trained_once_it_is_frozen_get_their_gradients():
    layer = structlin.freeze_(quantized())
    structlin.train_scales_(layer)
    x = torch.randn(5, 64)
    gradients = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert all(gradient.any() for gradient in gradients)
    with torch.no_grad():
        before = layer(x)
        layer[0].left.scale.mul_(2)
        assert_close(layer(x) - layer[0].bias, 2 * (before - layer[0].bias), "after a step", 1e-5)


def test_integers_frozen_in_inference_mode_serve_calls_with_gradients(monkeypatch):
    layer, x = quantized(), torch.randn(5, 64, requires_grad=True)
    with torch.inference_mode():
        structlin.freeze_(layer)
        layer(x)
    layer(x).sum().backward()
    assert_close(x.grad, layer[0].to_dense().sum(0).expand_as(x), "gradient of the input", 1e-5)


def test_other_scales_in_place_of_those_frozen_are_used():
    layer, x = structlin.freeze_(quantized()), torch.randn(5, 64, dtype=torch.float64)
    layer = structlin.freeze_(layer.double())
    other = {"0.left.scale": 2 * layer[0].left.scale}
    with torch.no_grad():
        assert_close(functional_call(layer, other, x) - layer[0].bias, 2 * (layer(x) - layer[0].bias), "twice", 1e-5)


def test_constant_factors_are_frozen_too():
    layer = structlin.freeze_(build(PHM(algebra="hamilton"), 64, 64).eval())
    assert keeps(layer)
    layer.left = torch.randn_like(layer.left)
    assert not keeps(layer)


def test_a_model_in_training_mode_is_refused():
    model = nn.ModuleDict({"first": build(Kronecker(), 4, 4).eval(), "second": build(Kronecker(), 4, 4)})
    with pytest.raises(ValueError, match=r"layer 'second' is in training mode; call model.eval\(\) before freeze_"):
        structlin.freeze_(model)
    assert not model["first"].frozen
    assert structlin.freeze_(model.eval()) is model
    assert model["second"].frozen
    assert structlin.unfreeze_(model) is model
    assert not model["second"].frozen


def test_options_and_explain_name_the_ways():
    layer = build(Kaleidoscope(width=4), 64, 48)
    options = layer.options(1)
    assert {option.mode for option in options} == {"training", "eval", "frozen"}
    for mode in ("training", "eval", "frozen"):
        (best,) = [option for option in options if option.mode == mode and option.chosen]
        assert best.seconds == min(option.seconds for option in options if option.mode == mode)
    text = layer.explain(1)
    for line in ("training: autograd: 9 products, ", "eval: chunks of rows: 9 products, ", "frozen: kept dense matrix"):
        assert line in text
    large = build(Kaleidoscope(width=4), 4096, 4096, device="meta")
    assert "training: recomputed by tokens: 9 products, " in large.explain(4096)
    assert "training: recomputed by rows: " in build(PHM(n=4), 768, 768, device="meta").explain(512)
    layer.use_plan("forward")
    assert {option.way for option in layer.options(1)} == {f"autograd: {layer.plan(1, 'forward').summary}"}


def test_predicted_dense_times_grow():
    def seconds(size, tokens, itemsize=4):
        return planner.dense_seconds(size, size, tokens, itemsize=itemsize, machine=planner.CPU)

    times = [[seconds(n, t) for n in (64, 1024, 4096)] for t in (1, 32, 512)]
    for some in (*times, *zip(*times, strict=True)):
        assert list(some) == sorted(some)
    assert seconds(1024, 512, itemsize=2) < seconds(1024, 512)

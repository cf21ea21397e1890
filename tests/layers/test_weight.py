"""The weight of a layer: metadata without building it, everything else as of the dense matrix."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ONE
from torch import nn
from torch.func import functional_call

from structlin import KroneckerLinear, LowRankLinear, StructuredLinear
from structlin.layers import weight
from structlin.layers.linear import build
from structlin.testing import assert_close


@pytest.fixture
def built(monkeypatch):
    """Count how often a dense matrix is built, by a weight or by `to_dense`."""
    calls = []
    to_dense = weight.contract.to_dense
    monkeypatch.setattr(weight.contract, "to_dense", lambda *args: [calls.append(1), to_dense(*args)][1])
    return calls


@pytest.fixture
def layer():
    return KroneckerLinear(16, 20, terms=2)


METADATA = {
    "shape": lambda w: (w.shape, w.size(), w.size(0), w.ndim, w.dim(), w.ndimension(), len(w)),
    "dtype": lambda w: (w.dtype, w.is_floating_point(), torch.is_floating_point(w), w.is_complex()),
    "device": lambda w: (w.device, w.is_cuda, w.is_cpu, w.is_meta, w.get_device()),
    "layout": lambda w: (w.layout, w.is_sparse, w.is_nested, w.is_quantized),
    "bytes": lambda w: (w.numel(), torch.numel(w), w.nelement(), w.element_size(), w.itemsize, w.nbytes),
    "gradient": lambda w: w.requires_grad,
    "type": lambda w: (isinstance(w, torch.Tensor), torch.is_tensor(w), isinstance(w, nn.Parameter)),
}


@pytest.mark.parametrize("read", METADATA.values(), ids=METADATA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_metadata_builds_nothing(read, dtype, device, built):
    layer = KroneckerLinear(16, 20, terms=2, dtype=dtype, device=device)
    found = read(layer.weight)
    assert not built
    assert found == read(layer.to_dense())


def test_requires_grad_follows_the_factors_and_the_mode(layer):
    assert layer.weight.requires_grad
    with torch.no_grad():
        assert not layer.weight.requires_grad
    assert not layer.requires_grad_(False).weight.requires_grad


def saved(w):
    buffer = io.BytesIO()
    torch.save(w, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()))


OPERATIONS = {
    "F.linear": lambda w: F.linear(torch.ones(3, 16), w),
    "matmul": lambda w: torch.ones(3, 20) @ w,
    "rmatmul": lambda w: w @ torch.ones(16),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "index": lambda w: w[2:4, 1],
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "float": lambda w: w.float(),
    "double": lambda w: w.double(),
    "cpu": lambda w: w.cpu(),
    "to": lambda w: w.to(torch.bfloat16),
    "data": lambda w: w.data,
    "view": lambda w: w.reshape(-1),
    "abs": lambda w: w.abs().max(),
    "norm": torch.linalg.vector_norm,
    "cat": lambda w: torch.cat([w, w]),
    "where": lambda w: torch.where(w > 0, w, -w),
    "einsum": lambda w: torch.einsum("oi,ti->to", w, torch.ones(3, 16)),
    "like": torch.zeros_like,
    "new": lambda w: w.new_ones(3),
    "iter": lambda w: [*w][3],
    "deepcopy": lambda w: copy.deepcopy(w.detach()),
    "save": lambda w: saved(w.detach()),
    "parameter": lambda w: nn.Parameter(w.detach()),
    "sum": sum,
    "out": lambda w: torch.add(w, 1, out=torch.empty(20, 16)) if not w.requires_grad else w + 1,
    "copy_": lambda w: torch.empty(20, 16).copy_(w),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("grad", [True, False])
def test_operations_are_those_of_the_dense_matrix(operation, grad, layer):
    with torch.set_grad_enabled(grad):
        found, expected = operation(layer.weight), operation(layer.to_dense())
        assert type(found) is type(expected)
        assert torch.equal(found, expected)
        assert found.requires_grad == expected.requires_grad


def test_what_is_no_tensor(layer):
    dense = layer.to_dense()
    assert repr(layer.weight) == repr(dense)
    assert torch.equal(layer.weight, dense)
    assert torch.allclose(layer.weight, dense)
    assert layer.weight.tolist() == dense.tolist()
    assert layer.weight.stride() == dense.stride()
    assert np.array_equal(layer.weight.detach().numpy(), dense.detach().numpy())
    with torch.no_grad():
        assert np.array_equal(np.asarray(layer.weight), dense.detach().numpy())
    assert not layer.weight.is_leaf
    assert layer.weight.grad_fn is not None


@pytest.mark.parametrize("name", ONE)
def test_gradients_reach_the_factors(name):
    layer = build(ONE[name], 16, 20, False, dtype=torch.float64)
    x, factors = torch.randn(3, 16, dtype=torch.float64), [*layer.parameters()]
    found, expected = (
        torch.autograd.grad(F.linear(x, w).square().sum(), factors) for w in (layer.weight, layer.to_dense())
    )
    for gradient, wanted in zip(found, expected, strict=True):
        assert_close(gradient, wanted, "gradient")


def test_operations_see_the_factors_as_they_are(layer):
    weight, before = layer.weight, layer.to_dense().detach()
    with torch.no_grad():
        layer.factors[0].mul_(2)
    assert torch.equal(weight, 2 * before)


def test_a_weight_that_leaves_a_functional_call_keeps_its_factors(layer):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self):
            return self.layer.weight

    other = copy.deepcopy(layer)
    weight = functional_call(Reads(), {f"layer.{name}": 3 * p for name, p in other.named_parameters()}, ())
    assert_close(weight.clone(), 9 * layer.to_dense(), "weight")


def test_writes_are_lost(layer):
    before = layer.to_dense()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0] = 1
        nn.init.ones_(layer.weight)
        layer.weight.data = torch.zeros(20, 16)
        with pytest.raises(AttributeError, match="cannot be assigned"):
            layer.weight += 1
    assert torch.equal(layer.to_dense(), before)


def test_operators_that_come_past_the_override_are_refused(layer):
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TypeError, match=r"pass layer\.to_dense\(\)"):
        layer.weight.add(1)


def test_compiled_code_reads_the_dense_matrix(layer):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: F.linear(x, layer.weight), fullgraph=True, backend="aot_eager")
    assert_close(compiled(torch.ones(3, 16)), F.linear(torch.ones(3, 16), layer.to_dense()), "compiled")


# Fast paths ----------------------------------------------------------------------------------------------------------


def encoder_layer():
    block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    block.linear1, block.linear2 = LowRankLinear(16, 32, rank=4), KroneckerLinear(32, 16, terms=2)
    return block


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("nested", [True, False, None])
@pytest.mark.parametrize("masked", [True, False])
def test_transformer_encoder_calls_its_layers(train, nested, masked, built):
    """`nested` is `enable_nested_tensor` of a whole encoder; None: a single layer."""
    module = encoder_layer()
    if nested is not None:
        module = nn.TransformerEncoder(module, 2, enable_nested_tensor=nested)
    module.train(train)
    called = []
    forward = StructuredLinear.forward
    layers = [m for m in module.modules() if isinstance(m, StructuredLinear)]
    for layer in layers:  # hooks would turn the fast path off by themselves
        layer.forward = lambda x, layer=layer: [called.append(layer), forward(layer, x)][1]
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(train):
        y = module(x, src_key_padding_mask=mask if masked else None)
    assert y.shape == (2, 5, 16)
    assert called == layers
    assert not built

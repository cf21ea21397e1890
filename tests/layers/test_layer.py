"""The surface of nn.Linear, item by item, and what a layer refuses."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from cases import CASES, ONE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrize

import structlin
from structlin import (
    BlastLinear,
    ButterflyLinear,
    CirculantLinear,
    CPLinear,
    DenseLinear,
    DiagonalLinear,
    GLTLinear,
    KMatrix,
    KroneckerChainLinear,
    KroneckerLinear,
    LowRankLinear,
    MonarchLinear,
    PHMLinear,
    ShapeshifterLinear,
    SparseLinear,
    StructuredLinear,
    SumLinear,
    ToeplitzLinear,
    TTLinear,
    TuckerLinear,
)
from structlin.equation.spec import Spec, equation
from structlin.layers.linear import build
from structlin.runtime.contract import forward
from structlin.structures import LowRank, TensorTrain
from structlin.testing import assert_close

MAKERS = {
    "lowrank": lambda *a, **k: LowRankLinear(*a, rank=3, **k),
    "kronecker": lambda *a, **k: KroneckerLinear(*a, terms=2, **k),
    "phm": lambda *a, **k: PHMLinear(*a, n=4, algebra="hamilton", **k),
    "shapeshifter": lambda *a, **k: ShapeshifterLinear(*a, rank=2, **k),
    "tt": lambda *a, **k: TTLinear(*a, rank=3, **k),
    "cp": lambda *a, **k: CPLinear(*a, rank=3, **k),
    "tucker": lambda *a, **k: TuckerLinear(*a, rank=3, **k),
    "kronchain": lambda *a, **k: KroneckerChainLinear(*a, terms=2, **k),
    "glt": lambda *a, **k: GLTLinear(*a, groups=(1, 2, 1), **k),
    "butterfly": ButterflyLinear,
    "kmatrix": KMatrix,
    "monarch": lambda *a, **k: MonarchLinear(*a, blocks=4, **k),
    "dense": DenseLinear,
    "circulant": lambda *a, **k: CirculantLinear(*a, block=8, **k),
    "toeplitz": ToeplitzLinear,
    "diagonal": lambda *a, **k: DiagonalLinear(*a, blocks=4, **k),
    "sparse": lambda *a, **k: SparseLinear(*a, ratio=0.3, **k),
    "blast": lambda *a, **k: BlastLinear(*a, blocks=2, rank=3, **k),
    "sum": lambda *a, **k: SumLinear(*a, parts=(LowRank(rank=2), TensorTrain(rank=2)), **k),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def layer(make):
    return make(16, 20)


def test_every_structure_has_a_named_layer():
    # Named sums are sums; the layers of a convolution's kernel are convolutions.
    assert MAKERS.keys() == {name for name in CASES if "+" not in name} - {"conv"}
    for name, make in MAKERS.items():
        layer = make(16, 16)
        assert layer.structure.name == name
        assert type(build(layer.structure, 16, 16)) is type(layer) is not StructuredLinear
        assert type(layer).__name__ in structlin.__all__


# Attributes ----------------------------------------------------------------------------------------------------------


def test_is_a_module_but_no_linear(layer):
    """Quantisers and LoRA code match on nn.Linear and would write into a temporary."""
    assert isinstance(layer, nn.Module)
    assert not isinstance(layer, nn.Linear)


def test_features_and_bias_as_attributes(make):
    layer = make(16, 20, True)
    assert (layer.in_features, layer.out_features) == (16, 20)
    assert isinstance(layer.bias, nn.Parameter)
    assert layer.bias.shape == (20,)
    assert make(16, 20, False).bias is None
    assert make(16, 20, bias=False).bias is None


def test_bias_none_stays_none(make):
    layer = make(16, 20, bias=False)
    assert "bias" not in dict(layer.named_parameters())
    assert "bias" not in layer.state_dict()
    assert_close(layer(torch.eye(16)), layer.to_dense().T, "no bias")
    again = StructuredLinear.from_linear(nn.Linear(16, 20, bias=False), structure=layer.structure, refine=2)
    assert again.bias is None
    assert again.to_linear().bias is None
    assert copy.deepcopy(layer).bias is None


def test_weight_is_the_dense_matrix_and_differentiable(layer):
    assert torch.equal(layer.weight, layer.to_dense())
    assert layer.weight.shape == (20, 16)
    layer.weight.square().sum().backward()
    assert all((p.grad is not None) == (name != "bias") for name, p in layer.named_parameters())
    assert not any("weight" in key for key in layer.state_dict())


@pytest.mark.parametrize("value", [torch.zeros(20, 16), nn.Parameter(torch.zeros(20, 16)), None])
def test_weight_cannot_be_assigned(layer, value):
    before = layer.to_dense()
    with pytest.raises(AttributeError, match=r"Linear.weight") as caught:
        layer.weight = value
    assert "to_linear()" in str(caught.value)
    assert torch.equal(layer.to_dense(), before)
    assert "weight" not in dict(layer.named_parameters())


def test_writing_into_weight_goes_to_a_temporary(layer):
    before = layer(torch.ones(16))
    layer.weight.data.zero_()
    assert torch.equal(layer(torch.ones(16)), before)


def test_num_parameters_and_flops(make):
    layer = make(16, 20)
    without_bias = make(16, 20, bias=False)
    assert layer.num_parameters == without_bias.num_parameters == sum(p.numel() for p in without_bias.parameters())
    assert layer.flops_per_token == without_bias.flops_per_token > 0


def test_parameters_come_in_the_order_of_the_equation(layer):
    learned = [factor.name for factor in layer.spec.factors if factor.learned]
    assert [name for name, _ in layer.named_parameters()] == [*learned, "bias"]
    assert [name for name, _ in layer.named_buffers()] == [f.name for f in layer.spec.factors if not f.learned]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("lowrank", ["left", "right", "bias"]),
        ("kronecker", ["left", "right", "bias"]),
        ("phm", ["right", "bias", "left"]),
        ("tt", ["core_0", "core_1", "core_2", "bias"]),
        ("butterfly", ["stage_0", "stage_1", "bias"]),
        ("kmatrix", ["stage_0", "stage_1", "stage_2", "bias"]),
        ("monarch", ["right", "left", "bias"]),
    ],
)
def test_names_in_the_state_dict(name, keys):
    assert list(MAKERS[name](16, 20).state_dict()) == keys


def test_repr_tells_sizes_hyperparameters_and_share():
    text = repr(TTLinear(64, 64, rank=2, in_modes=(4, 4, 4), out_modes=(4, 4, 4), bias=False))
    assert text == (
        "TTLinear(in_features=64, out_features=64, bias=False, rank=(2, 2), in_modes=(4, 4, 4), out_modes=(4, 4, 4), "
        "cores=3, parameters=128 (0.0312 of dense))"
    )
    assert "LowRankLinear(in_features=8, out_features=4, bias=True, rank=2, " in repr(
        nn.Sequential(LowRankLinear(8, 4, rank=2))
    )


def test_reset_parameters_draws_anew_from_the_same_distribution(layer):
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    torch.manual_seed(1)
    layer.reset_parameters()
    constants = {name for name, _ in layer.named_buffers()}
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]) == (key in constants)
    assert layer.to_dense().square().mean().sqrt().item() == pytest.approx((3 * 16) ** -0.5, rel=0.1)
    assert layer.bias.abs().max() <= 1 / 4
    torch.manual_seed(1)
    layer.reset_parameters()
    first = layer.to_dense()
    torch.manual_seed(1)
    layer.reset_parameters()
    assert torch.equal(layer.to_dense(), first)


# Inputs of other layouts ---------------------------------------------------------------------------------------------

LAYOUTS = {
    "coo": lambda rows: rows.to_sparse(),
    "csr": lambda rows: rows.to_sparse_csr(),
    "mkldnn": lambda rows: rows.to_mkldnn(),
    "nested": lambda rows: torch.nested.nested_tensor([rows[:1], rows[1:]]),
    "jagged": lambda rows: torch.nested.nested_tensor([rows[:1], rows[1:]], layout=torch.jagged),
}


def entries(y):
    return torch.cat([*y.unbind()]) if y.is_nested else y.to_dense() if y.is_mkldnn else y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_inputs(make, layout):
    layer, rows = make(16, 20), torch.randn(5, 16).relu()
    linear, x = layer.to_linear(), LAYOUTS[layout](rows)
    for _ in range(2):  # the second time after a plain input, which may run by a shortcut then
        y, expected = layer(x), linear(x)
        assert (y.layout, y.is_nested) == (expected.layout, expected.is_nested)
        assert_close(entries(y), entries(expected), layout, 1e-5)
        layer(rows)


# Dtype, device, modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_dtype_argument(make, dtype):
    layer = make(16, 20, dtype=dtype, device="cpu")
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    assert layer(torch.ones(2, 16, dtype=dtype)).dtype == dtype


def test_default_dtype_is_respected(make):
    torch.set_default_dtype(torch.float64)
    try:
        assert {tensor.dtype for tensor in make(16, 20).state_dict().values()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


def test_conversions(layer):
    x = torch.randn(3, 16)
    expected = layer(x)
    assert layer.double()(x.double()).dtype == torch.float64
    assert_close(layer.half()(x.half()).float(), expected, "half", 0.02)
    assert_close(layer.to(torch.bfloat16)(x.bfloat16()).float(), expected, "bfloat16", 0.05)
    assert layer.float()(x).dtype == torch.float32


def test_meta_device_then_to_empty_and_load(make):
    source = make(16, 20)
    x = torch.randn(3, 16)
    meta = make(16, 20, device="meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert meta(torch.empty(3, 16, device="meta")).shape == (3, 20)
    assert meta.to_dense().shape == (20, 16)
    filled = meta.to_empty(device="cpu")
    filled.load_state_dict(source.state_dict())
    assert torch.equal(filled(x), source(x))


def test_meta_device_as_context_and_assign(make):
    source = make(16, 20)
    with torch.device("meta"):
        meta = make(16, 20)
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    x = torch.randn(3, 16)
    meta.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(meta(x), source(x))
    assert all(isinstance(p, nn.Parameter) for p in meta.parameters())


def test_layers_are_built_under_fake_tensor_mode(make):
    with FakeTensorMode():
        layer = make(16, 20)
        assert isinstance(layer.factors[0], FakeTensor)
        assert layer(torch.empty(3, 16)).shape == (3, 20)


def test_reset_parameters_after_to_empty(make):
    layer = make(16, 20, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.to_dense().square().mean().sqrt().item() == pytest.approx((3 * 16) ** -0.5, rel=0.1)


def test_training_flag_and_requires_grad_are_kept_by_from_linear(make):
    structure = make(16, 20).structure
    linear = nn.Linear(16, 20).eval().requires_grad_(False)
    layer = StructuredLinear.from_linear(linear, structure=structure, refine=2)
    assert layer.training is False
    assert not any(p.requires_grad for p in layer.parameters())
    linear.bias.requires_grad_(True)
    layer = StructuredLinear.from_linear(linear.train(), structure=structure, refine=2)
    assert layer.training is True
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_from_linear_leaves_the_linear_alone_and_shares_nothing(make):
    linear = nn.Linear(16, 20)
    before = copy.deepcopy(linear.state_dict())
    layer = StructuredLinear.from_linear(linear, structure=make(16, 20).structure, refine=2)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert all(torch.equal(linear.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(before["bias"], linear.bias)


def test_to_linear_gives_the_same_outputs_and_flags(layer):
    x = torch.randn(3, 16)
    linear = layer.eval().requires_grad_(False).to_linear()
    assert type(linear) is nn.Linear
    assert linear.training is False
    assert not any(p.requires_grad for p in linear.parameters())
    assert_close(linear(x), layer(x), "to_linear")
    linear.weight.data.zero_()
    linear.bias.data.zero_()
    assert layer(x).norm() > 0


# Storage -------------------------------------------------------------------------------------------------------------


def test_load_state_dict_is_strict(layer):
    state = layer.state_dict()
    first = next(iter(state))
    with pytest.raises(RuntimeError, match=f'Missing key.*"{first}"'):
        layer.load_state_dict({key: value for key, value in state.items() if key != first})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        layer.load_state_dict({**state, "weight": torch.zeros(20, 16)})
    with pytest.raises(RuntimeError, match=f"size mismatch for {first}"):
        layer.load_state_dict({**state, first: torch.zeros(1, 2, 3, 4, 5, 6, 7)})


def test_load_state_dict_changes_the_output(make):
    source, layer = make(16, 20), make(16, 20)
    x = torch.randn(3, 16)
    for assign in (False, True):
        target = copy.deepcopy(layer)
        assert not torch.equal(target(x), source(x))
        target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(target(x), source(x))


def test_torch_save_of_state_and_of_module(layer):
    x = torch.randn(3, 16)
    for value, weights_only in ((layer.state_dict(), True), (layer, False)):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=weights_only)
        other = copy.deepcopy(layer)
        other.reset_parameters()
        other.load_state_dict(loaded if weights_only else loaded.state_dict())
        assert torch.equal(other(x), layer(x))


def test_copies_after_forward_and_backward(layer):
    """Nothing that a pass leaves behind stands in the way of a copy, or goes stale in it."""
    x = torch.randn(3, 16)
    layer(x).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            for equation in twin.spec.equations:
                getattr(twin, equation.factors[0].name).mul_(2)
        assert_close(twin(x) - twin.bias, 2 * (layer(x) - layer.bias), "after a change of a factor", 1e-5)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_reduces_the_loss(layer, optimizer):
    x, y = torch.randn(64, 16), torch.randn(64, 20)
    steps = optimizer(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        steps.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]


def test_double_backward(layer):
    x = torch.randn(3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    dense = layer.to_dense().detach()
    # d/dx |2 (W x + b)^T W|^2 = 8 (W W^T W)^T ...: compare with the same through the dense matrix.
    again = x.detach().clone().requires_grad_()
    y = torch.nn.functional.linear(again, dense, layer.bias.detach())
    (wanted,) = torch.autograd.grad(y.square().sum(), again, create_graph=True)
    wanted.square().sum().backward()
    assert_close(x.grad, again.grad, "double backward", 1e-4)


def test_frozen_factor_gets_no_gradient(layer):
    first = next(iter(layer.parameters()))
    first.requires_grad_(False)
    layer(torch.randn(3, 16)).sum().backward()
    assert first.grad is None
    assert layer.bias.grad is not None


# Inside modules that read `weight` -----------------------------------------------------------------------------------


def test_multihead_attention_out_proj():
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    structured = copy.deepcopy(attention)
    structured.out_proj = LowRankLinear.from_linear(attention.out_proj, rank=4)
    dense = copy.deepcopy(attention)
    dense.out_proj.weight = nn.Parameter(structured.out_proj.to_dense().detach())
    for train in (True, False):
        for module in (structured, dense):
            module.train(train)
        assert_close(structured(x, x, x)[0], dense(x, x, x)[0], f"attention, train={train}")
    structured.train()(x, x, x)[0].sum().backward()
    assert all(p.grad is not None for p in structured.parameters())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("train", [True, False])
def test_transformer_encoder_layer(name, train):
    block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    dense = copy.deepcopy(block)
    for key in ("linear1", "linear2"):
        layer = StructuredLinear.from_linear(getattr(block, key), structure=ONE[name], refine=2)
        setattr(block, key, layer)
        setattr(dense, key, layer.to_linear())
    x = torch.randn(2, 5, 16)
    block.train(train)
    dense.train(train)
    with torch.set_grad_enabled(train):
        assert_close(block(x), dense(x), "encoder layer")
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        actual, expected = (module(x, src_key_padding_mask=mask) for module in (block, dense))
        assert_close(actual[~mask], expected[~mask], "encoder layer with a mask")


# What is refused -----------------------------------------------------------------------------------------------------


def test_parametrisation_and_weight_norm_are_refused(layer):
    before = layer(torch.ones(16))
    for wrap in (
        lambda: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        lambda: nn.utils.parametrizations.weight_norm(layer),
        lambda: nn.utils.parametrizations.spectral_norm(layer),
    ):
        with pytest.raises(ValueError, match=r"does not have a parameter.*'weight'"):
            wrap()
    assert torch.equal(layer(torch.ones(16)), before)


@pytest.mark.parametrize(
    "x", [torch.randn(3, 15), torch.randn(20), torch.tensor(1.0), torch.randn(16, 3)], ids=lambda x: str(x.shape)
)
def test_input_of_the_wrong_width(layer, x):
    message = f"input has shape {tuple(x.shape)}; its last axis must be in_features=16"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(x)


@pytest.mark.parametrize(
    ("sizes", "error"), [((0, 4), ValueError), ((4, -1), ValueError), ((4.0, 4), TypeError), (("4", 4), TypeError)]
)
def test_sizes_out_of_range(make, sizes, error):
    with pytest.raises(error, match=r"sizes are whole numbers from 1|as an integer"):
        make(*sizes)


NAMED = {
    "rank=9 is outside 1..8 for a 10 x 8 matrix": lambda: LowRankLinear(8, 10, rank=9),
    "rank=0 is outside 1..8": lambda: LowRankLinear(8, 10, rank=0),
    "terms=7 is outside 1..6 for factor shapes (2, 3) and (4, 6); use fewer": lambda: KroneckerLinear(
        18, 8, terms=7, shape=((2, 3), (4, 6))
    ),
    "terms=0 is outside 1..6": lambda: KroneckerLinear(18, 8, terms=0, shape=((2, 3), (4, 6))),
    "covers 8 x 18, less than the layer's 9 x 18; use": lambda: KroneckerLinear(18, 9, shape=((2, 3), (4, 6))),
    "covers 0 x 18, less than": lambda: KroneckerLinear(18, 8, shape=((0, 3), (4, 6))),
    "n=0 is below 1": lambda: PHMLinear(8, 8, n=0),
    "n=3 is outside 1..1 for factor shapes (3, 3) and (1, 1)": lambda: PHMLinear(2, 2, n=3),
    "algebra='octonion' is unknown; use 'learned' or 'hamilton'": lambda: PHMLinear(8, 8, algebra="octonion"),
    "n=2 with algebra='hamilton'; the quaternions have n=4": lambda: PHMLinear(8, 8, n=2, algebra="hamilton"),
    "order='spiral' is unknown; use 'kron' or 'reshape'": lambda: ShapeshifterLinear(8, 8, rank=1, order="spiral"),
    "rank=9 is outside 1..8 for factor shapes (2, 4) and (4, 2)": lambda: ShapeshifterLinear(8, 8, rank=9),
    "rank=9 is outside 1..8 for the weight read as 8 x 8": lambda: ShapeshifterLinear(8, 8, rank=9, order="reshape"),
    "rank is missing; give one number": lambda: TTLinear(8, 8),
    "rank=5 is outside 1..4, the maximum over the bonds": lambda: TTLinear(8, 8, rank=5),
    "rank=(4, 5) must give each bond a rank from 1 to its maximum (4, 4)": lambda: TTLinear(8, 8, rank=(4, 5)),
    "rank=(4,) must give each bond": lambda: TTLinear(8, 8, rank=(4,)),
    "cores=1: use 2 to 32 modes from 1": lambda: TTLinear(8, 8, rank=1, cores=1),
    "cores=33: use 2 to 32 modes from 1": lambda: TTLinear(8, 8, rank=1, cores=33),
    "in_modes=(2, 4), cores=3: use 2 to 32 modes from 1, as many for the output": lambda: TTLinear(
        8, 8, rank=1, in_modes=(2, 4), out_modes=(2, 2, 2)
    ),
    "in_modes=(0, 8)": lambda: TTLinear(8, 8, rank=1, in_modes=(0, 8)),
    "cover 8 x 6, less than the 8 x 8 of the layer; use larger modes": lambda: TTLinear(
        8, 8, rank=1, in_modes=(2, 3), out_modes=(2, 4)
    ),
    "tolerance gives the ranks from a weight: use it in from_linear": lambda: TTLinear(8, 8, tolerance=0.1),
    "radix=1 is below 2; use 2 for the classic butterfly or None": lambda: ButterflyLinear(8, 8, radix=1),
    "modes=(2, 3) cover 6, less than the size 8; use larger modes": lambda: ButterflyLinear(8, 8, in_modes=(2, 3)),
    "modes=(0, 8) cover 0": lambda: ButterflyLinear(8, 8, in_modes=(0, 8)),
    "in_modes=(2, 4) and out_modes=(8,) differ in length; use as many": lambda: ButterflyLinear(
        8, 8, in_modes=(2, 4), out_modes=(8,)
    ),
    "width=0, expansion=1; both are whole numbers from 1, a width may add .5": lambda: KMatrix(8, 8, width=0),
    "width=1.3, expansion=1": lambda: KMatrix(8, 8, width=1.3),
    "width=nan, expansion=1": lambda: KMatrix(8, 8, width=float("nan")),
    "width=inf, expansion=1": lambda: KMatrix(8, 8, width=float("inf")),
    "width=1, expansion=-2": lambda: KMatrix(8, 8, expansion=-2),
    "blocks=9 is outside 1..8 for a 10 x 8 matrix; use fewer blocks": lambda: MonarchLinear(8, 10, blocks=9),
    "blocks=0 is outside 1..8": lambda: MonarchLinear(8, 10, blocks=0),
    "rank=5 is outside 1..4, the smaller side of a block": lambda: MonarchLinear(8, 10, blocks=2, rank=5),
    "order='sideways' is unknown; use one of ('auto', 'forward', 'backward', 'materialise')": lambda: LowRankLinear(
        8, 8, rank=1
    ).use_plan("sideways"),
    "the plan contracts t o1 i1": lambda: LowRankLinear(8, 8, rank=1).use_plan(KroneckerLinear(8, 8).plan(4)),
    "StructuredLinear.from_linear needs structure=; named layers": lambda: StructuredLinear.from_linear(
        nn.Linear(8, 8)
    ),
    "give either ratio or hyperparameters, not both: ratio=0.5, {'rank': 2}": lambda: LowRankLinear.from_linear(
        nn.Linear(8, 8), ratio=0.5, rank=2
    ),
}


@pytest.mark.parametrize("message", NAMED)
def test_values_out_of_range(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NAMED[message]()


@pytest.mark.parametrize("value", [True, 2.0, 2.5, "2", (2, 2, 2.0), [True]], ids=repr)
@pytest.mark.parametrize(
    ("cls", "field"),
    [
        (LowRankLinear, "rank"),
        (TTLinear, "rank"),
        (TTLinear, "in_modes"),
        (KroneckerLinear, "terms"),
        (KMatrix, "expansion"),
    ],
)
def test_hyperparameters_of_the_wrong_kind(cls, field, value):
    with pytest.raises(TypeError, match=rf"{field}=.* is of the wrong kind; use "):
        cls(8, 8, **{field: value})


def test_none_is_of_the_wrong_kind_where_nothing_can_be_found():
    with pytest.raises(TypeError, match="LowRank: rank=None is of the wrong kind; use int"):
        LowRankLinear(8, 8, rank=None)


@pytest.mark.parametrize("name", ["weight", "bias", "forward", "factors"])
def test_factor_names_that_a_layer_needs(name):
    class Clash(LowRank):
        def spec(self, in_features, out_features):
            eq = equation("o r, r i -> o i", (name, "right"), {"o": out_features, "r": 1, "i": in_features})
            return Spec(in_features, out_features, (eq,))

    with pytest.raises(ValueError, match=f"the factor name '{name}' is an attribute of every layer"):
        StructuredLinear(4, 4, structure=Clash(rank=1))


def test_lists_and_index_types_are_taken():
    torch_int = torch.tensor(2)
    assert LowRank(rank=torch_int) == LowRank(rank=2)
    assert type(LowRank(rank=torch_int).rank) is int
    structure = TensorTrain(rank=[2, 2], in_modes=[2, 2, 2])
    assert structure == TensorTrain(rank=(2, 2), in_modes=(2, 2, 2))
    assert hash(structure)


def test_from_linear_takes_linears_only():
    with pytest.raises(TypeError, match=r"takes an nn\.Linear, not Conv1d"):
        LowRankLinear.from_linear(nn.Conv1d(4, 4, 1), rank=2)
    with pytest.raises(TypeError, match=r"takes an nn\.Linear, not Tensor"):
        LowRankLinear.from_linear(torch.ones(4, 4), rank=2)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((4, 4), float("nan")), "NaN or infinite"),
        (torch.eye(4).index_fill(0, torch.tensor([1]), float("inf")), "NaN or infinite"),
        (torch.empty(4, 4, device="meta"), "meta device and has no values"),
    ],
)
def test_weights_that_cannot_be_decomposed(weight, message):
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match=message):
        LowRankLinear.from_linear(linear, rank=2)


# Plans of a layer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plans(monkeypatch):
    """The plans that run."""
    ran = []
    run = forward.contracted
    monkeypatch.setattr(forward, "contracted", lambda plan, *args: ran.append(plan) or run(plan, *args))
    return ran


def test_use_plan_with_a_plan_of_the_layer(layer, plans):
    x = torch.randn(40, 16)
    for order in ("forward", "backward", "materialise", "auto"):
        plan = layer.plan(7, order)
        layer.use_plan(plan)
        assert_close(layer(x), x @ layer.to_dense().T + layer.bias, f"a plan for 7 rows, {order}")
        assert all(ran is part for ran, part in zip(plans[-len(plan.parts) :], plan.parts, strict=True))
    layer.use_plan("materialise")
    layer(x)
    assert plans[-1].materialises == (len(layer.factors) > 1)
    layer.use_plan("auto")
    layer(x)
    assert plans[-1] == layer.plan(64).parts[-1]


def test_auto_plans_by_the_number_of_rows(plans):
    layer = PHMLinear(512, 512, n=8)
    x = torch.randn(300, 512)
    assert_close(layer(x[:1]), x[:1] @ layer.to_dense().T + layer.bias, "one row")
    assert not plans[-1].materialises
    assert_close(layer(x), x @ layer.to_dense().T + layer.bias, "many rows")
    assert plans[-1].materialises

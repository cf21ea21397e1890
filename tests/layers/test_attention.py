"""StructuredMultiheadAttention computes what nn.MultiheadAttention computes, by calls of its projections."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from structlin import LowRankLinear
from structlin.layers.attention import StructuredMultiheadAttention
from structlin.testing import assert_close

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
BATCH, QUERIES, KEYS, SIZE, HEADS = 3, 4, 5, 8, 2

OPTIONS = {
    "packed": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "separate": {"kdim": 6, "vdim": 10},
    "separate, batch first, no bias": {"kdim": 6, "vdim": 10, "batch_first": True, "bias": False},
    "vdim only": {"vdim": 10},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv, zero_attn, separate": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10},
    "one head": {"num_heads": 1, "batch_first": True},
}
WEIGHTS = {"no weights": (False, True), "mean weights": (True, True), "weights per head": (True, False)}


def dense(**options):
    """An nn.MultiheadAttention none of whose parameters is zero."""
    attention = nn.MultiheadAttention(SIZE, dtype=torch.float64, **{"num_heads": HEADS, **options})
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return attention


def inputs(attention, batch=BATCH, keys=KEYS):
    """Query, key and value; 2-D ones where batch is None."""
    sizes = ((QUERIES, SIZE), (keys, attention.kdim), (keys, attention.vdim))
    found = [torch.randn(*([batch] if batch else []), *size, dtype=torch.float64) for size in sizes]
    if batch and not attention.batch_first:
        found = [x.transpose(0, 1) for x in found]
    return [x.requires_grad_() for x in found]


def mask(kind, *shape):
    """None, or a mask that hides no first key: boolean or float."""
    if kind is None:
        return None
    hidden = torch.rand(shape) > 0.6
    hidden[..., 0] = False
    return hidden if kind is bool else torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -math.inf)


def low_rank(attention, rank=3):
    """The attention opened, with structured projections, and its dense twin."""
    opened = StructuredMultiheadAttention.from_attention(attention)
    for name in PROJECTIONS:
        setattr(opened, name, LowRankLinear.from_linear(getattr(opened, name), rank=rank))
    return opened, opened.to_attention(copy.deepcopy(attention).to("meta"))


def results(module, x, kwargs):
    """Output, weights, and gradients by the names of nn.MultiheadAttention with separate projections."""
    output, weights = module(*x, **kwargs)
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).sum()
    if weights is not None:
        loss = loss + weights.square().sum()
    names = [*(name for name, _ in module.named_parameters()), "query", "key", "value"]
    found = dict(zip(names, torch.autograd.grad(loss, [*module.parameters(), *x]), strict=True))
    for kind in ("weight", "bias"):
        if f"in_proj_{kind}" in found:
            parts = found.pop(f"in_proj_{kind}").chunk(3)
            found |= {f"{name}.{kind}": part for name, part in zip(PROJECTIONS, parts, strict=False)}
    return output, weights, {name.replace("proj_weight", "proj.weight"): grad for name, grad in found.items()}


# The same outputs and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("attn", [None, (bool, 2), (bool, 3), (float, 2), (float, 3)], ids=str)
@pytest.mark.parametrize("padding", [None, bool, float], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_weights_and_gradients(options, padding, attn, weights):
    attention = dense(**OPTIONS[options])
    opened = StructuredMultiheadAttention.from_attention(copy.deepcopy(attention))
    need, average = WEIGHTS[weights]
    kind, axes = attn or (None, 2)
    if padding and kind:
        padding = kind  # different kinds are deprecated, see below
    for batch in (BATCH, 1, None):
        rows = () if axes == 2 else ((batch or 1) * attention.num_heads,)
        kwargs = {
            "key_padding_mask": mask(padding, *([batch] if batch else []), KEYS),
            "attn_mask": mask(kind, *rows, QUERIES, KEYS),
            "need_weights": need,
            "average_attn_weights": average,
        }
        x = inputs(attention, batch)
        y, w, expected = results(attention, x, kwargs)
        y2, w2, actual = results(opened, x, kwargs)
        assert_close(y2, y, f"output, batch {batch}")
        assert (w is None) == (w2 is None) == (not need)
        if need:
            assert_close(w2, w, f"weights, batch {batch}")
        assert actual.keys() == expected.keys()
        # What cancels is rounding: the bias of k_proj moves no weights.
        scale = max(grad.norm().item() for grad in expected.values())
        for name in expected:
            assert_close(actual[name], expected[name], f"gradient of {name}, batch {batch}", scale=scale)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [None, float], ids=str)
@pytest.mark.parametrize("options", ["packed", "bias_kv", "zero_attn"])
def test_causal_hint(options, padding, need_weights):
    attention = dense(**OPTIONS[options])
    opened = StructuredMultiheadAttention.from_attention(attention)
    x = inputs(attention, keys=QUERIES)
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    for attn_mask in (causal, torch.randn_like(causal)):  # where SDPA takes the hint, torch drops the mask
        kwargs = {
            "attn_mask": attn_mask,
            "key_padding_mask": mask(padding, BATCH, QUERIES),
            "need_weights": need_weights,
        }
        assert_close(opened(*x, is_causal=True, **kwargs)[0], attention(*x, is_causal=True, **kwargs)[0], "output")


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_in_training_and_nothing_in_eval(need_weights):
    attention = dense(dropout=0.5)
    opened = StructuredMultiheadAttention.from_attention(attention)
    x = inputs(attention)
    results = {}
    for training in (True, False):
        for module in (attention, opened):
            torch.manual_seed(1)
            results[module, training] = module.train(training)(*x, need_weights=need_weights)[0]
        assert_close(results[opened, training], results[attention, training], f"output, training={training}")
    assert not torch.allclose(results[opened, True], results[opened, False])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_half_precision_and_autocast(masked, need_weights):
    attention = dense(batch_first=True).float()
    opened = StructuredMultiheadAttention.from_attention(attention)
    x = [t.detach().float() for t in inputs(attention)]
    padding = mask(bool, BATCH, KEYS) if masked else None
    y, expected = (module(*x, padding, need_weights)[0] for module in (opened, attention))
    assert_close(y, expected, "float32", 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        (y, w), (expected, v) = (module(*x, padding, need_weights) for module in (opened, attention))
    assert y.dtype == expected.dtype
    assert_close(y, expected, "autocast")
    assert not need_weights or w.dtype == v.dtype
    x = [t.bfloat16() for t in x]
    y, expected = (module.bfloat16()(*x, padding, need_weights)[0] for module in (opened, attention))
    assert_close(y, expected, "bfloat16")


@pytest.mark.parametrize("need_weights", [True, False])
def test_rows_without_a_key_are_as_in_torch(need_weights):
    attention = dense()
    opened = StructuredMultiheadAttention.from_attention(attention)
    x = inputs(attention)
    hidden = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    hidden[1] = True
    y, expected = (module(*x, hidden, need_weights)[0] for module in (opened, attention))
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_masks_of_two_kinds_warn_as_in_torch():
    attention = dense()
    opened = StructuredMultiheadAttention.from_attention(attention)
    x, padding, attn_mask = inputs(attention), mask(bool, BATCH, KEYS), mask(float, QUERIES, KEYS)
    results = []
    for module in (attention, opened):
        with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
            results.append(module(*x, padding, attn_mask=attn_mask)[0])
    assert_close(results[1], results[0], "output")


def test_projections_of_one_tensor_are_called_with_it():
    """So that their Grams can be shared."""
    opened, _ = low_rank(dense(batch_first=True))
    x = torch.randn(2, 3, SIZE, dtype=torch.float64)
    given = []
    for name in PROJECTIONS[:3]:
        getattr(opened, name).register_forward_pre_hook(lambda module, args: given.append(args[0]))
    opened(x, x, x)
    assert [t is x for t in given] == [True] * 3


# Open and close ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_opened_projections_share_storage_and_close_to_the_same_bits(options):
    attention = dense(**OPTIONS[options], dropout=0.25).eval()
    first = next(attention.parameters()).requires_grad_(False)
    opened = StructuredMultiheadAttention.from_attention(attention)
    assert not any(module.training for module in opened.modules())
    assert all(type(getattr(opened, name)) is nn.Linear for name in PROJECTIONS)
    assert opened._qkv_same_embed_dim == attention._qkv_same_embed_dim  # read by nn.TransformerEncoder
    assert not opened.q_proj.weight.requires_grad
    assert opened.out_proj.weight.requires_grad
    own = {t.untyped_storage().data_ptr() for t in attention.parameters()}
    assert {t.untyped_storage().data_ptr() for t in opened.parameters()} == own
    assert sum(t.numel() for t in opened.parameters()) == sum(t.numel() for t in attention.parameters())

    closed = opened.to_attention(copy.deepcopy(attention).to("meta"))
    assert type(closed) is nn.MultiheadAttention
    assert not closed.training
    assert closed.dropout == 0.25
    state, expected = closed.state_dict(), attention.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    flags = {name: parameter.requires_grad for name, parameter in attention.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in closed.named_parameters()} == flags
    assert not first.requires_grad


def test_meta_modules_open_without_memory():
    attention = nn.MultiheadAttention(SIZE, HEADS, device="meta", dtype=torch.bfloat16, add_bias_kv=True)
    opened = StructuredMultiheadAttention.from_attention(attention)
    assert {(t.device.type, t.dtype) for t in opened.parameters()} == {("meta", torch.bfloat16)}
    x = torch.empty(KEYS, BATCH, SIZE, device="meta", dtype=torch.bfloat16)
    assert opened(x, x, x)[0].shape == x.shape


@pytest.mark.parametrize("options", ["packed", "no bias", "separate"])
def test_structured_projections_close_to_a_dense_twin(options):
    opened, twin = low_rank(dense(**OPTIONS[options]))
    x = inputs(opened)
    for actual, expected in zip(opened(*x), twin(*x), strict=True):
        assert_close(actual, expected, "output and weights")

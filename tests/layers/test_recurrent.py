"""LSTM and GRU against torch's own: outputs, states, gradients, packed sequences; structured maps and whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import structlin
from structlin import StructuredGRU, StructuredLinear, StructuredLSTM
from structlin.adapters import adapter_of
from structlin.structures import LowRank, Monarch, TensorTrain
from structlin.testing import assert_close

F64 = torch.float64
OPTIONS = {
    "plain": {}, "no bias": {"bias": False}, "batch first": {"batch_first": True}, "two layers": {"num_layers": 2},
    "both ways": {"bidirectional": True},
    "all": {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.5},
}  # fmt: skip
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def opened(rnn, **settings):
    return (
        StructuredLSTM.from_lstm(rnn, **settings)
        if isinstance(rnn, nn.LSTM)
        else StructuredGRU.from_gru(rnn, **settings)
    )


def merged(found, rnn):
    return found.to_lstm(rnn) if isinstance(rnn, nn.LSTM) else found.to_gru(rnn)


def flat(result):
    y, states = result
    y = y.data if isinstance(y, PackedSequence) else y
    return [y, *(states if isinstance(states, tuple) else [states])]


def start(rnn, batch, count):
    shape = (rnn.num_layers * (1 + rnn.bidirectional), *batch, rnn.hidden_size)
    states = tuple(torch.randn(shape, dtype=F64) for _ in range(count))
    return states if count > 1 else states[0]


@every_kind
@every_option
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("form", ["batch", "single", "packed", "unsorted"])
def test_outputs_states_and_gradients_are_torchs(kind, options, given, form):
    torch.manual_seed(0)
    rnn = kind(5, 4, dtype=F64, **options).eval()
    found = opened(rnn)
    x = torch.randn(3, 6, 5, dtype=F64) if rnn.batch_first else torch.randn(6, 3, 5, dtype=F64)
    hx = start(rnn, () if form == "single" else (3,), 2 if kind is nn.LSTM else 1) if given else None
    x = x[0] if form == "single" else x
    grads = []
    for module in (found, rnn):
        inputs = x.clone().requires_grad_()
        lengths = {"packed": [6, 4, 1], "unsorted": [2, 6, 3]}.get(form)
        fed = inputs
        if lengths:
            fed = pack_padded_sequence(inputs, lengths, rnn.batch_first, enforce_sorted=form == "packed")
        results = module(fed, hx)
        if lengths:
            assert torch.equal(results[0].batch_sizes, fed.batch_sizes)
            assert pad_packed_sequence(results[0], rnn.batch_first)[1].tolist() == lengths
        rnn.zero_grad()
        sum(part.square().sum() for part in flat(results)).backward()
        grads.append([*flat(results), inputs.grad, *(p.grad.clone() for p in rnn.parameters())])
    for a, b in zip(*grads, strict=True):
        assert a.shape == b.shape
        assert_close(a, b, "output, state or gradient")


@every_kind
@every_option
def test_opening_shares_parameters_and_merging_gives_them_back(kind, options):
    rnn = kind(5, 4, **options).requires_grad_(False).eval()
    found = opened(rnn)
    assert all(getattr(found, name).weight is getattr(rnn, f"weight_{name}") for name in found.names)
    assert not found.training
    again = merged(found, copy.deepcopy(rnn).to("meta"))
    assert type(again) is kind
    assert again.state_dict().keys() == rnn.state_dict().keys()
    x = torch.randn(2, 3, 5)
    for a, b in zip(flat(again(x)), flat(rnn(x)), strict=True):
        assert torch.equal(a, b)


@every_kind
def test_structured_maps_from_scratch_and_from_weights(kind):
    torch.manual_seed(0)
    cls = StructuredLSTM if kind is nn.LSTM else StructuredGRU
    layer = cls(12, 8, 2, structure=LowRank(rank=3), hidden_structure=Monarch(blocks=2), bidirectional=True, dtype=F64)
    assert isinstance(layer.ih_l1_reverse, StructuredLinear)
    assert layer.hh_l0.structure.name == "monarch"
    rnn = kind(12, 8, 2, bidirectional=True, dtype=F64)
    dense = merged(layer, rnn)
    x = torch.randn(5, 3, 12, dtype=F64)
    for a, b in zip(flat(layer(x)), flat(dense(x)), strict=True):
        assert_close(a, b, "output or state")
    again = opened(dense, structure=LowRank, ratio=1 - 1e-9, hidden_structure=None)
    assert type(again.hh_l0) is nn.Linear
    assert again.hh_l0.weight is not dense.weight_hh_l0
    hidden = opened(dense, hidden_structure=LowRank(rank=8))
    assert type(hidden.ih_l0) is nn.Linear
    assert isinstance(hidden.hh_l0, StructuredLinear)
    exact = opened(dense, structure=LowRank(rank=3), hidden_structure=LowRank(rank=8))
    for a, b in zip(flat(exact(x)), flat(dense(x)), strict=True):
        assert_close(a, b, "output or state")


def test_products_of_all_steps_are_one_call():
    layer = StructuredLSTM(12, 8, structure=LowRank(rank=3))
    calls = []
    layer.ih_l0.register_forward_hook(lambda module, args, y: calls.append(args[0].shape))
    layer(torch.zeros(7, 2, 12))
    assert calls == [(14, 12)]


def test_a_tensor_train_of_the_sources_scale():
    tt = TensorTrain(rank=4, in_modes=(8, 20, 20, 18), out_modes=(16, 2, 2, 16))
    lstm = StructuredLSTM(57600, 256, structure=tt)
    assert lstm.ih_l0.num_parameters == 2944
    y, (_, c) = lstm(torch.randn(2, 1, 57600))
    assert y.shape == (2, 1, 256)
    assert 0.1 < c.std() < 1


@every_kind
def test_empty_and_autocast(kind):
    layer = opened(kind(12, 8, bidirectional=True), structure=LowRank(rank=3))
    for shape in ((0, 2), (3, 0)):
        y, *states = flat(layer(torch.zeros(*shape, 12)))
        assert y.shape == (*shape, 16)
        assert all(state.shape == (2, shape[1], 8) for state in states)
        again = layer(torch.zeros(*shape, 12), tuple(states) if kind is nn.LSTM else states[0])
        assert all(torch.equal(a, b) for a, b in zip(flat(again)[1:], states, strict=True))
    x = torch.randn(3, 2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        low = flat(layer(x))
        low[0].sum().backward()
    for a, b in zip(low, flat(layer(x)), strict=True):
        assert_close(a, b, "under autocast", 0.02)


@every_kind
def test_compiles_and_exports(kind):
    layer = opened(kind(12, 8, bidirectional=True), structure=LowRank(rank=3)).eval()
    x = torch.randn(4, 2, 12)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for a, b in zip(flat(compiled(x)), flat(layer(x)), strict=True):
        assert torch.equal(a, b)
    exported = torch.export.export(layer, (x,)).module()
    for a, b in zip(flat(exported(x)), flat(layer(x)), strict=True):
        assert_close(a, b, "exported")


def test_code_that_packs_the_weights_of_torchs_networks_runs():
    layer = StructuredLSTM(12, 8, structure=LowRank(rank=3))
    layer.flatten_parameters()
    assert layer(torch.zeros(3, 2, 12))[0].shape == (3, 2, 8)


def test_errors_say_what_is_possible():
    with pytest.raises(TypeError, match=r"from_lstm takes an nn\.LSTM, not GRU"):
        StructuredLSTM.from_lstm(nn.GRU(4, 4))
    with pytest.raises(TypeError, match=r"from_gru takes an nn\.GRU, not LSTM"):
        StructuredGRU.from_gru(nn.LSTM(4, 4))
    with pytest.raises(ValueError, match="proj_size=2; projections"):
        StructuredLSTM.from_lstm(nn.LSTM(4, 4, proj_size=2))
    layer = StructuredLSTM(4, 3)
    with pytest.raises(ValueError, match=r"input has shape \(2, 5\); it must be \(time, batch, 4\)"):
        layer(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"2 of shape \(1, 2, 3\) are needed"):
        layer(torch.zeros(5, 2, 4), (torch.zeros(1, 2, 3), torch.zeros(1, 1, 3)))


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(24, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@every_kind
def test_a_model_is_compressed_calibrated_stored_and_merged_back(kind, tmp_path):
    torch.manual_seed(0)
    model = Tagger(kind).eval()
    dense = copy.deepcopy(model)
    data = [torch.randn(4, 6, 24) for _ in range(4)]
    report = structlin.compress_model(
        model, "lowrank", ratio=0.5, calibration=data, rules={"*.hh_*": None}, progress=False, block_epochs=1
    )
    assert {row.name for row in report.layers if row.structure} == {"rnn.ih_l0", "rnn.ih_l0_reverse"}
    assert report.layers[0].output_error < report.layers[0].error
    y = model(data[0])
    loaded = structlin.load(copy.deepcopy(dense), structlin.save(model, tmp_path / "out"))
    assert torch.equal(loaded(data[0]), y)
    back = structlin.to_dense_(model)
    assert type(back.rnn) is kind
    torch.testing.assert_close(back(data[0]), y, atol=1e-5, rtol=1e-4)


def test_networks_with_a_projection_are_left_alone():
    model = nn.Sequential(nn.LSTM(24, 32, proj_size=8))
    assert "proj_size=8" in adapter_of(model[0]).reason(model[0])

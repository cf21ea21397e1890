"""All blocks are refined together, from end to end, once each was refined alone."""

import copy

import pytest
import torch
from test_blocks import FITS, Deep, Reads, batches, distance

from structlin import compress_model
from structlin.compress import refine as refinement
from structlin.compress.patched import model_runs
from structlin.layers.factored import Factored


def compressed(dense, data, **settings):
    model = copy.deepcopy(dense)
    given = {"ratio": 0.4, "calibration": data, "validation": [], "progress": False} | FITS | settings
    return model, compress_model(model, "lowrank", **given)


def test_outputs_come_nearer_on_other_inputs():
    dense, data, unseen = Deep(4).eval(), batches(40), batches(10, seed=5)
    found = []
    for epochs in (0, 12):
        model, report = compressed(dense, data, block_epochs=2, model_epochs=epochs)
        found.append(distance(model, dense, unseen))
        assert [block.name for block in report.blocks][4:] == [""] * (epochs > 0)
    assert found[1] < 0.9 * found[0]
    (last,) = report.blocks[4:]
    assert last.after < last.before
    assert last.steps == 12 * 36  # four batches judge
    assert "block (the model): error" in str(report)


def test_by_default_it_is_for_blocks_that_were_refined_and_models_that_are_not_large(monkeypatch):
    data = batches(10)
    for dense, settings, count in (
        (Deep(2), {}, 3), (Deep(2), {"block_epochs": 0}, 0), (Deep(2), {"blocks": []}, 1),
        (Deep(2), {"model_epochs": 0}, 2), (Deep(2), {"block_epochs": 0, "model_epochs": 1}, 1),
    ):  # fmt: skip
        assert len(compressed(dense, data, **settings)[1].blocks) == count
    trained = sum(p.numel() for m in compressed(Deep(2), data)[0].modules() if isinstance(m, Factored)
                  for p in m.parameters())  # fmt: skip
    for most, count in ((trained, 3), (trained - 1, 2)):
        monkeypatch.setattr(refinement, "END_PARAMETERS", most)
        assert len(compressed(Deep(2), data)[1].blocks) == count


def test_what_gains_nothing_starts_again_at_a_lower_rate(monkeypatch):
    monkeypatch.setattr(refinement, "TRIES", 2)
    monkeypatch.setattr(refinement, "RATE", 30.0)
    monkeypatch.setattr(refinement, "END_RATE", 30.0)
    for slower, gains in ((1.0, False), (3000.0, True)):
        monkeypatch.setattr(refinement, "SLOWER", slower)
        report = compressed(Deep(2), batches(40), block_epochs=2, model_epochs=2)[1]
        assert len(report.blocks) == 3
        assert [block.after < block.before for block in report.blocks] == [gains] * 3
        # Far above the start, the first measurement ends it: after one pass over the batches, not all of them.
        assert [block.steps for block in report.blocks] == [2 * 36 if gains else 40] * 3


def test_outputs_that_take_much_memory_are_computed_again(monkeypatch):
    data = [{"input_ids": torch.randint(50, (4, 7))} for _ in range(8)]
    dense, found = Reads().eval(), []
    for limit in (refinement.LIMIT, 1):
        monkeypatch.setattr(refinement, "LIMIT", limit)
        found.append(compressed(dense, data)[0])
    for one, two in zip(found[0].parameters(), found[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_it_goes_towards_the_outputs_of_the_model_where_forward_makes_less_of_them():
    dense, data = Deep(2).eval(), batches(8)

    def pooled(model, batch):
        return model(batch).sum(-1)

    def longer(model, batch):
        return torch.cat([model(batch)] * 2, -1)

    def twice(model, batch):
        return (model(batch) + model(2 * batch)).sum(-1)

    def other(model, batch):
        return model.inner(batch).sum(-1)

    batch = data[0]
    with torch.no_grad():
        for forward, expected in ((pooled, dense(batch)), *((f, f(dense, batch)) for f in (longer, twice, other))):
            (run,) = model_runs(dense, [batch], forward)
            assert torch.equal(run(), expected)
    assert not dense._forward_hooks
    models = [compressed(dense, data, forward=forward)[0] for forward in (None, pooled)]
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, two)


class Detaching(Deep):
    """Its outputs have gradients, and its backward pass fails."""

    def forward(self, x, attention_mask=None):
        y = super().forward(x, attention_mask)
        if y.requires_grad:
            y.register_hook(self.fail)
        return y

    def fail(self, grad):
        raise RuntimeError("no backward pass")


def test_a_model_that_gradients_do_not_pass_keeps_its_blocks():
    with pytest.warns(UserWarning, match="not refined from end to end: no backward pass"):
        model, report = compressed(Detaching(2), batches(10))
    assert [block.name for block in report.blocks] == ["layers.0", "layers.1"]
    expected = compressed(Detaching(2), batches(10), model_epochs=0)[0]
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_module_that_two_blocks_share_is_not_refined():
    model = Deep(2)
    model.layers[1].norm = model.layers[0].norm
    values = copy.deepcopy(model.layers[0].norm.state_dict())
    found, _ = compressed(model, batches(20), block_epochs=9)
    assert all(torch.equal(value, values[name]) for name, value in found.layers[0].norm.state_dict().items())

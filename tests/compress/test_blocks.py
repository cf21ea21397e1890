"""Block by block: chains, hidden states behind compressed layers, sequential fits and refinement."""

import copy
import gc
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from structlin import compress_model, plan_compression, to_dense_
from structlin.compress import blocks, pipeline
from structlin.compress.blocks import Shelf, Stream, find_chains, parts
from structlin.compress.output import vocabulary_of
from structlin.compress.patched import Patched, model_runs
from structlin.compress.refine import refine
from structlin.compress.scramble import scrambled, widened
from structlin.compress.targets import find_targets
from structlin.layers.factored import Factored

FITS = {"output_metric": False, "allocation": "uniform"}


class Block(nn.Module):
    """A residual block that takes a scale by keyword, counts its calls, and returns a tuple if asked to."""

    def __init__(self, size, as_tuple=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.as_tuple, self.calls = as_tuple, 0

    def forward(self, x, *, scale=None, mask=None):
        self.calls += 1
        y = x + self.down(torch.tanh(self.up(self.norm(x)))) * (1 if scale is None else scale)
        return (y, None) if self.as_tuple else y


class Deep(nn.Module):
    """An input map, blocks with a scale each, and a head."""

    def __init__(self, count=3, size=24, **options):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(16, size)
        self.layers = nn.ModuleList(Block(size, **options) for _ in range(count))
        self.head = nn.Linear(size, 8)

    def forward(self, x, attention_mask=None):
        x = self.inner(x)
        for number, layer in enumerate(self.layers):
            x = layer(x, scale=torch.tensor(1.0 + number), mask=attention_mask)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


class Seq2Seq(nn.Module):
    """Two chains: blocks of the second take what the first made."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.ModuleList(Block(16) for _ in range(2))
        self.decoder = nn.ModuleList(Block(16) for _ in range(2))
        self.head = nn.Linear(16, 8)

    def forward(self, x, y):
        for layer in self.encoder:
            x = layer(x)
        for layer in self.decoder:
            y = layer(y, scale=x.mean(1, keepdim=True))
        return self.head(y)


def batches(count, seed=1, size=16):
    torch.manual_seed(seed)
    return [torch.randn(4, 5, size) * torch.logspace(0, -1, size) for _ in range(count)]


def distance(model, dense, data):
    with torch.no_grad():
        return sum((model(x) - dense(x)).square().sum() / dense(x).square().sum() for x in data).item() / len(data)


# Chains --------------------------------------------------------------------------------------------------------------


def names(chains):
    return [[name for name, _ in chain] for chain in chains]


def test_chains_are_the_outermost_lists_of_modules_of_one_type():
    assert names(find_chains(Deep(2))) == [["layers.0", "layers.1"]]
    assert names(find_chains(nn.Sequential(Deep(2), Deep(2)))) == [["0", "1"]]
    assert names(find_chains(Seq2Seq())) == [["encoder.0", "encoder.1"], ["decoder.0", "decoder.1"]]
    assert find_chains(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == []
    assert find_chains(Deep(1)) == []


def test_chains_that_are_named(monkeypatch):
    model = Deep(3)
    assert names(find_chains(model, ["layers.*"])) == [["layers.0", "layers.1", "layers.2"]]
    assert find_chains(model, []) == []
    with pytest.raises(ValueError, match=r"blocks: 'layer.\*' matches 0 modules; a chain has two or more"):
        compress_model(model, "lowrank", ratio=0.5, calibration=batches(4), blocks=["layer.*"])
    assert type(model.layers[0].up) is nn.Linear


def parts_of(model, data):
    patched = Patched(model, {})
    targets = [target for target in find_targets(model) if not target.reason]
    runs = model_runs(model, data, None)
    return patched, parts(patched, targets, find_chains(model), runs, [None] * len(runs))


def test_parts_come_in_the_order_in_which_they_run():
    _, found = parts_of(Deep(3), batches(2))
    assert [(part.name, [t.name for t in part.targets]) for part in found] == [
        ("", ["inner"]),
        *((f"layers.{k}", [f"layers.{k}.up", f"layers.{k}.down"]) for k in range(3)),
        ("", ["head"]),
    ]


def test_a_list_that_is_no_chain_is_left_to_the_whole_model():
    class Beside(Deep):
        def forward(self, x):
            x = self.inner(x)
            return self.head(sum(layer(x) for layer in self.layers))

    _, found = parts_of(Beside(3), batches(2))
    assert [part.name for part in found] == [""]
    report = compress_model(Beside(3), "lowrank", ratio=0.5, calibration=batches(6), block_epochs=2)
    assert [block.name for block in report.blocks] == [""]


@pytest.mark.parametrize("as_tuple", [False, True])
def test_hidden_states_are_those_of_the_dense_and_of_the_compressed_model(as_tuple):
    model, data = Deep(3, as_tuple=as_tuple), batches(3)
    patched, found = parts_of(model, data)
    seen = {}
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.setdefault(module, []).append(args[0].detach()))
    for part in found:
        if part.name:
            seen.clear()
            for each in part.passes:
                each.dense(), each.drifted()
            got = list(seen[part.module])
            for k, x in enumerate(data):
                seen.clear()
                with patched.dense():
                    model(x)
                torch.testing.assert_close(got[2 * k], seen[part.module][0])
                seen.clear()
                with patched.changed():
                    model(x)
                torch.testing.assert_close(got[2 * k + 1], seen[part.module][0])
        for target in part.targets:  # answers half of what it should
            half = copy.deepcopy(target.linear)
            with torch.no_grad():
                half.weight *= 0.5
            patched.swaps[target.linear] = half


def test_each_block_runs_a_constant_number_of_times():
    calls = []
    for count in (2, 4):
        model = Deep(count)
        compress_model(model, "lowrank", ratio=0.5, calibration=batches(10), block_epochs=2, **FITS)
        calls.append({layer.calls for layer in model.layers})
    assert max(calls[1]) == max(calls[0])


def test_blocks_that_run_otherwise_in_a_later_batch_are_refused_by_name():
    class Skips(Deep):
        def forward(self, x):
            x = self.inner(x)
            for layer in self.layers if x.shape[0] > 2 else self.layers[:1]:
                x = layer(x)
            return self.head(x)

    model = Skips(2)
    data = [*batches(2), batches(1)[0][:2]]
    with pytest.raises(ValueError, match=r"blocks 'layers.0' to 'layers.1' .* not in batch 2; name others in blocks="):
        compress_model(model, "lowrank", ratio=0.5, calibration=data, validation=[])
    assert type(model.layers[0].up) is nn.Linear
    compress_model(model, "lowrank", ratio=0.5, calibration=data, validation=[], blocks=[], block_epochs=1)


def test_a_shelf_maps_what_exceeds_its_limit_from_files():
    shelf, tensors = Shelf(limit=100), [torch.randn(4, 5) for _ in range(3)]
    for number, tensor in enumerate(tensors):
        shelf[number] = tensor
    shelf[1] = tensors[1] + 1
    assert shelf._folder is not None
    assert torch.equal(shelf[0], tensors[0])
    assert torch.equal(shelf[1], tensors[1] + 1)
    assert shelf[1] is not shelf[1]  # mapped anew: the one before is freed
    assert torch.equal(shelf[2], tensors[2])
    shelf[2] = torch.ones(2, 5)  # of another shape
    assert torch.equal(shelf[2], torch.ones(2, 5))
    folder = shelf._folder
    del shelf
    gc.collect()
    assert not folder.exists()


# Fits and refinement -------------------------------------------------------------------------------------------------


def test_every_stage_brings_the_outputs_nearer():
    dense, data, unseen = Deep(4).eval(), batches(40), batches(10, seed=5)
    found = []
    for settings in ({"sequential": False, "block_epochs": 0}, {"block_epochs": 0}, {"block_epochs": 8}):
        model = copy.deepcopy(dense)
        report = compress_model(model, "lowrank", ratio=0.4, calibration=data, validation=[], **FITS, **settings)
        found.append(distance(model, dense, unseen))
    assert found[2] < 0.8 * found[0]
    assert found[2] < found[1] < found[0]
    assert [block.name for block in report.blocks] == [*(f"layers.{k}" for k in range(4)), ""]
    assert all(block.after < block.before for block in report.blocks)
    assert "block layers.0: error" in str(report)
    assert '"blocks"' in report.to_json()


@pytest.mark.parametrize("structure", ["kronecker", "monarch", "auto"])
def test_refinement_is_for_every_structure(structure):
    dense, data = Deep(2).eval(), batches(40)
    model = copy.deepcopy(dense)
    report = compress_model(
        model, structure, ratio=0.5, refine=5, calibration=data, validation=[], block_epochs=5, **FITS
    )
    assert all(block.after <= block.before for block in report.blocks)
    assert any(block.after < block.before for block in report.blocks)
    assert isinstance(model.layers[0].up, Factored)


def test_norms_and_biases_are_refined_and_others_stay():
    model, data = Deep(2), batches(20)
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    compress_model(model, "lowrank", ratio=0.5, rules={"layers.1.down": None}, calibration=data, block_epochs=9, **FITS)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before if name in after)  # the very parameters
    changed = {name for name in values if name in after and not torch.equal(after[name], values[name])}
    vectors = {f"layers.{k}.{part}" for k in range(2) for part in ("norm.weight", "norm.bias", "up.bias")}
    assert changed == vectors | {"layers.0.down.bias", "layers.1.down.bias"}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_parameters_that_others_use_too_are_not_refined():
    model = Deep(2)
    model.layers[1].norm = model.layers[0].norm
    shared = model.layers[0].norm.weight.detach().clone()
    compress_model(model, "lowrank", ratio=0.5, calibration=batches(10), block_epochs=2, **FITS)
    assert torch.equal(model.layers[0].norm.weight, shared)


def test_a_dry_run_and_a_failure_change_nothing(monkeypatch):
    model = Deep(2)
    values = copy.deepcopy(model.state_dict())
    compress_model(model, "lowrank", ratio=0.5, calibration=batches(6), block_epochs=1, dry_run=True)
    monkeypatch.setattr(pipeline, "committed", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress_model(model, "lowrank", ratio=0.5, calibration=batches(6), block_epochs=1)
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not any(vars(module).get("forward") for module in model.modules())


class Complex(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Linear(32, 32, dtype=torch.complex64) for _ in range(3)))

    def forward(self, x):
        return super().forward(x.to(torch.complex64))


class OneBias(nn.Sequential):
    """Blocks that share a bias."""

    def __init__(self):
        super().__init__(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3)))
        for block in self:
            block[0].bias = self[0][0].bias


@pytest.mark.parametrize(
    ("make", "name", "trained"),
    [
        (lambda: nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), "self_attn.out_proj.bias", True),
        (lambda: nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), "self_attn.in_proj_bias", True),
        (Complex, "0.bias", True),
        (OneBias, "0.0.bias", False),
    ],
)
def test_biases_of_the_dense_model_stay_as_they_are_until_the_end(make, name, trained):
    torch.manual_seed(0)
    model, data = make(), list(torch.randn(6, 2, 20, 32))
    values = copy.deepcopy(model.state_dict())
    settings = {"ratio": 0.5, "calibration": data, "block_epochs": 2, "skip_last": False, **FITS}
    compress_model(model, "lowrank", dry_run=True, **settings)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    compress_model(model, "lowrank", **settings)
    assert torch.equal(to_dense_(model).state_dict()[name], values[name]) != trained


def rejects_compressed(model):
    """A task that knows no other layers than those of the dense model."""
    assert not any(isinstance(module, Factored) for module in model.modules())
    return 1.0


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: Deep(2), batches(6)),
        (lambda: nn.Linear(32, 32), list(torch.randn(6, 20, 32))),
        (lambda: nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), list(torch.randn(6, 2, 20, 32))),
    ],
    ids=["blocks", "root", "opened"],
)
def test_a_task_that_fails_on_the_compressed_model_leaves_it_dense(make, given):
    torch.manual_seed(0)
    model = make()
    modules, values = list(model.modules()), copy.deepcopy(model.state_dict())
    settings = {"ratio": 0.5, "calibration": given, "block_epochs": 1, "skip_last": False}
    with pytest.raises(AssertionError):
        compress_model(model, "lowrank", evaluate=rejects_compressed, **settings)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    model(given[0]) if isinstance(given[0], torch.Tensor) else model(**given[0])
    compress_model(model, "lowrank", **settings)


def test_an_error_restores_the_cache_setting_at_once(monkeypatch):
    model = Deep(2)
    model.config = SimpleNamespace(use_cache=True)
    seen = []

    def fails(*args):
        seen.append(model.config.use_cache)
        raise ValueError("here")

    monkeypatch.setattr(pipeline, "fit_part", fails)
    with pytest.raises(ValueError, match="here") as caught:
        compress_model(model, "lowrank", ratio=0.5, calibration=batches(6))
    assert seen == [False]
    assert model.config.use_cache, caught


def test_few_batches_never_end_worse_on_themselves():
    report = compress_model(
        Deep(2), "lowrank", ratio=0.5, calibration=batches(3), validation=[], block_epochs=30, **FITS
    )
    assert all(block.after <= block.before for block in report.blocks)


def test_half_precision_is_refined_in_steps_finer_than_its_own():
    dense, data = Deep(2).bfloat16().eval(), [x.bfloat16() for x in batches(40)]
    model = copy.deepcopy(dense)
    report = compress_model(model, "lowrank", ratio=0.5, calibration=data, validation=[], block_epochs=5, **FITS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert any(block.after < block.before for block in report.blocks)


def test_masked_positions_do_not_count():
    data = [{"x": x, "attention_mask": torch.ones(4, 5)} for x in batches(12)]
    for batch in data:
        batch["attention_mask"][:, 3:] = 0
    other = copy.deepcopy(data)
    for batch in other:
        batch["x"][:, 3:] = 100.0
    found = []
    for each in (data, other):
        model = Deep(2)
        compress_model(model, "lowrank", ratio=0.5, calibration=each, validation=[], block_epochs=2, **FITS)
        found.append(model)
    for one, two in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_an_encoder_and_a_decoder_are_two_chains():
    dense = Seq2Seq().eval()
    data = [(x, y) for x, y in zip(batches(20), batches(20, seed=2), strict=True)]
    model = copy.deepcopy(dense)
    report = compress_model(model, "lowrank", ratio=0.5, calibration=data, block_epochs=2)
    assert [block.name for block in report.blocks] == ["encoder.0", "encoder.1", "decoder.0", "decoder.1", ""]
    with torch.no_grad():
        error = sum((model(*pair) - dense(*pair)).square().sum() / dense(*pair).square().sum() for pair in data)
    assert error / len(data) < 0.1


def test_a_model_that_gradients_do_not_pass_goes_without_the_metric():
    class Stops(Deep):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x) * 2

    with pytest.warns(UserWarning, match="fitted without the metric of the model's outputs"):
        compress_model(Stops(2), "lowrank", ratio=0.5, calibration=batches(6), block_epochs=0)


def test_a_part_without_passes_is_not_refined():
    part = SimpleNamespace(name="", module=nn.Linear(2, 2), own=frozenset(), passes=(), targets=())
    assert refine(part, {}, Patched(part.module, {}), 3, 0) == []


def test_scrambled_text_keeps_what_every_row_has_once_and_what_is_padded():
    rows = torch.tensor([[101, 5, 6, 7, 8, 102, 0, 0], [101, 9, 5, 5, 11, 12, 13, 102]])
    batch = {"input_ids": rows, "attention_mask": (rows > 0).long()}
    (found,) = scrambled([batch], share=0.9)
    assert found["attention_mask"] is batch["attention_mask"]
    changed = found["input_ids"] != rows
    assert changed.any(1).all()
    assert not changed[(rows == 101) | (rows == 102) | (rows == 0)].any()
    assert set(found["input_ids"].flatten().tolist()) <= set(rows.flatten().tolist())
    assert torch.equal(scrambled([batch], share=0.9)[0]["input_ids"], found["input_ids"])
    assert not torch.equal(scrambled([batch], share=0.9, seed=1)[0]["input_ids"], found["input_ids"])
    assert type(scrambled([UserDict(batch)], share=0.9)[0]) is UserDict  # what `forward` gets


def test_words_that_the_text_lacks_are_drawn_too():
    """Of a vocabulary much larger than the text nearly all are."""
    batch = {"input_ids": torch.randint(5, (8, 30))}
    ids = scrambled([batch], 0.5, vocabulary=1000)[0]["input_ids"]
    new = ids[ids != batch["input_ids"]]
    assert 90 < len(new) < 150
    assert (new >= 5).float().mean() > 0.7
    assert ids.max() < 1000


def test_the_vocabulary_is_that_of_the_declared_table():
    class Declares(Reads):
        def __init__(self):
            super().__init__()
            self.positions = nn.Embedding(7, 4)

        def get_input_embeddings(self):
            return self.table

    rows = Reads().table.num_embeddings
    assert vocabulary_of(Reads()) == vocabulary_of(nn.Sequential(Declares())) == rows
    assert vocabulary_of(nn.ModuleList([Reads(), nn.Embedding(7, 4)])) == 0
    assert vocabulary_of(nn.Linear(2, 2)) == 0

    class Refuses(Declares):
        def get_input_embeddings(self):
            raise NotImplementedError  # as transformers does where embeddings are not tokens

    assert vocabulary_of(Refuses()) == 0


@pytest.mark.parametrize("kind", ["tensors", "floats", "empty", "all special", "images"])
def test_what_has_no_tokens_to_exchange_is_not_scrambled(kind):
    ids = torch.tensor([[1, 2, 3], [1, 3, 2]])
    given = {"tensors": [ids], "floats": [{"input_ids": ids.float()}], "empty": [], "all special": [{"input_ids": ids}]}
    given["images"] = [{"input_ids": torch.randint(5, (2, 9)), "pixel_values": torch.ones(2, 3, 4, 4)}]
    assert scrambled(given[kind], share=0.9) == []


def test_scarce_text_is_scrambled_until_its_order_is_lost():
    data = [{"input_ids": torch.randint(1000, (20, 50))}]

    def changed(few):
        return [(copy["input_ids"] != data[0]["input_ids"]).float().mean() for copy in widened(data, 0, 0, few)]

    assert changed(few=False) == pytest.approx([0, 0.3, 0.3, 0.3], abs=0.05)
    assert changed(few=True) == pytest.approx([0, 0.5, 1, 1], abs=0.05)


class Reads(nn.Module):
    """A language model of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = nn.Embedding(50, 16), Deep(2)

    def forward(self, input_ids):
        return self.body(self.table(input_ids))


def test_blocks_are_refined_on_scrambled_text_too_and_judged_on_the_given_one(monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "refine", lambda part, *rest: seen.append((len(part.passes), rest[-1])) or [])
    data = [{"input_ids": torch.randint(50, (4, 7))} for _ in range(12)]
    compress_model(Reads(), "lowrank", ratio=0.5, calibration=data, validation=[], **FITS)
    assert seen == [(48, 12), (48, 12)]
    monkeypatch.undo()
    report = compress_model(Reads(), "lowrank", ratio=0.5, calibration=data, validation=[], **FITS)
    assert [block.steps for block in report.blocks] == [3 * 47, 3 * 47, 6 * 47]


@pytest.mark.parametrize(("count", "copies"), [(27, 3), (28, 0)])  # 28 tokens each; the widest has 48 inputs
def test_statistics_are_of_scrambled_text_too_if_it_is_short(count, copies):
    data = [{"input_ids": torch.randint(50, (4, 7))} for _ in range(count)]
    plan = plan_compression(Reads(), "lowrank", ratio=0.5, calibration=data, validation=[], **FITS)
    assert plan.fitted_with.tokens == plan.fitted_with.layers * (1 + copies) * count * 4 * 7


@pytest.mark.parametrize(("count", "few"), [(27, True), (28, False)])
def test_blocks_see_text_that_is_scrambled_as_far_as_it_is_short(count, few, monkeypatch):
    seen = []
    runs = pipeline.model_runs
    monkeypatch.setattr(pipeline, "model_runs", lambda m, given, how: seen.extend(given) or runs(m, given, how))
    data = [{"input_ids": torch.randint(50, (4, 7))} for _ in range(count)]
    compress_model(Reads(), "lowrank", ratio=0.5, calibration=data, validation=[], **FITS)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(seen, widened(data, 0, 50, few), strict=True)
    )


def test_a_stream_keeps_what_blocks_share():
    model, data = Deep(3), batches(1)
    stream = Stream(Patched(model, {}), find_chains(model)[0], model_runs(model, data, None))
    assert [call.kwargs["scale"].item() for call in stream.calls[0][0]] == [1.0, 2.0, 3.0]
    assert blocks.hidden_of((torch.ones(1), None)).item() == 1

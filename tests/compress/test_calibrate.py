"""Calibration statistics: sums over the inputs of linear maps, whatever the model and the batches are."""

import copy
import json
import math
import socket
import sys
from collections import UserDict
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import structlin
from structlin import LowRankLinear
from structlin.compress.calibrate import (
    Collecting,
    collect_passes,
    collect_shifted,
    collect_statistics,
    statistics_by_layer,
)
from structlin.compress.patched import Pass
from structlin.compress.statistics import Statistics
from structlin.compress.sums import Sums
from structlin.compress.targets import find_targets
from structlin.layers.factored import Factored

F64 = {"rtol": 1e-12, "atol": 1e-12}  # sums of some hundred products, in another order
F32 = {"rtol": 1e-4, "atol": 1e-4}


class Attention(nn.Module):
    """Query, key and value see the same tensor; the key sees another one if asked to."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.head = nn.Linear(size, 5)

    def forward(self, x, other=None, attention_mask=None):
        y = self.q(x) * self.k(x if other is None else other).sigmoid() + self.v(x)
        return self.head(torch.relu_(self.o(y)))


class Shared(nn.Module):
    """One weight in two modules, one module called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right.weight = self.left.weight
        self.again = nn.Linear(6, 6)
        self.idle = nn.Linear(6, 6)

    def forward(self, x):
        return self.again(self.again(self.left(x) + self.right(x)))


class Failing(nn.Module):
    """A linear layer, then an error from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        y = self.linear(x)
        if self.calls > 1:
            raise RuntimeError("the forward failed")
        return self.last(y)


def recorded(model, run, modules):
    """Inputs of modules as a plain hook sees them, in float64, (tokens, in) by module."""
    seen = {module: [] for module in modules}
    handles = [m.register_forward_pre_hook(lambda m, args: seen[m].append(args[0].detach().clone())) for m in modules]
    with torch.no_grad():
        run(model)
    for handle in handles:
        handle.remove()
    return {m: torch.cat([x.reshape(-1, x.shape[-1]).double() for x in found]) for m, found in seen.items()}


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def same_bits(left: Statistics, right: Statistics) -> bool:
    parts = [(getattr(left, f), getattr(right, f)) for f in ("grams", "output_grams", "cross_grams")]
    return left.tokens == right.tokens and all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a) for a, b in parts
    )


# Batches, names, dtypes ----------------------------------------------------------------------------------------------

X = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
BATCHES = {
    "tensor": (X, None),
    "list": ([[x] for x in X], None),
    "tuple": ([(x, 2 * x) for x in X], None),
    "dict": ([{"x": x, "other": x + 1} for x in X], None),
    "mapping": ([UserDict(x=x) for x in X], None),
    "forward": ([{"deep": [x]} for x in X], lambda model, batch: model(x=batch["deep"][0])),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_gram_is_the_sum_over_all_inputs(kind):
    model = Attention()
    batches, forward = BATCHES[kind]
    others = {"tuple": [2 * x for x in X], "dict": [x + 1 for x in X]}.get(kind, [None] * 3)
    names = {"q": model.q, "k": model.k, "v": model.v, "o": model.o, "head": model.head}
    seen = recorded(model, lambda m: [m(x, other) for x, other in zip(X, others, strict=True)], names.values())
    statistics = collect_statistics(model, batches, forward=forward, dtype=torch.float64)
    assert list(statistics.grams) == list(names)
    for name, module in names.items():
        rows = seen[module]
        torch.testing.assert_close(statistics.grams[name], rows.T @ rows, **F64)
        assert statistics.tokens[name] == 18
    assert statistics.output_grams == statistics.cross_grams == {}


def test_a_batch_of_another_kind_needs_forward():
    with pytest.raises(TypeError, match=r"a batch is a str; .* or pass forward="):
        collect_statistics(Attention(), ["text"])


def test_layers_are_named_by_any_alias():
    model = Shared()
    model.alias = model.left
    statistics = collect_statistics(model, [torch.randn(3, 6)], names=["alias", "idle"])
    assert list(statistics.grams) == ["left", "idle"]
    with pytest.raises(
        ValueError, match=r"names \['nope'\] are not linear layers; there are \['left', 'again', 'idle'\]"
    ):
        collect_statistics(model, [], names=["left", "nope"])


def test_targets_follow_tied():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    batches = [torch.arange(10)]
    assert collect_statistics(model, batches).grams == {}
    expected = model[0].weight.T @ model[0].weight
    for chosen in ({"tied": "replace"}, {"names": ["1"]}):
        torch.testing.assert_close(collect_statistics(model, batches, **chosen).grams["1"], expected.detach(), **F32)


def test_structured_layers_are_watched_too():
    model, x = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Linear(24, 8)), torch.randn(40, 16)
    structlin.compress_model(model, "lowrank", ratio=0.5)
    seen = recorded(model, lambda m: m(x), [model[0], model[2]])
    statistics = collect_statistics(model, [x], loss=lambda y, batch: y.square().sum(), dtype=torch.float64)
    assert statistics.tokens == {"3": 40, "0": 40, "2": 40}
    for name in ("0", "2"):
        torch.testing.assert_close(statistics.grams[name], seen[model[int(name)]].T @ seen[model[int(name)]], **F64)
        assert statistics.output_grams[name].shape == (24, 24)
    assert list(collect_statistics(model, [x], names=["2"]).grams) == ["2"]
    with_statistics = structlin.quantize_(model, "int4", group=8, statistics=statistics)
    assert len(with_statistics.layers) == 2


def test_opened_modules_are_watched_inside():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.ModuleDict({"conv": nn.Conv1d(16, 16, 3, padding=1), "layer": layer, "rnn": nn.LSTM(16, 16)})

    def forward(model, x):
        return model["rnn"](model["layer"](model["conv"](x.mT).mT))[0]

    structlin.compress_model(model, "lowrank", ratio=0.5, skip_last=False)
    statistics = collect_statistics(model, [torch.randn(2, 5, 16)], forward=forward)
    assert statistics.tokens.keys() == {name for name, m in model.named_modules() if isinstance(m, Factored)}
    assert len(statistics.tokens) == 1 + 4 + 2 + 2
    assert set(statistics.tokens.values()) == {10}


def test_linears_of_one_weight_and_repeated_calls_are_summed():
    model, x = Shared(), torch.randn(7, 6)
    seen = recorded(model, lambda m: m(x), [model.left, model.again])
    statistics = collect_statistics(model, [x], dtype=torch.float64)
    torch.testing.assert_close(statistics.grams["left"], 2 * seen[model.left].T @ seen[model.left], **F64)
    torch.testing.assert_close(statistics.grams["again"], seen[model.again].T @ seen[model.again], **F64)
    assert statistics.tokens == {"left": 14, "again": 14, "idle": 0}
    assert torch.equal(statistics.grams["idle"], torch.zeros(6, 6, dtype=torch.float64))


def test_no_batches_give_zeros():
    statistics = collect_statistics(Attention(), [], loss=lambda y, batch: y.sum(), output="diagonal")
    assert set(statistics.tokens.values()) == {0}
    assert all(not gram.any() for gram in statistics.grams.values())
    assert {name: tuple(h.shape) for name, h in statistics.output_grams.items()}["head"] == (5,)


def test_a_root_that_is_linear():
    linear, x = nn.Linear(4, 4), torch.randn(9, 4)
    torch.testing.assert_close(collect_statistics(linear, [x]).grams[""], x.T @ x, **F32)
    vector = torch.randn(4)
    torch.testing.assert_close(collect_statistics(linear, [vector]).grams[""], torch.outer(vector, vector), **F32)
    assert collect_statistics(linear, [torch.empty(0, 4)]).tokens == {"": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_sum_in_float32(dtype):
    linear = nn.Linear(4, 4, dtype=dtype)
    x = torch.full((4096, 4), 300.0, dtype=dtype)  # its squares overflow float16, their sum needs 29 bits
    gram = collect_statistics(linear, [x]).grams[""]
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, x.float().T @ x.float())


def test_autocast_and_inference_mode_do_not_reach_the_sums():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(64, 8)
    expected = collect_statistics(model, [x]).grams["0"]

    def narrow(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    loss = lambda y, batch: y.float().square().sum()  # noqa: E731
    assert torch.equal(collect_statistics(model, [x], forward=narrow).grams["0"], expected)
    with torch.autocast("cpu", torch.bfloat16):
        inside = collect_statistics(model, [x], loss=loss)
    assert torch.equal(inside.grams["0"], expected)
    assert inside.output_grams["0"].dtype == torch.float32
    assert (inside.output_grams["0"] != inside.output_grams["0"].bfloat16()).any()
    inference = torch.inference_mode()(lambda model, batch: model(batch))
    gram = collect_statistics(model, [x, x], forward=inference).grams["0"]
    torch.testing.assert_close(gram, 2 * expected)
    assert not gram.is_inference()
    with torch.inference_mode():
        made = collect_statistics(model, [x, x], loss=loss)
    assert not any(tensor.is_inference() for tensor in (*made.grams.values(), *made.output_grams.values()))


def test_complex_gram_gives_the_squared_norm_of_the_outputs():
    linear = nn.Linear(5, 3, bias=False, dtype=torch.complex128)
    x = torch.randn(20, 5, dtype=torch.complex128)
    gram = collect_statistics(linear, [x], dtype=torch.float64).grams[""]
    weight = linear.weight.detach()
    squared = torch.trace(weight @ gram @ weight.mH)
    torch.testing.assert_close(squared.real, (x @ weight.T).abs().square().sum(), **F64)
    assert squared.imag.abs() < 1e-12
    assert collect_statistics(linear, []).grams[""].dtype == torch.complex64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_name_the_layer(value):
    model = Attention()
    with torch.no_grad():
        model.v.bias[0] = value
    with pytest.raises(ValueError, match=r"layer 'o': NaN or infinite inputs, or too large to square in torch.float32"):
        collect_statistics(model, [X[0]])
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"dtype": torch.bfloat16}, r"dtype=torch.bfloat16 is too narrow for sums; use torch.float32"),
        ({"mask": "automatic"}, r"mask='automatic' is unknown; use 'auto', None or a callable"),
        ({"output": "half"}, r"output='half' is unknown; use 'full', 'diagonal' or 'auto'"),
        ({"tied": "both"}, r"tied='both' is unknown"),
    ],
)
def test_bad_arguments(bad, match):
    with pytest.raises(ValueError, match=match):
        collect_statistics(Attention(), X, **bad)


# Masks ---------------------------------------------------------------------------------------------------------------


def test_padding_of_a_transformer_is_left_out():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertModel(config).double()

    def padded(length):
        ids, kept = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.long)
        for row, sentence in enumerate(([5, 6, 7], [8, 9, 10, 11, 12])):
            ids[row, : len(sentence)], kept[row, : len(sentence)] = torch.tensor(sentence), 1
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": kept})

    short, long = (collect_statistics(model, [padded(length)], dtype=torch.float64) for length in (5, 9))
    assert short.tokens == long.tokens
    assert short.tokens["encoder.layer.0.attention.self.query"] == 8
    assert short.tokens["pooler.dense"] == 2  # one vector for each sentence: the mask does not concern it
    for name, gram in short.grams.items():
        torch.testing.assert_close(gram, long.grams[name], rtol=1e-9, atol=1e-9)
    q, k, v = (short.grams[f"encoder.layer.1.attention.self.{part}"] for part in ("query", "key", "value"))
    assert q is k is v
    assert len({id(gram) for gram in short.grams.values()}) == 2 * 4 + 1
    everything = collect_statistics(model, [padded(9)], mask=None)
    assert everything.tokens["encoder.layer.0.attention.self.query"] == 18


def test_masks_of_the_caller():
    model, x = Attention(), X[0]
    keep = torch.tensor([[True, False, True], [True, True, False]])
    rows = x[keep]
    batch = {"x": x, "attention_mask": keep.float()}
    assert set(collect_statistics(model, [batch]).tokens.values()) == {4}
    statistics = collect_statistics(model, [x], mask=lambda batch: keep)
    torch.testing.assert_close(statistics.grams["q"], rows.T @ rows, **F32)
    assert statistics.tokens["head"] == 4
    for mask in (None, lambda batch: None):
        assert collect_statistics(model, [batch], mask=mask).tokens["q"] == 6
    assert collect_statistics(model, [{"x": x, "attention_mask": keep[:, None]}]).tokens["q"] == 6  # not 2-D
    with pytest.raises(ValueError, match="the mask of a batch is 0 everywhere; leave that batch out"):
        collect_statistics(model, [{"x": x, "attention_mask": torch.zeros(2, 3)}])
    with pytest.raises(ValueError, match="the mask of a batch has other values than 0 and 1"):
        collect_statistics(model, [{"x": x, "attention_mask": -1e9 * keep}])


def test_fast_path_of_torch_does_not_bypass_the_hooks():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    statistics = collect_statistics(
        model, [X[0]], forward=lambda model, x: model(x, src_key_padding_mask=padding), mask=lambda x: ~padding
    )
    names = [*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "linear1", "linear2"]
    assert statistics.tokens == {f"layers.{k}.{name}": 5 for k in (0, 1) for name in names}
    assert torch.backends.mha.get_fastpath_enabled()


# Sharing -------------------------------------------------------------------------------------------------------------


def test_layers_that_see_one_tensor_share_its_gram():
    statistics = collect_statistics(Attention(), X)
    grams = statistics.grams
    assert grams["q"] is grams["k"]
    assert grams["q"] is grams["v"]
    assert len({id(gram) for gram in grams.values()}) == 3
    assert statistics.nbytes == 3 * 8 * 8 * 4


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_sharing_that_differs_between_batches(order):
    model = Attention()
    batches = [[(X[0],), (X[1], X[2]), (X[2],)][k] for k in order]
    seen = recorded(model, lambda m: [m(*batch) for batch in batches], [model.q, model.k, model.v])
    grams = collect_statistics(model, batches, dtype=torch.float64).grams
    for name, module in {"q": model.q, "k": model.k, "v": model.v}.items():
        torch.testing.assert_close(grams[name], seen[module].T @ seen[module], **F64)
    assert grams["q"] is grams["v"]
    assert grams["q"] is not grams["k"]


def test_a_tensor_that_is_written_into_is_another_input():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.mul_(3))

    x = torch.randn(5, 4)
    grams = collect_statistics(Writing(), [x, x]).grams
    torch.testing.assert_close(grams["a"], 2 * x.T @ x, **F32)
    torch.testing.assert_close(grams["b"], 18 * x.T @ x, **F32)
    assert grams["a"] is not grams["b"]


def test_layers_that_share_at_some_calls_only():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, z):
            return self.a(x) + self.a(z) + self.b(x) + self.b(z) + self.a(z) + self.a(x)

    model, x, z = Crossed(), torch.randn(5, 4), torch.randn(5, 4)
    gram = x.T @ x + z.T @ z
    statistics = collect_statistics(model, [(x, z), (x, z)])
    torch.testing.assert_close(statistics.grams["a"], 4 * gram, **F32)
    torch.testing.assert_close(statistics.grams["b"], 2 * gram, **F32)
    assert statistics.tokens == {"a": 40, "b": 20}


def test_few_products_wait_for_other_layers():
    sums, many = Sums(torch.float32), [torch.randn(5, 4) for _ in range(6)]
    for x in many:  # all of them alive, as in a recurrent layer
        sums.add("q", x, None)
        assert len(sums.waiting) <= 1
    for _ in range(2):
        for name in ("q", "k", "v"):
            sums.add(name, many[0], None)
        sums.settle()
        assert sums.totals.keys() == {frozenset("q"), frozenset("qkv")}  # not {k, v}: what q saw waited for them
    sums.add("k", many[1], None)
    sums.add("q", many[1], None)
    sums.add("v", many[1], None)
    assert sums.waiting == []  # complete: nothing else can come
    assert sums.tokens == {frozenset("q"): 30, frozenset("qkv"): 15}


# The statistics themselves -------------------------------------------------------------------------------------------


def squares(y, batch):
    return y.square().sum()


def test_merge_is_collecting_over_all_batches():
    model = Attention()
    options = {"dtype": torch.float64, "loss": squares}
    whole = collect_statistics(model, X, **options)
    parts = [collect_statistics(model, [x], **options) for x in X]
    before = copy.deepcopy(parts[0])
    merged = parts[0].merge(*parts[1:])
    assert merged.tokens == whole.tokens
    for name, gram in whole.grams.items():
        torch.testing.assert_close(merged.grams[name], gram, **F64)
        torch.testing.assert_close(merged.output_grams[name], whole.output_grams[name], rtol=1e-10, atol=1e-10)
    assert merged.grams["q"] is merged.grams["v"]
    assert merged.nbytes == whole.nbytes
    assert same_bits(parts[0], before)
    # Shared in one part only: the sums are apart.
    mixed = parts[0].merge(collect_statistics(model, [(X[0], X[1])], **options))
    assert mixed.grams["q"] is mixed.grams["v"]
    assert mixed.grams["q"] is not mixed.grams["k"]


def test_merge_refuses_other_layers():
    one = Statistics({"a": torch.eye(2)}, {"a": 1})
    with pytest.raises(ValueError, match=r"layer 'a': grams of \(2, 2\) torch.float32, but another has \(3, 3\)"):
        one.merge(Statistics({"a": torch.eye(3)}, {"a": 1}))
    with pytest.raises(ValueError, match=r"layer 'b': only one part has its grams"):
        one.merge(Statistics({"a": torch.eye(2), "b": torch.eye(2)}, {"a": 1, "b": 1}))
    with pytest.raises(ValueError, match=r"layer 'a': only one part has its cross_grams"):
        one.merge(Statistics({"a": torch.eye(2)}, {"a": 1}, cross_grams={"a": torch.eye(2)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_holds_every_bit_and_what_is_shared(tmp_path, dtype):
    statistics = collect_statistics(Attention(), X, dtype=dtype, loss=squares, output="diagonal")
    path = tmp_path / "calibration.safetensors"
    path.write_text("what was there")
    statistics.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size < statistics.nbytes + 4000
    loaded = Statistics.load(path)
    assert same_bits(loaded, statistics)
    assert list(loaded.grams) == list(statistics.grams)
    assert loaded.grams["q"] is loaded.grams["k"]
    assert loaded.nbytes == statistics.nbytes
    loaded.merge(statistics).save(path)
    assert Statistics.load(path).tokens["q"] == 36


def test_a_file_of_complex_and_of_shifted_statistics(tmp_path):
    linear, x = nn.Linear(5, 3, dtype=torch.complex64), torch.randn(20, 5, dtype=torch.complex64)
    for statistics in (collect_statistics(linear, [x]), collect_shifted(linear, [x], {}, [""])):
        statistics.save(tmp_path / "one")
        assert same_bits(Statistics.load(tmp_path / "one"), statistics)
    Statistics({}, {}).save(tmp_path / "one")
    assert Statistics.load(tmp_path / "one").grams == {}


def test_a_file_that_is_not_ours(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"other.safetensors: not a file of Statistics.save, or damaged"):
        Statistics.load(path)
    save_file({"a": torch.eye(2)}, path)
    with pytest.raises(ValueError, match="metadata lacks 'structlin_statistics'"):
        Statistics.load(path)
    record = {"version": 3, "tokens": {}, "grams": {}, "output_grams": {}, "cross_grams": {}, "complex": []}
    save_file({"0": torch.eye(2)}, path, {"structlin_statistics": json.dumps(record)})
    with pytest.raises(ValueError, match="version 3; this structlin reads versions 1 and 2"):
        Statistics.load(path)
    for change in ({"grams": {"a": "9"}}, {"grams": {"a": "0"}}, {"cross_grams": None}, {"tokens": 3}):
        save_file({"0": torch.eye(2)}, path, {"structlin_statistics": json.dumps(record | {"version": 1} | change)})
        with pytest.raises(ValueError, match=r"not a file of Statistics.save"):
            Statistics.load(path)
    collect_statistics(Attention(), X).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"not a file of Statistics.save"):
        Statistics.load(path)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "missing")


def test_a_file_of_version_1_has_no_checksum_and_is_read(tmp_path):
    record = {"version": 1, "tokens": {"a": 3}, "grams": {"a": "0"}, "output_grams": {}, "crosses": {}, "complex": []}
    save_file({"0": torch.eye(2)}, tmp_path / "old", {"structlin_statistics": json.dumps(record)})
    assert torch.equal(Statistics.load(tmp_path / "old").grams["a"], torch.eye(2))
    save_file({"0": torch.eye(2) * math.nan}, tmp_path / "old", {"structlin_statistics": json.dumps(record)})
    with pytest.raises(ValueError, match="layer 'a': grams holds NaN or infinite values"):
        Statistics.load(tmp_path / "old")
    save_file({"0": torch.eye(2)}, tmp_path / "old", {"structlin_statistics": json.dumps(record | {"version": 2})})
    with pytest.raises(ValueError, match="its content has another sha256 than it had when it was written"):
        Statistics.load(tmp_path / "old")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "calibration"
    statistics = collect_statistics(Attention(), X)
    statistics.save(path)
    content = path.read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        statistics.merge(statistics).save(path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["calibration"]


def _rank(rank, port, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Attention()
    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # The ranks differ in what is shared: query, key and value on one, query and value on the other.
    batch = (X[0],) if rank == 0 else (X[1], X[2])
    own = collect_statistics(model, [batch], dtype=torch.float64)
    own.all_reduce().save(f"{folder}/{rank}")
    other = Statistics({"a": torch.eye(2 + rank)}, {"a": 1})
    with pytest.raises(ValueError, match=r"layer 'a': grams of \(2, 2\) torch.float32, but rank 1 has \(3, 3\)"):
        other.all_reduce()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo by TCP is tried on POSIX only")
def test_all_reduce_sums_the_ranks(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    first, second = (Statistics.load(tmp_path / str(rank)) for rank in (0, 1))
    assert same_bits(first, second)
    torch.manual_seed(0)
    whole = collect_statistics(Attention(), [(X[0],), (X[1], X[2])], dtype=torch.float64)
    assert first.tokens == whole.tokens
    for name, gram in whole.grams.items():
        torch.testing.assert_close(first.grams[name], gram, **F64)
    assert first.grams["q"] is first.grams["v"]
    assert first.grams["q"] is not first.grams["k"]


def test_parts_without_inputs_leave_shared_sums_shared():
    model = Attention()
    part = collect_statistics(model, [(X[0],)])
    zeros = {name: torch.zeros_like(gram) for name, gram in part.grams.items()}
    empty = Statistics(zeros, dict.fromkeys(zeros, 0))
    for merged in (part.merge(empty), empty.merge(part)):
        assert merged.grams["q"] is merged.grams["k"]
        assert merged.grams["q"] is not merged.grams["o"]
        assert torch.equal(merged.grams["q"], part.grams["q"])
    assert empty.merge(empty).grams["q"] is not empty.merge(empty).grams["k"]


def test_all_reduce_needs_a_process_group():
    with pytest.raises(RuntimeError, match=r"there is no process group; call torch.distributed.init_process_group"):
        Statistics({}, {}).all_reduce()


# Layer by layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_bytes", "passes"), [(1, 5), (2 * 8 * 8 * 8, 3), (10**6, 1)])
def test_layer_by_layer_is_one_pass(max_bytes, passes):
    model = Attention()
    whole = collect_statistics(model, X, dtype=torch.float64)
    parts = list(statistics_by_layer(model, X, max_bytes=max_bytes, dtype=torch.float64))
    assert len(parts) == passes
    assert [name for part in parts for name in part.grams] == list(whole.grams)
    assert all(part.nbytes <= max(max_bytes, 8 * 8 * 8) for part in parts)
    for part in parts:
        for name, gram in part.grams.items():
            assert torch.equal(gram, whole.grams[name])
            assert part.tokens[name] == whole.tokens[name]


def test_layer_by_layer_counts_output_grams():
    model = Attention()
    by_output = {
        output: len(list(statistics_by_layer(model, X, max_bytes=2 * 8 * 8 * 4, loss=squares, output=output)))
        for output in ("full", "diagonal")
    }
    assert by_output == {"full": 5, "diagonal": 5}
    assert len(list(statistics_by_layer(model, X, max_bytes=2 * 8 * 9 * 4, loss=squares, output="diagonal"))) == 3


def test_several_passes_need_batches_that_start_again():
    model = Attention()
    with pytest.raises(ValueError, match=r"max_bytes=1 needs 5 passes, and batches is an iterator"):
        statistics_by_layer(model, iter(X), max_bytes=1)
    assert len(list(statistics_by_layer(model, iter(X), max_bytes=10**6))) == 1


# The model is as it was ----------------------------------------------------------------------------------------------


def test_the_model_runs_in_evaluation_mode_and_gets_its_flags_back():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU())
    model[3].eval()
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    first, second = (collect_statistics(model, [X[0].reshape(6, 8)]) for _ in range(2))
    assert same_bits(first, second)
    assert [module.training for module in model.modules()] == flags
    assert hooks_of(model) == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_error_leaves_no_hooks():
    model = Failing().train()
    model.last.eval()
    batches = [torch.randn(3, 4)] * 2
    for collect in (
        lambda: collect_statistics(model, batches),
        lambda: collect_statistics(model, batches, loss=squares),
        lambda: collect_shifted(model, batches, {model.linear: nn.Linear(4, 4)}, ["last"]),
    ):
        linear, model.calls = model.linear, 0
        with pytest.raises(RuntimeError, match="the forward failed"):
            collect()
        assert hooks_of(model) == 0
        assert model.training
        assert not model.last.training
        assert model.linear is linear
        assert torch.is_grad_enabled()
        assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_of_the_caller_come_first_and_stay():
    linear, x = nn.Linear(4, 4), torch.randn(5, 4)
    linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    torch.testing.assert_close(collect_statistics(linear, [x]).grams[""], 4 * x.T @ x, **F32)
    assert hooks_of(linear) == 1
    # A hook that changes the output comes after the output that counts.
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, y: 3 * y)
    found = collect_statistics(linear, [x], loss=lambda y, batch: y.sum())
    torch.testing.assert_close(found.output_grams[""], torch.full((4, 4), 9.0 * 5), **F32)


# Output gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_output_grams_are_those_of_the_gradients(frozen):
    model = Attention().double().requires_grad_(not frozen)
    x = [tensor.double() for tensor in X]
    statistics = collect_statistics(model, x, loss=squares, dtype=torch.float64)
    diagonal = collect_statistics(model, x, loss=squares, output="diagonal", dtype=torch.float64)
    expected = dict.fromkeys(statistics.grams, 0)
    for batch in x:
        with torch.no_grad():  # the chain rule by hand
            q, gate, v = model.q(batch), model.k(batch).sigmoid(), model.v(batch)
            o = model.o(q * gate + v)
            head = 2 * model.head(o.relu())
            by_o = (head @ model.head.weight) * (o > 0)
            by_v = by_o @ model.o.weight
            gradients = {"q": by_v * gate, "k": by_v * q * gate * (1 - gate), "v": by_v, "o": by_o, "head": head}
        for name, rows in gradients.items():
            flat = rows.reshape(-1, rows.shape[-1])
            expected[name] = expected[name] + flat.T @ flat
    for name, gram in expected.items():
        torch.testing.assert_close(statistics.output_grams[name], gram, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(diagonal.output_grams[name], gram.diagonal(), rtol=1e-10, atol=1e-12)
        assert torch.equal(statistics.grams[name], diagonal.grams[name])
    assert statistics.grams["q"] is statistics.grams["v"]


def test_output_grams_leave_masked_tokens_out():
    model, keep = Attention(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": X[0], "attention_mask": keep}
    statistics = collect_statistics(model, [batch], loss=lambda y, batch: y.square().sum())
    y = model(X[0]).detach()[keep.bool()]
    torch.testing.assert_close(statistics.output_grams["head"], 4 * y.T @ y, **F32)


def test_complex_output_grams():
    linear = nn.Linear(5, 3, dtype=torch.complex128)
    x = torch.randn(6, 5, dtype=torch.complex128)
    found = collect_statistics(linear, [x], loss=lambda y, b: y.abs().square().sum(), dtype=torch.float64)
    y = linear(x).detach()
    torch.testing.assert_close(found.output_grams[""], 4 * y.T @ y.conj(), **F64)
    diagonal = collect_statistics(
        linear, [x], loss=lambda y, b: y.abs().square().sum(), dtype=torch.float64, output="diagonal"
    ).output_grams[""]
    torch.testing.assert_close(diagonal, found.output_grams[""].diagonal().real, **F64)


def test_gradients_of_parameters_stay():
    model = Attention()
    model.q.weight.grad = torch.ones(8, 8)
    model.k.requires_grad_(False)
    collect_statistics(model, X, loss=squares)
    assert torch.equal(model.q.weight.grad, torch.ones(8, 8))
    assert all(p.grad is None for p in model.parameters() if p is not model.q.weight)
    assert [p.requires_grad for p in model.k.parameters()] == [False, False]
    assert model.v.weight.requires_grad


@pytest.mark.parametrize("loss", [lambda y, b: y, lambda y, b: 1.0, lambda y, b: y.detach().sum()])
def test_a_loss_that_has_no_gradient(loss):
    with pytest.raises(ValueError, match="loss must return a real scalar tensor"):
        collect_statistics(Attention(), X, loss=loss)


def test_gradients_that_are_not_finite_name_the_layer():
    with pytest.raises(ValueError, match=r"layer 'q': NaN or infinite output gradients"):
        collect_statistics(Attention(), X, loss=lambda y, b: y.sum() * float("inf"))


# Partly compressed models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [lambda m: m, copy.deepcopy])
def test_swaps_that_change_nothing_give_the_plain_gram(twin):
    model = Attention()
    plain = collect_statistics(model, X, dtype=torch.float64)
    children = dict(model.named_children())
    swaps = {model.q: twin(model.q), model.o: twin(model.o)}
    shifted = collect_shifted(model, X, swaps, ["q", "k", "o", "head"], dtype=torch.float64)
    for name, gram in shifted.grams.items():
        torch.testing.assert_close(gram, plain.grams[name], **F64)
        torch.testing.assert_close(shifted.cross_grams[name], gram, **F64)
        assert shifted.tokens[name] == plain.tokens[name]
    assert shifted.grams["q"] is shifted.grams["k"]
    assert shifted.cross_grams["q"] is shifted.cross_grams["k"]
    assert all(getattr(model, name) is child for name, child in children.items())
    assert all(module.training for module in model.modules())
    assert hooks_of(model) == sum(hooks_of(new) for new in swaps.values()) == 0


def test_shifted_inputs_are_those_of_the_compressed_model():
    model = Attention()
    lowrank = LowRankLinear.from_linear(model.v, rank=2)
    names = {"k": "k", "v": "v", "o": "o", "head": "head"}
    before = recorded(model, lambda m: [m(x) for x in X], [getattr(model, name) for name in names])
    shifted = collect_shifted(model, X, {model.v: lowrank}, names, dtype=torch.float64)
    other = copy.deepcopy(model)
    other.v = lowrank
    after = recorded(other, lambda m: [m(x) for x in X], [getattr(other, name) for name in names])
    for name in names:
        x, new = before[getattr(model, name)], after[getattr(other, name)]
        # In eval, as here, the layer may contract in another order than in training: equal to float32.
        torch.testing.assert_close(shifted.grams[name], new.T @ new, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shifted.cross_grams[name], x.T @ new, rtol=1e-5, atol=1e-5)
    assert shifted.grams["k"] is shifted.grams["v"]
    assert not torch.allclose(shifted.grams["o"], shifted.cross_grams["o"])
    assert type(model.v) is nn.Linear


def test_shifted_complex_cross_solves_the_least_squares():
    dtype = torch.complex128
    model = nn.Sequential(nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 3, bias=False, dtype=dtype))
    new = nn.Linear(4, 4, dtype=dtype)
    x = torch.randn(40, 4, dtype=torch.complex128)
    shifted = collect_shifted(model, [x], {model[0]: new}, ["1"], dtype=torch.float64)
    with torch.no_grad():
        expected = torch.linalg.lstsq(new(x), model(x)).solution.T
        found = model[1].weight @ shifted.cross_grams["1"] @ torch.linalg.inv(shifted.grams["1"])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_shifted_passes_stop_early_where_each_layer_is_called_once():
    model, runs = Attention(), []
    model.head.register_forward_hook(lambda *args: runs.append(1))
    collect_shifted(model, X, {}, ["q", "o"])
    assert len(runs) == 2  # both passes of the first batch
    shared, x = Shared(), torch.randn(5, 6)
    seen = recorded(shared, lambda m: [m(x), m(x)], [shared.left, shared.again])
    shifted = collect_shifted(shared, [x, x], {}, ["left", "again"], dtype=torch.float64)
    torch.testing.assert_close(shifted.grams["again"], seen[shared.again].T @ seen[shared.again], **F64)
    torch.testing.assert_close(shifted.cross_grams["left"], 2 * seen[shared.left].T @ seen[shared.left], **F64)
    assert shifted.tokens == {"left": 20, "again": 20}


def test_shifted_inputs_leave_masked_tokens_out_and_hold_no_later_writes():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, attention_mask=None):
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.mul_(3))

    x, keep = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    for mask, rows in ((None, x.reshape(-1, 4)), (keep, x[keep.bool()])):
        shifted = collect_shifted(Writing(), [{"x": x, "attention_mask": mask}] * 2, {}, ["a", "b"])
        torch.testing.assert_close(shifted.cross_grams["a"], 2 * rows.T @ rows, **F32)
        torch.testing.assert_close(shifted.cross_grams["b"], 18 * rows.T @ rows, **F32)
        assert shifted.grams["a"] is not shifted.grams["b"]


def test_a_root_that_is_swapped():
    linear, x = nn.Linear(4, 4), torch.randn(5, 4)
    shifted = collect_shifted(linear, [x], {linear: nn.Linear(4, 4)}, [""])
    torch.testing.assert_close(shifted.cross_grams[""], x.T @ x, **F32)


def test_bad_swaps():
    model = Attention()
    with pytest.raises(ValueError, match="swaps has a Linear that is not"):
        collect_shifted(model, X, {nn.Linear(8, 8): model.q}, ["q"])

    class Twice(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(self.linear(x))

    with pytest.raises(ValueError, match=r"layer 'k': called 1 times without and 3 times with the swaps; leave it out"):
        collect_shifted(model, X, {model.q: Twice(model.k)}, ["k"])
    shorter = nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 8))
    stack = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(
        ValueError, match=r"layer '1': inputs of shapes \(\(6, 8\), \(3, 8\)\) without and with the swaps"
    ):
        collect_shifted(stack, [X[0]], {stack[0]: _Half(shorter)}, ["1"])
    assert isinstance(stack[0], nn.Linear)


class _Half(nn.Module):
    """Drops every other row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[::2]


# Which layers share inputs --------------------------------------------------------------------------------------------


class TwoOfOneInput(nn.Module):
    """Two layers with one input, and one with another, which may be called from the second batch on only."""

    def __init__(self, late):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(3, 2)
        self.late, self.calls = late, 0

    def forward(self, x):
        self.calls += 1
        y = self.a(x), self.b(x)
        return self.c(y[0]) if self.calls > 1 or not self.late else y[1]


@pytest.mark.parametrize("late", [False, True])
def test_sharing_is_found_without_grams_and_from_one_batch_where_that_calls_all(late):
    model, batches = TwoOfOneInput(late), [torch.randn(6, 4) for _ in range(3)]
    targets = find_targets(model)
    passes = [Pass(partial(model, x), partial(model, x), None) for x in batches]
    found = collect_passes(targets, passes, Collecting(), {"a", "b", "c"})
    assert model.calls == (2 if late else 1)
    assert found.grams["a"] is found.grams["b"]
    assert found.grams["a"] is not found.grams["c"]
    assert found.grams["c"].shape == (3, 3)
    assert all(gram.count_nonzero() == 0 for gram in found.grams.values())
    assert all(found.tokens.values())
    assert collect_passes(targets, passes, Collecting()).grams["a"].count_nonzero() > 0


def test_a_sum_that_one_of_two_layers_wants_is_kept():
    model, x = TwoOfOneInput(False), torch.randn(6, 4)
    targets = find_targets(model)[:2]
    sums = Sums(torch.float32, blank={"a"})
    for name in ("a", "b"):
        sums.add(name, x, None)
    sums.settle()
    (grams,), tokens = sums.result(targets, 1)
    torch.testing.assert_close(grams["b"], x.mT @ x)
    assert tokens == {"a": 6, "b": 6}

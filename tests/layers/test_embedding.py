"""Rows are looked up from the factors: equal to the dense table's, for every structure, without the dense table."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import ONE, SMALL
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from structlin import LowRankLinear, ShapeshifterLinear, StructuredEmbedding, TTEmbedding
from structlin.layers.linear import build
from structlin.runtime.contract import lookup
from structlin.structures import Kaleidoscope, LowRank, Shapeshifter, TensorTrain
from structlin.testing import assert_close


class Allocated(TorchDispatchMode):
    """Sum the bytes of all storages that operators make, as if none were freed."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in known:
                self.storages[value.untyped_storage()._cdata] = value.untyped_storage()  # kept: no address comes twice
        return result

    @property
    def nbytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize(("member", "in_features", "out_features"), SMALL, ids=str)
def test_rows_and_gradients_are_those_of_the_dense_table(member, in_features, out_features):
    embedding = StructuredEmbedding(build(member, in_features, out_features, False, dtype=torch.float64), 2)
    ids = torch.cat([torch.arange(out_features), torch.tensor([2, 0, out_features - 1, 2])]).repeat(4).reshape(2, -1, 2)
    seed = torch.randn(*ids.shape, in_features, dtype=torch.float64)
    rows, expected = embedding(ids), F.embedding(ids, embedding.linear.to_dense(), padding_idx=2)
    assert_close(rows, expected, "rows", 1e-12)
    names, leaves = zip(*embedding.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected, leaves, seed)
    for name, found, gradient in zip(names, torch.autograd.grad(rows, leaves, seed), wanted, strict=True):
        assert_close(found, gradient, name, 1e-10)


@pytest.mark.parametrize("name", ONE)
def test_many_tokens_go_by_chunks(name, monkeypatch):
    embedding = StructuredEmbedding(build(ONE[name], 16, 20, False, dtype=torch.float64))
    ids, leaves = torch.randint(20, (50,)), list(embedding.parameters())
    whole = embedding(ids)
    gradients = torch.autograd.grad(whole.square().sum(), leaves)
    monkeypatch.setattr(lookup, "entries_per_token", lambda spec: 1 << 17)  # one token of them fills the room
    sizes = []
    contracted = lookup._contracted
    monkeypatch.setattr(
        lookup, "_contracted", lambda s, rows, *f: [sizes.append(len(rows)), contracted(s, rows, *f)][1]
    )
    chunked = embedding(ids)
    with torch.no_grad():
        assert_close(embedding(ids), whole, "without a graph")
    assert_close(chunked, whole, "with a graph")
    assert max(sizes) == 1
    for found, wanted in zip(torch.autograd.grad(chunked.square().sum(), leaves), gradients, strict=True):
        assert_close(found, wanted, "gradient")


def test_eight_tokens_of_a_large_vocabulary_hold_less_than_a_mebibyte():
    linear = LowRankLinear(2048, 128_000, bias=False, rank=256, device="meta").to_empty(device="cpu")
    for factor in linear.parameters():
        factor.data.fill_(0.5)
    with Allocated() as allocated:
        rows = StructuredEmbedding(linear)(torch.randint(128_000, (8,)))
    assert torch.equal(rows, torch.full((8, 2048), 64.0))
    assert rows.nbytes <= allocated.nbytes <= 1 << 20


def test_intermediates_of_many_tokens_are_no_larger_than_twice_the_rows():
    """Here a token reads rank * in_features entries."""
    linear = ShapeshifterLinear(64, 4096, bias=False, rank=32, order="reshape")
    assert lookup.entries_per_token(linear.spec) >= 32 * 64
    ids, most = torch.arange(4096), []
    contracted = lookup._contracted

    def observed(*args):
        with Allocated() as allocated:
            rows = contracted(*args)
        most.append(allocated.nbytes)
        return rows

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(lookup, "_contracted", observed)
        rows = StructuredEmbedding(linear)(ids)
    assert_close(rows, linear.to_dense(), "rows")
    assert len(most) > 1
    assert max(most) <= 4 * rows.nbytes  # all steps of a chunk together


@pytest.mark.parametrize("name", ONE)
def test_ids_of_any_shape(name):
    embedding = StructuredEmbedding(build(ONE[name], 16, 20))
    dense = embedding.linear.to_dense()
    strided = torch.arange(20).reshape(4, 5).T
    for ids in (torch.tensor(7), torch.arange(20, dtype=torch.int32), strided, torch.tensor([3]).expand(6)):
        assert_close(embedding(ids), dense[ids], f"ids of shape {tuple(ids.shape)}")
    for shape in ((0,), (2, 0, 3)):
        rows = embedding(torch.empty(shape, dtype=torch.int64))
        assert rows.shape == (*shape, 16)
        rows.sum().backward()
        assert all(torch.count_nonzero(p.grad) == 0 for p in embedding.linear.factors if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("name", ONE)
def test_dtypes(name, dtype):
    embedding = StructuredEmbedding(build(ONE[name], 16, 20, False, dtype=dtype))
    ids = torch.arange(20)
    rows = embedding(ids)
    assert rows.dtype == dtype
    assert_close(rows, embedding.linear.to_dense(), "rows")
    rows.abs().sum().backward()
    assert all(p.grad.dtype == dtype for p in embedding.parameters())


def test_autocast_changes_nothing():
    embedding = StructuredEmbedding(LowRankLinear(16, 20, rank=3))
    ids = torch.arange(20)
    with torch.autocast("cpu", torch.bfloat16):
        rows = embedding(ids)
    assert torch.equal(rows, embedding(ids))


@pytest.mark.parametrize("name", ["shapeshifter", "kmatrix"])
def test_many_tokens_under_transforms(name):
    torch.manual_seed(0)
    structures = {"shapeshifter": Shapeshifter(rank=32, order="reshape"), "kmatrix": Kaleidoscope()}
    embedding = StructuredEmbedding.from_structure(3000, 64, structure=structures[name], dtype=torch.float64)
    ids = torch.randint(3000, (3000,))  # some chunks, outside of transforms
    values = {key: value.detach() for key, value in embedding.named_parameters()}
    found = torch.func.grad(lambda v: torch.func.functional_call(embedding, v, (ids,)).square().sum())(values)
    embedding(ids).square().sum().backward()
    for key, value in embedding.named_parameters():
        assert_close(found[key], value.grad, key)
    with torch.no_grad():
        assert_close(torch.func.vmap(embedding)(ids.view(2, -1)), embedding(ids.view(2, -1)), "vmap")


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_takes_any_number_of_tokens(strict):
    tokens = torch.export.Dim("tokens", min=1, max=1 << 20)
    for embedding in (TTEmbedding(300, 64, rank=4), StructuredEmbedding(build(Kaleidoscope(), 64, 300, False))):
        ids = torch.randint(300, (128,))
        program = torch.export.export(embedding, (ids,), dynamic_shapes=({0: tokens},), strict=strict).module()
        for count in (1, 7, 5000):
            ids = torch.randint(300, (count,))
            assert_close(program(ids), embedding(ids), f"exported, {count} tokens")


def test_meta():
    embedding = StructuredEmbedding(LowRankLinear(16, 20, rank=3, device="meta"))
    assert embedding(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 16)


@pytest.mark.parametrize("name", ONE)
def test_compiles_in_one_graph(name):
    embedding = StructuredEmbedding(build(ONE[name], 16, 20), 1)
    torch.compiler.reset()
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    ids = torch.arange(20)
    assert_close(compiled(ids), embedding(ids), "compiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [True, False])
def test_scale_multiplies_the_rows(dtype, dense):
    linear, scale = LowRankLinear(16, 20, rank=3, dtype=dtype), 2048**0.5
    linear = linear.to_linear() if dense else linear
    ids, rows = torch.arange(20), StructuredEmbedding(linear)(torch.arange(20))
    embedding, rounded = (StructuredEmbedding(linear, scale=scale, round_scale=flag) for flag in (False, True))
    assert torch.equal(embedding(ids), rows * scale)
    assert torch.equal(rounded(ids), rows * torch.tensor(scale).to(dtype))
    assert torch.equal(embedding(ids), rounded(ids)) == (dtype == torch.float32)
    assert "scale=45.2548" in repr(embedding)
    for other in (copy.deepcopy(rounded), pickle.loads(pickle.dumps(rounded))):
        assert torch.equal(other(ids), rounded(ids))
    assert embedding.state_dict().keys() == StructuredEmbedding(linear).state_dict().keys()


def test_a_dense_table_is_looked_up_as_by_nn_embedding():
    linear = torch.nn.Linear(16, 20, bias=False)
    rows = StructuredEmbedding(linear, -1)(torch.arange(20))
    assert torch.equal(rows, linear.weight)
    rows.sum().backward()
    assert torch.equal(linear.weight.grad.sum(1), torch.tensor([16.0] * 19 + [0.0]))


def test_negative_padding_counts_from_the_end():
    linear = LowRankLinear(16, 20, rank=3)
    assert StructuredEmbedding(linear, -1).padding_idx == 19
    for wrong in (20, -21):
        with pytest.raises(ValueError, match=rf"padding_idx={wrong} is no row of the table; use -20 to 19, or None"):
            StructuredEmbedding(linear, wrong)


@pytest.mark.parametrize("name", ONE)
def test_ids_outside_the_table_are_refused(name):
    embedding = StructuredEmbedding(build(ONE[name], 7, 19))  # 19 is prime: most structures pad it
    for wrong in (-1, 19, 20, 10_000):
        with pytest.raises(IndexError, match="an id lies outside 0 to 18, the rows of the table"):
            embedding(torch.tensor([0, wrong]))


def test_ids_of_other_dtypes_are_refused():
    embedding = StructuredEmbedding(LowRankLinear(16, 20, rank=3))
    for ids in (torch.zeros(3), torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(TypeError, match=r"ids are torch\.\w+; look rows up by"):
            embedding(ids)


# From scratch, and from a table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE)
def test_a_drawn_table_has_the_entries_of_nn_embedding(name):
    torch.manual_seed(0)
    found = StructuredEmbedding.from_structure(20, 12, 3, structure=ONE[name])
    assert found.padding_idx == 3
    assert found.embedding_dim == 12
    table = found.linear.to_dense()
    assert 0.7 < table.std() < 1.4
    half = StructuredEmbedding.from_structure(20, 12, structure=found.linear.structure, std=0.02).linear.to_dense()
    assert 0.014 < half.std() < 0.028


def test_a_tt_embedding_of_a_vocabulary():
    layer = TTEmbedding(30522, 384, 0, rank=16)
    assert layer.linear.num_parameters < 0.01 * 30522 * 384
    assert 0.5 < layer(torch.randint(1, 30522, (200,))).std() < 2
    modes = TTEmbedding(24, 12, rank=2, row_modes=(4, 6), column_modes=(3, 4))
    assert modes.linear.structure == TensorTrain((2,), (3, 4), (4, 6), 2)
    assert_close(modes(torch.arange(24)), modes.linear.to_dense(), "rows")


def test_a_table_is_decomposed():
    torch.manual_seed(0)
    dense = nn.Embedding(40, 16, padding_idx=2, dtype=torch.float64).eval().requires_grad_(False)
    exact = StructuredEmbedding.from_embedding(dense, structure=LowRank(rank=16))
    assert_close(exact(torch.arange(40)), dense.weight, "rows")
    assert exact.padding_idx == 2
    assert not exact.training
    assert not any(parameter.requires_grad for parameter in exact.parameters())
    weights = torch.ones(40, dtype=torch.float64)
    weights[:5] = 1000
    errors = []
    for row_weights in (None, weights):
        found = StructuredEmbedding.from_embedding(dense, structure=LowRank, ratio=0.5, row_weights=row_weights)
        errors.append((found(torch.arange(5)) - dense.weight[:5]).norm())
    assert errors[1] < 0.2 * errors[0]
    with pytest.raises(TypeError, match=r"from_embedding takes an nn\.Embedding, not Linear"):
        StructuredEmbedding.from_embedding(nn.Linear(3, 3), structure=LowRank, ratio=0.5)
    with pytest.raises(ValueError, match="has max_norm"):
        StructuredEmbedding.from_embedding(nn.Embedding(9, 9, max_norm=1.0), structure=LowRank, ratio=0.5)

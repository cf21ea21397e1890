"""Loading: skeletons on the meta device, another dtype, and files that are links."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import structlin
from structlin import LowRankLinear
from structlin.structures import PHM, LowRank, Structure, StructuredLinear

LAYERS = {"structured": lambda: LowRankLinear(8, 8, rank=2), "dense": lambda: nn.Linear(8, 8)}


class Model(nn.Module):
    """Attention with a table of positions, an integer buffer, a complex layer and a tied head."""

    def __init__(self, linear: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.body = nn.Sequential(LAYERS[linear](), nn.BatchNorm1d(8))
        self.phase = nn.Linear(2, 2, dtype=torch.complex64)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("frequencies", torch.arange(1.0, 5), persistent=False)
        self.register_buffer("steps", torch.arange(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(x))) * self.frequencies.sum()


@pytest.fixture
def original() -> Model:
    torch.manual_seed(0)
    return Model("structured").eval()


@pytest.fixture
def saved(original: Model, tmp_path: Path) -> Path:
    return structlin.save(original, tmp_path / "out")


# The meta device -----------------------------------------------------------------------------------------------------


def test_meta_skeleton_runs_once_its_transient_buffers_have_values(original: Model, saved: Path) -> None:
    with torch.device("meta"):
        target = Model("dense").eval()
    target.frequencies, target.steps = torch.arange(1.0, 5), torch.arange(3)
    found = structlin.load(target, saved)
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))
    assert found.head.weight is found.embedding.weight
    x = torch.tensor([3, 1])
    assert torch.equal(found(x), original(x))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_buffers_that_would_stay_on_meta_are_refused(device: str | None, saved: Path) -> None:
    with torch.device("meta"):
        target = nn.ModuleDict({"inner": Model("dense")})["inner"]
    target.steps = torch.arange(3)
    before = list(target.modules())
    message = (
        r"buffers \['frequencies'\] \(1 in all\) are on the meta device, and not in the checkpoint.*; compute them"
    )
    with pytest.raises(structlin.CheckpointError, match=message):
        structlin.load(target, saved, device=device)
    assert all(a is b for a, b in zip(target.modules(), before, strict=True))
    assert all(parameter.is_meta for parameter in target.parameters())


def test_buffers_may_stay_on_meta_where_everything_goes_there(saved: Path) -> None:
    with torch.device("meta"):
        target = Model("dense")
    found = structlin.load(target, saved, device="meta")
    assert all(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))


# Another dtype -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", LAYERS)  # a new layer, and one that the skeleton holds already
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_that_of_all_floating_tensors(
    linear: str, dtype: torch.dtype, original: Model, saved: Path, recwarn
) -> None:
    found = structlin.load(Model(linear).eval(), saved, dtype=dtype)
    tensors = dict([*found.named_parameters(), *found.named_buffers()])
    for name, expected in [*original.named_parameters(), *original.named_buffers()]:
        assert tensors[name].dtype == (dtype if expected.is_floating_point() else expected.dtype), name
        assert torch.equal(tensors[name], expected.to(tensors[name].dtype)), name
    assert found.head.weight is found.embedding.weight
    assert found.phase.weight.dtype == torch.complex64
    assert found(torch.tensor([3, 1])).dtype == dtype


def test_dtype_of_the_file_without_one(saved: Path) -> None:
    found = structlin.load(Model("dense").double(), saved)
    assert {parameter.dtype for parameter in found.body.parameters()} == {torch.float32}
    assert found.frequencies.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype, saved: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype={dtype} is not a floating dtype; use one such as torch.bfloat16"):
        structlin.load(Model("dense"), saved, dtype=dtype)


def test_dtype_does_not_hide_a_wrong_one_in_the_file(saved: Path) -> None:
    target = Model("dense")
    target.body[1].num_batches_tracked = torch.tensor(0.0)
    with pytest.raises(structlin.CheckpointError, match=r"'body\.1\.num_batches_tracked' in .* is torch\.int64"):
        structlin.load(target, saved, dtype=torch.float32)


# Ties ----------------------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """A table whose weight is the output layer's too, as in BERT (with a bias) and GPT-2 (without)."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 16)
        self.out = nn.Linear(16, 48, bias=bias)
        self.out.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(tokens))


TIED = ("lowrank", "kronecker", "tt", "monarch", "butterfly", "phm", "tucker", "lowrank+blast", PHM(algebra="hamilton"))


@pytest.mark.parametrize("structure", TIED, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_table_stays_tied(bias: bool, structure: str | PHM, tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = Language(bias)
    options = {"ratio": 0.6} if isinstance(structure, str) else {}
    report = structlin.compress_model(original, structure, tied="replace", refine=0, **options)
    assert report.layers[0].structure
    found = structlin.load(Language(bias), structlin.save(original, tmp_path / "out"))
    tokens = torch.arange(48)
    assert torch.equal(found(tokens), original(tokens))
    assert isinstance(found.out, StructuredLinear)
    assert {id(p) for p in found.table.parameters()} <= {id(p) for p in found.out.parameters()}
    assert count(found) == count(original) < 48 * 16 + 48 * bias
    assert count(structlin.to_dense_(found)) == 48 * 16 + 48 * bias


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("structure", [PHM(algebra="hamilton"), LowRank(rank=2)], ids=str)
@pytest.mark.parametrize(
    "change", [nn.Module.double, lambda model: model.to("cpu"), lambda model: model], ids=["double", "move", "none"]
)
def test_ties_outlive_another_dtype(structure: Structure, change: Callable, tmp_path: Path) -> None:
    original = Pair()
    structlin.compress_model(original, structure, tied="replace", skip_last=False)
    path = structlin.save(change(original), tmp_path / "out")
    for model in (original, change(structlin.load(Pair(), path))):
        structlin.to_dense_(model)
        assert model.first.weight is model.second.weight
        assert count(model) == 64 + 16


@pytest.mark.parametrize("factor", ["left", "right"])
def test_layers_that_share_one_factor_of_two_are_two_matrices(factor: str) -> None:
    model = nn.Sequential(LowRankLinear(8, 8, rank=2), LowRankLinear(8, 8, rank=2))
    setattr(model[1], factor, getattr(model[0], factor))
    expected = [layer.to_dense() for layer in model]
    structlin.to_dense_(model)
    assert all(torch.allclose(layer.weight, weight) for layer, weight in zip(model, expected, strict=True))


# Links ---------------------------------------------------------------------------------------------------------------


def cached(saved: Path, root: Path) -> Path:
    """Lay a checkpoint out as the cache of the Hugging Face hub does: snapshots that link to blobs."""
    snapshot = root / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(saved.iterdir())):
        file.rename(root / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def assert_holds(directory: Path, original: Model) -> None:
    found = structlin.load(Model("dense"), directory).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.state_dict().items())


def test_links_of_a_hub_cache_are_followed(original: Model, tmp_path: Path) -> None:
    saved = structlin.save(original, tmp_path / "out", max_shard_bytes=400)
    snapshot = cached(saved, tmp_path / "cache")
    assert len(list(snapshot.glob("*.safetensors"))) > 1
    summary = structlin.verify(snapshot, check_hashes=True)
    assert summary.bytes == sum(file.stat().st_size for file in snapshot.glob("*.safetensors"))
    assert_holds(snapshot, original)


def test_save_replaces_links_and_leaves_what_they_point_to(original: Model, saved: Path, tmp_path: Path) -> None:
    snapshot = cached(saved, tmp_path / "cache")
    blobs = {file: file.read_bytes() for file in (tmp_path / "cache" / "blobs").iterdir()}
    (snapshot / "config.json").symlink_to("../../blobs/config")
    with torch.no_grad():
        original.embedding.weight.zero_()
    structlin.save(original, snapshot)
    assert {file: file.read_bytes() for file in blobs} == blobs
    assert not (snapshot / "model.safetensors").is_symlink()
    assert (snapshot / "config.json").is_symlink()
    assert_holds(snapshot, original)


@pytest.mark.parametrize("name", ["structlin.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("target", "message"),
    [("missing", "missing or unreadable: FileNotFoundError"), ("pipe", "not a regular file"), ("/", "not a regular")],
)
def test_links_to_anything_but_a_file_are_refused(name: str, target: str, message: str, saved: Path) -> None:
    os.mkfifo(saved / "pipe")
    (saved / name).unlink()
    (saved / name).symlink_to(target)
    with pytest.raises(structlin.CheckpointError, match=f"{name}: {message}"):
        structlin.verify(saved)


def test_names_of_the_file_lead_nowhere_else(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    text = (saved / "structlin.json").read_text()
    (saved / "structlin.json").write_text(text.replace('"model.safetensors"', '"../model.safetensors"'))
    with pytest.raises(structlin.CheckpointError, match="expected a plain name"):
        structlin.load(Model("dense"), saved)


def test_an_id_of_the_hub_is_read_from_the_cache(
    original: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--small"
    blobs = structlin.save(original, repository / "blobs")
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    with pytest.raises(structlin.CheckpointError, match=r"me/small: no such directory, nor in the cache .*hf download"):
        structlin.load(Model("dense"), "me/small")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123\n")
    loaded = structlin.load(Model("dense").eval(), "me/small")
    ids = torch.arange(8)
    assert torch.equal(loaded(ids), original(ids))
    assert len(structlin.verify("me/small").layers) == 1
    for wrong in ("../blobs", "..", "def456"):
        (repository / "refs" / "main").write_text(wrong)
        with pytest.raises(structlin.CheckpointError, match=r"is no name of a directory|has no snapshot"):
            structlin.verify("me/small")

"""Saving, loading and verifying: round trips, what is refused and why, damaged files, crashes."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import structlin
from structlin import (
    ButterflyLinear,
    KMatrix,
    KroneckerLinear,
    LowRankLinear,
    PHMLinear,
    ShapeshifterLinear,
    StructuredLinear,
    TTLinear,
)
from structlin.checkpoint import (
    CheckpointError,
    _directory,
    _lock,
    _manifest,
    _replace,
    _skeleton,
    api,
    load,
    save,
    tensors,
    verify,
)
from structlin.checkpoint.tensors import write_safetensors
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Structure, register, registered
from structlin.layers.linear import build

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
IN, OUT = 16, 12


def one_of_each() -> list[Structure]:
    """A resolved member of every registered structure, and of those with an option that changes the equation."""
    found = []
    for kind in structlin.structures.families().values():
        budgets = (IN * OUT * k // 8 for k in range(4, 17))
        found.append(next(member for budget in budgets for member in kind.candidates(IN, OUT, budget)))
    found += [
        structlin.structures.PHM(n=4, algebra="hamilton"),
        structlin.structures.Shapeshifter(rank=2, order="reshape"),
        structlin.structures.TensorTrain(rank=2, in_modes=(2, 2, 4), out_modes=(3, 2, 2)),
        structlin.structures.Butterfly(radix=2),
        structlin.structures.Kaleidoscope(width=2, expansion=2),
    ]
    return [structure.resolve(IN, OUT) for structure in found]


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit-exact."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def model(seed: int = 0) -> nn.Sequential:
    """A small model with three structures, batch norm (an integer buffer) and a dense head."""
    torch.manual_seed(seed)
    layers = (
        KroneckerLinear(8, 8, terms=2),
        nn.BatchNorm1d(8),
        nn.Sequential(TTLinear(8, 12, rank=2, cores=2), nn.ReLU(), KMatrix(12, 8, bias=False)),
        nn.Linear(8, 4),
    )
    return nn.Sequential(*layers).requires_grad_(True)


def skeleton() -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8, bias=False))
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), inner, nn.Linear(8, 4))


def edit(directory: Path, change: Callable[[dict], object], name: str = "structlin.json") -> None:
    document = json.loads((directory / name).read_text())
    change(document)
    (directory / name).write_text(json.dumps(document))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(model(), tmp_path / "out")


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", one_of_each(), ids=str)
def test_round_trip_is_bit_exact(structure: Structure, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(build(structure, IN, OUT, dtype=dtype), nn.Linear(OUT, IN, dtype=dtype))
    save(original, tmp_path / "out")
    found = load(nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN, dtype=dtype)), tmp_path / "out")
    assert type(found[0]) is type(original[0])
    assert found[0].structure == structure
    assert_equal(tensors_of(found), tensors_of(original))
    x = torch.randn(3, IN).to(dtype)
    assert torch.equal(found(x), original(x))


def test_names_in_the_file_are_those_of_state_dict(saved: Path) -> None:
    stored = load_file(saved / "model.safetensors")
    assert set(stored) == set(model().state_dict())
    assert {"0.left", "0.right", "0.bias", "2.0.core_0", "1.num_batches_tracked", "3.weight"} <= set(stored)
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_skeleton_is_filled_in_place_and_keeps_flags(saved: Path) -> None:
    target = skeleton().eval()
    target[0].requires_grad_(False)
    target[3].bias.requires_grad_(False)
    head = target[3]
    found = load(target, saved)
    assert found is target
    assert found[3] is head
    assert_equal(tensors_of(found), tensors_of(model()))
    assert not any(module.training for module in found.modules())
    assert [p.requires_grad for p in found[0].parameters()] == [False] * 3
    assert (found[3].weight.requires_grad, found[3].bias.requires_grad) == (True, False)
    assert all(p.requires_grad for p in found[2].parameters())


def test_meta_and_partly_meta_skeletons(saved: Path) -> None:
    with torch.device("meta"):
        whole = skeleton()
    part = skeleton()
    part[2].to("meta")
    for target in (whole, part):
        found = load(target, saved)
        assert_equal(tensors_of(found), tensors_of(model()))
        assert {tensor.device.type for tensor in found.state_dict().values()} == {"cpu"}


def test_skeleton_that_holds_the_layers_already(saved: Path) -> None:
    target = model(seed=1)
    target[2][2] = KMatrix(12, 8, bias=False, width=2)  # another structure: replaced
    kept = target[0]
    found = load(target, saved)
    assert found[0] is kept
    assert found[2][2].structure.width == 1
    assert_equal(tensors_of(found), tensors_of(model()))


@pytest.mark.parametrize("target", [nn.Linear(8, 6), LowRankLinear(8, 6, rank=2)], ids=["dense", "structured"])
def test_root_layer(target: nn.Module, tmp_path: Path) -> None:
    original = LowRankLinear(8, 6, rank=2)
    found = load(target, save(original, tmp_path / "out"))
    assert isinstance(found, LowRankLinear)
    assert (found is target) == isinstance(target, LowRankLinear)
    assert_equal(tensors_of(found), tensors_of(original))


def test_device_moves_everything(saved: Path) -> None:
    target = skeleton()
    target.register_buffer("scratch", torch.ones(3), persistent=False)
    found = load(target, saved, device="meta")
    assert {t.device.type for t in (*found.parameters(), *found.buffers())} == {"meta"}


def test_awkward_tensors(tmp_path: Path) -> None:
    original = nn.Module()
    base = torch.arange(12.0).reshape(3, 4)
    original.a, original.b = nn.Parameter(base), nn.Parameter(base.t())  # one memory, two parameters
    original.register_buffer("scalar", torch.tensor(3, dtype=torch.int16))
    original.register_buffer("empty", torch.zeros(0, 3))
    original.register_buffer("flags", torch.tensor([True, False]))
    original.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
    original.register_buffer("negative", torch.randn(3, dtype=torch.complex64).conj().imag)
    original.register_buffer("eight", torch.ones(2).to(torch.float8_e4m3fn))
    target = copy.deepcopy(original).to("meta")
    found = load(target, save(original, tmp_path / "out"))
    assert torch.equal(found.eight.float(), torch.ones(2))
    del original.eight, found.eight  # not comparable
    assert_equal(tensors_of(found), tensors_of(original))
    assert found.a.untyped_storage().data_ptr() != found.b.untyped_storage().data_ptr()


def test_loaded_tensors_own_their_memory(saved: Path) -> None:
    found = load(skeleton(), saved)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.state_dict().values())


def test_empty_model(tmp_path: Path) -> None:
    assert verify(save(nn.Sequential(), tmp_path / "out")).parameters == 0
    load(nn.Sequential(), tmp_path / "out")


def test_recurrent_module_sees_its_new_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.LSTM(4, 4), nn.MultiheadAttention(4, 2))
    original[1].out_proj = LowRankLinear(4, 4, rank=2)
    target = nn.Sequential(nn.LSTM(4, 4), nn.MultiheadAttention(4, 2))
    found = load(target, save(original, tmp_path / "out"))
    x = torch.randn(3, 2, 4)
    assert torch.equal(found[0](x)[0], original[0](x)[0])
    assert torch.equal(found[1](x, x, x)[0], original[1](x, x, x)[0])


def test_structure_of_a_third_party_without_a_layer_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structlin.equation.structure._REGISTRY", registered())

    @register
    @dataclass(frozen=True)
    class Scaled(Structure):
        """A rank-one matrix and a structure as a hyperparameter, which is written like a structure."""

        name: ClassVar[str] = "scaled"
        inner: Structure | None = None
        note: str = "x"
        strength: float = 0.5
        pairs: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))

        def resolve(self, in_features, out_features, weight=None):
            return self

        def spec(self, in_features, out_features):
            sizes = {"o": out_features, "i": in_features}
            return Spec(in_features, out_features, (equation("o, i -> o i", ("column", "row"), sizes),))

        def decompose(self, weight):
            raise AssertionError("saving and loading never fit a weight")

        @classmethod
        def candidates(cls, in_features, out_features, budget):
            return []

    structure = Scaled(inner=structlin.structures.LowRank(rank=3))
    original = nn.Sequential(StructuredLinear(5, 7, structure=structure))
    path = save(original, tmp_path / "out")
    found = load(nn.Sequential(nn.Linear(5, 7)), path)
    assert type(found[0]) is StructuredLinear
    assert found[0].structure == structure
    assert_equal(tensors_of(found), tensors_of(original))
    structlin.equation.structure._REGISTRY.pop("scaled")
    with pytest.raises(CheckpointError, match="layer '0': kind 'scaled' is not registered; import the module"):
        verify(path)
    with pytest.raises(CheckpointError, match="layer '0': Scaled is not registered; decorate with @register"):
        save(original, tmp_path / "out")


def test_conv1d_of_transformers_is_replaced(tmp_path: Path) -> None:
    class Conv1D(nn.Module):  # as transformers has it: the weight is (in, out)
        def __init__(self, out_features: int, in_features: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(in_features, out_features))
            self.bias = nn.Parameter(torch.zeros(out_features))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    path = save(nn.Sequential(LowRankLinear(8, 6, rank=2)), tmp_path / "out")
    assert isinstance(load(nn.Sequential(Conv1D(6, 8)), path)[0], LowRankLinear)
    with pytest.raises(CheckpointError, match=r"the skeleton's weight is \[8, 6\], the checkpoint's \[6, 8\]"):
        load(nn.Sequential(Conv1D(8, 6)), path)


# Sharing -------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A tied head, one layer under two names, one factor in two layers."""

    def __init__(self, linear: Callable[[], nn.Module], tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.encoder, self.decoder, self.other = linear(), linear(), linear()
        self.head = nn.Linear(6, 10, bias=False)
        if tie:
            self.head.weight = self.embedding.weight
            self.decoder = self.encoder
            if isinstance(self.other, LowRankLinear):
                self.other.left = self.encoder.left


@pytest.mark.parametrize("tie", [True, False], ids=["tied skeleton", "untied skeleton"])
def test_shared_stays_shared(tie: bool, tmp_path: Path) -> None:
    original = Tied(lambda: LowRankLinear(6, 6, rank=2))
    path = save(original, tmp_path / "out")
    stored = load_file(path / "model.safetensors")
    assert {"embedding.weight", "encoder.left", "other.right"} <= set(stored)
    assert not {"head.weight", "decoder.left", "other.left"} & set(stored)
    document = json.loads((path / "structlin.json").read_text())
    assert document["shared_layers"] == {"decoder": "encoder"}
    assert document["aliases"]["head.weight"] == "embedding.weight"
    assert document["aliases"]["decoder.bias"] == "encoder.bias"
    with torch.device("meta"):
        target = Tied(lambda: nn.Linear(6, 6), tie=tie)
    found = load(target, path)
    assert found.decoder is found.encoder
    assert found.head.weight is found.embedding.weight
    assert found.other.left is found.encoder.left
    assert found.other is not found.encoder
    assert_equal(tensors_of(found), tensors_of(original))


def test_untied_stays_untied(tmp_path: Path) -> None:
    original = Tied(lambda: LowRankLinear(6, 6, rank=2), tie=False)
    target = Tied(lambda: nn.Linear(6, 6), tie=False)
    target.head.weight = target.embedding.weight
    found = load(target, save(original, tmp_path / "out"))
    assert found.head.weight is not found.embedding.weight
    assert_equal(tensors_of(found), tensors_of(original))


def test_module_that_only_the_skeleton_shares_is_refused(tmp_path: Path) -> None:
    structured = save(nn.Sequential(*(LowRankLinear(4, 4, rank=1) for _ in range(2))), tmp_path / "structured")
    dense = save(nn.Sequential(*(nn.Linear(4, 4) for _ in range(2))), tmp_path / "dense")
    mixed = save(
        nn.Sequential(nn.Sequential(LowRankLinear(4, 4, rank=1)), nn.Sequential(nn.Linear(4, 4))), tmp_path / "mixed"
    )
    linear, block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match=r"skeleton shares '1\.weight' with '0\.weight', the checkpoint does not"):
        load(nn.Sequential(linear, linear), dense)
    with pytest.raises(CheckpointError, match=r"skeleton shares '1\.0' with '0\.0', the checkpoint does not; untie"):
        load(nn.Sequential(block, block), mixed)
    # Two names of one module in one parent are two places: they come apart.
    found = load(nn.Sequential(linear, linear), structured)
    assert found[0] is not found[1]


# Shards and the directory --------------------------------------------------------------------------------------------


def test_shards_and_index_as_hugging_face_writes_them(tmp_path: Path) -> None:
    original = model()
    path = save(original, tmp_path / "out", max_shard_bytes=400)
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.state_dict().values())
    for name, shard in index["weight_map"].items():
        assert name in load_file(path / shard)
    assert_equal(tensors_of(load(skeleton(), path)), tensors_of(original))
    assert verify(path, check_hashes=True).shards == tuple(shards)
    save(original, path)
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "structlin.json"]


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    (path / "tokenizer").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "tokenizer" / "vocab.txt").write_text("a b")
    (path / "tokenizer" / "model.safetensors").write_text("not ours: not at the top")
    (path / "link").symlink_to("config.json")
    (path / "model.safetensors").write_text("a dense checkpoint")
    path.chmod(0o750)
    for seed in range(2):
        save(model(seed), path)
        assert (path / "config.json").read_text() == "{}"
        assert (path / "tokenizer" / "vocab.txt").read_text() == "a b"
        assert (path / "tokenizer" / "model.safetensors").exists()
        assert (path / "link").readlink() == Path("config.json")
        assert path.stat().st_mode & 0o777 == 0o750
        assert_equal(tensors_of(load(skeleton(), path)), tensors_of(model(seed)))
    assert os.listdir(tmp_path) == ["out"]


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = save(model(), tmp_path / "out")
    (path / "config.json").write_text("{}")
    save(model(), path)
    assert (path / "config.json").read_text() == "{}"


def test_link_to_the_directory_stays_a_link(tmp_path: Path) -> None:
    save(model(0), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save(model(1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_equal(tensors_of(load(skeleton(), tmp_path / "real")), tensors_of(model(1)))


def test_files_are_as_readable_as_the_users_other_files(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in (*saved.iterdir(), tmp_path / "plain")}
    assert len(modes) == 1


def test_verify_summarises(tmp_path: Path) -> None:
    path = save(model(), tmp_path / "out", metadata={"ratio": 0.5, "by": ["test"]})
    summary = verify(str(path))
    assert summary.layers == {"0": "kronecker", "2.0": "tt", "2.2": "kmatrix"}
    assert summary.parameters == sum(tensor.numel() for tensor in model().state_dict().values())
    assert summary.bytes == (path / "model.safetensors").stat().st_size
    assert summary.shards == ("model.safetensors",)
    assert summary.metadata == {"ratio": 0.5, "by": ["test"]}
    assert summary.structlin_version


# A save that fails ---------------------------------------------------------------------------------------------------


def failing_saves() -> dict[str, tuple[Callable[[], nn.Module], dict, str]]:
    def with_attribute(name: str, value: object) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            module = nn.Sequential(LowRankLinear(4, 4, rank=1))
            setattr(module[0], name, value)
            return module

        return make

    class Extra(nn.Linear):
        def get_extra_state(self) -> dict:
            return {"a": 1}

    def parametrised() -> nn.Module:
        module = nn.Sequential(LowRankLinear(4, 4, rank=1))
        nn.utils.parametrizations.orthogonal(module[0], "left")
        return module

    def named(name: str) -> nn.Module:
        module = nn.Module()
        module.register_buffer(name, torch.zeros(2))
        return module

    def sparse() -> nn.Module:
        module = nn.Module()
        module.register_buffer("s", torch.eye(2).to_sparse())
        return module

    def unresolved() -> nn.Module:
        module = nn.Sequential(ButterflyLinear(8, 8))
        module[0].structure = structlin.structures.Butterfly()
        return module

    small = lambda: nn.Sequential(LowRankLinear(4, 4, rank=1))  # noqa: E731
    half = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    return {
        "meta": (lambda: nn.Linear(2, 2, device="meta"), {}, "tensor 'weight' is on the meta device; load values"),
        "lazy": (lambda: nn.LazyLinear(2), {}, "tensor 'weight' is not initialised; run the model once"),
        "extra state": (lambda: Extra(2, 2), {}, r"state_dict and parameters differ in \['_extra_state'\]; only plain"),
        "parametrised": (parametrised, {}, r"layer '0': tensor '0\.left' is missing; LowRank\(rank=1\) needs"),
        "further parameter": (
            with_attribute("scale", nn.Parameter(torch.ones(1))),
            {},
            r"tensor '0\.scale' is unexpected",
        ),
        "mixed dtypes": (with_attribute("bias", half), {}, r"'0\.bias' .* is torch.bfloat16 \(4,\), expected torch.fl"),
        "float8": (lambda: small().to(torch.float8_e5m2), {}, "dtype 'float8_e5m2'; expected one of"),
        "sparse": (sparse, {}, "tensor 's' is torch.float32, torch.sparse_coo; expected a dense tensor of one of"),
        "dunder": (lambda: named("__x"), {}, "name '__x'; expected parts that are not empty and do not begin"),
        "unresolved": (unresolved, {}, r"layer '0': Butterfly\(radix=None, in_modes=None.* has no equation"),
        "metadata": (
            small,
            {"metadata": {"a": {1, 2}}},
            "cannot be written as JSON; use numbers.*: TypeError: Object of type set",
        ),
        "nan metadata": (small, {"metadata": {"a": float("nan")}}, "cannot be written as JSON; .*Out of range float"),
        "shard size": (small, {"max_shard_bytes": 0}, "max_shard_bytes=0 is below 1; it is a number of bytes"),
    }


@pytest.mark.parametrize("name", failing_saves())
def test_refused_save_says_why_and_changes_nothing(name: str, saved: Path) -> None:
    make, options, message = failing_saves()[name]
    bad = make()
    with pytest.raises(ValueError, match=message) as caught:
        save(bad, saved, **options)
    assert type(caught.value) is (ValueError if name == "shard size" else CheckpointError)
    assert os.listdir(saved.parent) == ["out"]
    assert_equal(tensors_of(load(skeleton(), saved)), tensors_of(model()))


@pytest.mark.parametrize("step", ["write_shards", "_keep_foreign", "sync", "_swap"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
def test_failing_save_leaves_no_temporaries(
    step: str, error: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tensors if step == "write_shards" else _replace, step, fail)
        expected, message = (
            (CheckpointError, "out: cannot be written: OSError: disk full") if error.args else (type(error), None)
        )
        with pytest.raises(expected, match=message):
            save(model(1), saved)
    assert os.listdir(saved.parent) == ["out"]
    assert_equal(tensors_of(load(skeleton(), saved)), tensors_of(model()))


def test_failing_second_rename_puts_the_old_directory_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if "tmp" in self.name:
            raise OSError("no")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(CheckpointError, match="out: cannot be written: OSError: no"):
            save(model(1), saved)
    assert os.listdir(saved.parent) == ["out"]
    assert_equal(tensors_of(load(skeleton(), saved)), tensors_of(model()))


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(CheckpointError, match=r"out: cannot be written: .* is a file"):
        save(model(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


def test_big_endian_machines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(CheckpointError, match="little-endian and this machine is not"):
        save(model(), tmp_path / "out")


# Crashes -------------------------------------------------------------------------------------------------------------


def test_crash_between_the_renames_is_read_and_repaired(saved: Path) -> None:
    aside = saved.parent / ".out.structlin-previous"
    (saved / "config.json").write_text("{}")
    saved.rename(aside)
    half_written = saved.parent / ".out.structlin-tmp-12345678"
    half_written.mkdir()
    assert verify(saved).layers
    assert_equal(tensors_of(load(skeleton(), saved)), tensors_of(model()))
    save(model(1), saved)
    assert os.listdir(saved.parent) == ["out"]
    assert (saved / "config.json").exists()
    assert_equal(tensors_of(load(skeleton(), saved)), tensors_of(model(1)))


def test_crash_after_the_renames_is_cleaned_up(saved: Path) -> None:
    shutil.copytree(saved, saved.parent / ".out.structlin-previous")
    save(model(1), saved)
    assert os.listdir(saved.parent) == ["out"]


def test_directories_of_similar_names_are_not_touched(tmp_path: Path) -> None:
    for name in ("out.previous", "out.tmp-1", ".out2.structlin-tmp-1", ".other.structlin-previous"):
        (tmp_path / name).mkdir()
    save(model(), tmp_path / "out")
    save(model(), tmp_path / "out")
    assert len(os.listdir(tmp_path)) == 5


def _save_forever(path: Path) -> None:
    torch.set_num_threads(1)
    models = [model(0), model(1)]
    while True:
        for item in models:
            save(item, path, max_shard_bytes=500)


def _save_and_die(path: Path, at: int, inside: bool) -> None:
    """Die at the at-th change of a directory entry."""
    left = at
    real = os.rename, os.replace, os.mkdir, os.link, os.unlink, os.rmdir
    if inside:
        os.chdir(path)

    def dying(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), 9)
            return function(*args, **kwargs)

        return call

    os.rename, os.replace, os.mkdir, os.link, os.unlink, os.rmdir = map(dying, real)
    save(model(1), "." if inside else path)


@pytest.fixture(scope="module")
def server() -> Iterator[multiprocessing.context.BaseContext]:
    """Processes that need not import torch again and, unlike forks of this one, have no threads in unknown states."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["structlin.checkpoint"])
    return context


def inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def is_old_or_new(path: Path) -> int:
    """Which of the two models a directory holds, completely."""
    found = tensors_of(load(skeleton(), path))
    seed = next(seed for seed in range(2) if torch.equal(found["3.bias"], model(seed).state_dict()["3.bias"]))
    assert_equal(found, tensors_of(model(seed)))
    assert (path / "config.json").exists() or (path.with_name(".out.structlin-previous") / "config.json").exists()
    return seed


def test_kill_at_random_moments(saved: Path, server: multiprocessing.context.BaseContext) -> None:
    (saved / "config.json").write_text("{}")
    moments = random.Random(0)
    for _ in range(10):
        saver = server.Process(target=_save_forever, args=(saved,))
        before = inode(saved)
        saver.start()
        deadline = time.monotonic() + 60
        while inode(saved) in (0, before) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        saver.kill()
        saver.join()
        is_old_or_new(saved)
    save(model(), saved)
    assert os.listdir(saved.parent) == ["out"]


@pytest.mark.parametrize("inside", [False, True], ids=["from outside", "in the working directory"])
def test_kill_at_every_change_of_a_directory(
    inside: bool, saved: Path, server: multiprocessing.context.BaseContext
) -> None:
    (saved / "config.json").write_text("{}")
    original = saved.rename(saved.parent / "original")
    found = []
    for at in range(1, 100):
        shutil.rmtree(saved, ignore_errors=True)
        shutil.copytree(original, saved)
        saver = server.Process(target=_save_and_die, args=(saved, at, inside))
        saver.start()
        saver.join()
        found.append(is_old_or_new(saved))
        if saver.exitcode == 0:
            break
        assert saver.exitcode == -9
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 1
    assert len(found) > 5
    save(model(2), saved)
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors", "structlin.json"]
    assert sorted(os.listdir(saved.parent)) == ["original", "out"]


# A new process -------------------------------------------------------------------------------------------------------

FRESH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numpy", "transformers"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that there is no numpy
    import torch
from torch import nn
from structlin.checkpoint import load, save
target = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
model = load(target, sys.argv[1])
save(model, sys.argv[2])
assert "numpy" not in sys.modules and "transformers" not in sys.modules
print(model(torch.ones(1, 8)).tolist(), "pickle" in vars(sys.modules["structlin.checkpoint"]))
"""


def test_new_process_without_numpy_and_transformers(tmp_path: Path) -> None:
    original = nn.Sequential(PHMLinear(8, 6, n=2), ShapeshifterLinear(6, 4, rank=2))
    path = save(original, tmp_path / "out")
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(path), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(original(torch.ones(1, 8)).tolist())[:10])
    for file in path.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_same_model_same_bytes(tmp_path: Path) -> None:
    first, second = save(model(), tmp_path / "a"), save(model(), tmp_path / "b")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


# Nothing in a file is run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", [api, tensors, _directory, _lock, _manifest, _replace, _skeleton], ids=lambda module: module.__name__
)
def test_no_code_comes_from_files(module: object) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    banned = {"pickle", "eval", "exec", "importlib", "__import__", "globals", "joblib", "dill", "runpy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "importlib.metadata":
            assert {alias.name for alias in node.names} <= {"version", "PackageNotFoundError"}
            continue
        names = [getattr(node, field, None) for field in ("id", "attr", "name", "module")]
        parts = {part for name in names if isinstance(name, str) for part in name.split(".")}
        assert not parts & banned, ast.dump(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save", "jit", "package", "hub")


# Files that are refused ----------------------------------------------------------------------------------------------


def layer_edit(name: str, **fields: object) -> Callable[[Path], None]:
    return lambda path: edit(path, lambda document: document["layers"][name].update(fields))


def field_edit(*keys: str, value: object) -> Callable[[Path], None]:
    def change(document: dict) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return lambda path: edit(path, change)


def rename_layer(old: str, new: str) -> Callable[[Path], None]:
    def change(document: dict) -> None:
        document["layers"][new] = document["layers"].pop(old)

    return lambda path: edit(path, change)


def write_json(text: str) -> Callable[[Path], object]:
    return lambda path: (path / "structlin.json").write_text(text)


def rewrite(change: Callable[[dict], object], *, shard: str = "model.safetensors") -> Callable[[Path], None]:
    """Change the tensors of the file, with its right hash."""

    def apply(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path / shard).items()}  # load_file maps the file
        change(tensors)
        digest = write_safetensors(path / shard, tensors, {"format": "pt"})
        edit(path, lambda document: document["shards"].update({shard: digest}))

    return apply


def raw_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the header of the file, not its data."""

    def apply(path: Path) -> None:
        data = (path / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return apply


def flip_data(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "model.safetensors").write_bytes(data)


def pop(name: str) -> Callable[[Path], None]:
    return rewrite(lambda tensors: tensors.pop(name))


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return rewrite(lambda tensors: tensors.update({name: tensor}))


K = "hyperparameters"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "out: no such directory; expected one written by structlin.save"),
    "no manifest": (lambda p: (p / "structlin.json").unlink(), "structlin.json: missing or unreadable"),
    "no shard": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: missing or unreadable"),
    "loop": (
        lambda p: ((p / "structlin.json").unlink(), (p / "structlin.json").symlink_to("structlin.json")),
        "structlin.json: missing or unreadable",
    ),
    "pipe": (
        lambda p: ((p / "model.safetensors").unlink(), os.mkfifo(p / "model.safetensors")),
        "model.safetensors: not a regular file; put a copy",
    ),
    "not JSON": (write_json("{"), "structlin.json: not valid JSON"),
    "not UTF-8": (lambda p: (p / "structlin.json").write_bytes(b"\xff\xfe{}"), "structlin.json: not valid JSON"),
    "NaN": (write_json('{"a": NaN}'), "structlin.json: not valid JSON: NaN is not JSON"),
    "huge number": (write_json('{"format_version": 1' + "0" * 5000 + "}"), "structlin.json: not valid JSON"),
    "duplicate key": (write_json('{"a": 1, "b": 1, "b": 2}'), "not valid JSON: duplicate key 'b'"),
    "deep": (write_json('{"a":' + "[" * 40 + "]" * 40 + "}"), "structlin.json: nested deeper than 32 levels"),
    "very deep": (write_json("[" * 1_000_000), "structlin.json: nested deeper than 32 levels"),
    "huge JSON": (lambda p: os.truncate(p / "structlin.json", 65 * 2**20), "68157440 B; expected at most 33554432 B"),
    "list": (write_json("[]"), "structlin.json: format_version None; this structlin reads 1"),
    "version": (field_edit("format_version", value=2), "format_version 2; this structlin reads 1, update it"),
    "version true": (field_edit("format_version", value=True), "format_version True; this structlin reads 1"),
    "missing field": (lambda p: edit(p, lambda d: d.pop("aliases")), "found the fields .* expected .*'aliases'"),
    "wrong type": (field_edit("layers", value=[]), "structlin.json: layers is list, expected dict"),
    "wrong alias": (field_edit("aliases", "x", value=3), "aliases: found int, expected a string"),
    "layer no object": (field_edit("layers", "0", value=3), "layer '0': found int, expected an object with"),
    "unknown kind": (layer_edit("0", kind="magic"), "layer '0': kind 'magic' is not registered.*or use one of"),
    "bias text": (layer_edit("0", bias="yes"), "layer '0': bias is str, expected bool"),
    "bias missing": (layer_edit("0", bias=False), r"layer '0': tensor '0\.bias' is unexpected"),
    "negative size": (layer_edit("0", in_features=-8), "layer '0': in_features=-8; expected 1 to 2147483647"),
    "huge size": (layer_edit("0", out_features=2**40), "layer '0': out_features=1099511627776; expected 1 to"),
    "layer dtype": (layer_edit("0", dtype="int8"), "layer '0': dtype 'int8'; expected one of"),
    "other dtype": (layer_edit("0", dtype="bfloat16"), r"'0\.left' .* is torch.float32 .*, expected torch.bfloat16"),
    "other size": (layer_edit("0", in_features=7), r"layer '0': the skeleton's weight is \[8, 8\], the checkpoint's"),
    "larger size": (layer_edit("0", in_features=9), "layer '0': Kronecker.* has no equation: ValueError.*cover"),
    "unknown field": (layer_edit("0", **{K: {"magic": 1}}), "layer '0': kronecker does not take {'magic': 1}"),
    "text for a number": (
        field_edit("layers", "0", K, "terms", value="2"),
        "layer '0': kronecker does not take .*terms='2'",
    ),
    "float for an integer": (
        field_edit("layers", "0", K, "terms", value=2.0),
        "layer '0': kronecker does not take .*terms=2.0",
    ),
    "huge width": (field_edit("layers", "2.2", K, "width", value=10**9), "layer '2.2': width: 1000000000 exceeds 1024"),
    "many factors": (field_edit("layers", "2.2", K, "width", value=100), "has 201 tensors; expected up to 128"),
    "negative width": (field_edit("layers", "2.2", K, "width", value=-1), "layer '2.2': .*width=-1.* has no equation"),
    "many modes": (field_edit("layers", "2.0", K, "in_modes", value=[1] * 99), "in_modes: 99 items; expected at most"),
    "open modes": (field_edit("layers", "2.0", K, "in_modes", value=None), "layer '2.0': TensorTrain.*has no equation"),
    "not resolved": (field_edit("layers", "2.0", K, "cores", value=5), r"found .*cores=5.*, expected the resolved"),
    "other terms": (field_edit("layers", "0", K, "terms", value=3), r"'0\.left' .* \(2, 2, 4\), expected torch.fl"),
    "does not fit": (
        field_edit("layers", "2.0", K, "tolerance", value=0.5),
        "layer '2.0': TensorTrain.* does not fit: ValueError",
    ),
    "shard path": (field_edit("shards", "../model.safetensors", value=""), "shard name '../model"),
    "absolute shard": (field_edit("shards", "/etc/passwd", value=""), "shard name '/etc/passwd'; expected a plain"),
    "backslash shard": (field_edit("shards", "..\\m.safetensors", value=""), r"shard name '\.\.\\\\m\.safetensors'"),
    "zero byte": (field_edit("shards", "model.safetensors\0", value=""), "shard name 'model.safetensors.x00'"),
    "hash": (flip_data, r"model.safetensors: sha256 .*, expected .*; copy the file again"),
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 900), "model.safetensors: cannot be read"),
    "empty": (lambda p: os.truncate(p / "model.safetensors", 0), "model.safetensors: cannot be read"),
    "header dtype": (
        raw_header(lambda h: h["1.num_batches_tracked"].update(dtype="C64")),
        r"'1\.num_batches_tracked' in model.*: dtype C64; expected one of|cannot be read",
    ),
    "header axes": (
        raw_header(lambda h: h["1.num_batches_tracked"].update(shape=[1] * 65)),
        r"tensor '1\.num_batches_tracked' in .*; expected up to 64 axes of up to 2147483647",
    ),
    "header shape": (raw_header(lambda h: h["3.weight"].update(shape=[2**40, 2**40])), "cannot be read: .*[oO]verflow"),
    "header offsets": (raw_header(lambda h: h["3.weight"].update(data_offsets=[0, 8])), "cannot be read: .*[oO]ffset"),
    "missing factor": (pop("0.left"), r"layer '0': tensor '0\.left' is missing; Kronecker.* needs \['bias', 'left'"),
    "extra factor": (put("0.x", torch.zeros(2)), r"layer '0': tensor '0\.x' is unexpected"),
    "factor shape": (put("0.left", torch.zeros(1, 2, 4)), r"'0\.left' .* \(1, 2, 4\), expected"),
    "factor dtype": (put("0.left", torch.zeros(2, 2, 4).half()), "is torch.float16 .*, expected"),
    "missing tensor": (pop("3.bias"), r"tensors \['3\.bias'\] \(1 in all\) of the skeleton are not in the checkpoint"),
    "extra tensor": (put("9.x", torch.zeros(2)), r"tensors \['9\.x'\] .* are not in the skel"),
    "tensor shape": (
        put("3.bias", torch.zeros(5)),
        r"tensor '3\.bias' in model\.safetensors is torch\.float32 \(5,\), the skeleton's is torch\.float32 \(4,\)",
    ),
    "tensor kind": (put("3.bias", torch.zeros(4).int()), "is torch.int32 .*, the skeleton's is"),
    "dunder": (put("__class__.x", torch.zeros(2)), r"name '__class__\.x'; expected parts"),
    "empty part": (put("a..x", torch.zeros(2)), r"name 'a\.\.x'; expected parts that are not"),
    "unknown layer": (rename_layer("0", "7"), r"layer '7': tensor '7\.left' is missing"),
    "alias of nothing": (field_edit("aliases", "x.y", value="0.nothing"), "'x.y' is another name of '0.nothing'"),
    "alias stored too": (field_edit("aliases", "0.left", value="0.right"), "expected tensors stored once"),
    "alias unexpected": (field_edit("aliases", "x.y", value="0.left"), r"tensors \['x\.y'\] .* are not in the"),
    "shared with nothing": (field_edit("shared_layers", "3", value="8"), "layer '3' is another name of '8'; expected"),
    "shared in name only": (field_edit("shared_layers", "3", value="0"), r"layer '3' is '0', but tensor '3\.left'"),
    "complex of nothing": (field_edit("complex", value=["x"]), r"complex tensors \['x'\] are in no shard"),
    "complex of a float": (field_edit("complex", value=["3.bias"]), "'3.bias' in .*; expected pairs of floats"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_load_says_why_and_changes_nothing(name: str, saved: Path) -> None:
    damage, message = REFUSED[name]
    damage(saved)
    target = skeleton()
    before, modules = tensors_of(target), list(target.modules())
    parameters = list(target.parameters())
    with pytest.raises(CheckpointError, match=message):
        load(target, saved)
    assert_equal(tensors_of(target), before)
    assert all(a is b for a, b in zip(target.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))


def test_verify_refuses_without_a_skeleton(saved: Path) -> None:
    flip_data(saved)
    verify(saved)
    with pytest.raises(CheckpointError, match="sha256"):
        verify(saved, check_hashes=True)
    load(skeleton(), saved, check_hashes=False)
    field_edit("format_version", value=3)(saved)
    with pytest.raises(CheckpointError, match="format_version 3"):
        verify(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.__delitem__(3), r"tensors \['3\.bias', '3\.weight'\] \(2 in all\) are not in the skeleton"),
        (lambda s: s.append(nn.Linear(1, 1)), r"tensors \['4\.bias', '4\.weight'\] \(2 in all\) of the skeleton"),
        (lambda s: s.__setitem__(0, nn.Embedding(8, 8)), "layer '0': the skeleton has a Embedding without this map"),
        (lambda s: s.__setitem__(0, nn.Linear(8, 9)), r"layer '0': the skeleton's weight is \[9, 8\]"),
        (lambda s: s.__setitem__(0, nn.Linear(8, 8, bias=False)), "layer '0': bias is False in the skeleton, True in"),
        (lambda s: s.__setitem__(2, nn.ReLU()), r"layer '2\.0': the skeleton has no such module; expected the archit"),
        (lambda s: s.__setitem__(3, nn.LazyLinear(4)), r"tensor '3\.weight' in .* the skeleton's is uninitialised"),
        (
            lambda s: setattr(s[3], "bias", nn.Parameter(torch.zeros(4, dtype=torch.complex64))),
            "the skeleton's is torch.complex64",
        ),
    ],
)
def test_other_skeletons_are_refused(change: Callable[[nn.Sequential], object], message: str, saved: Path) -> None:
    target = skeleton()
    change(target)
    modules = list(target.modules())
    with pytest.raises(CheckpointError, match=message):
        load(target, saved)
    assert all(a is b for a, b in zip(target.modules(), modules, strict=True))


def test_shards_are_checked_against_one_another(tmp_path: Path) -> None:
    path = save(model(), tmp_path / "out", max_shard_bytes=400)
    first, second = sorted(path.glob("*.safetensors"))[:2]
    index = path / "model.safetensors.index.json"
    original = index.read_text()
    edit(path, lambda d: d["weight_map"].update({"3.bias": "../x.safetensors"}), index.name)
    with pytest.raises(CheckpointError, match="its weight_map differs from the shards' headers; save again"):
        load(skeleton(), path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: missing or unreadable"):
        load(skeleton(), path)
    index.write_text(original)
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=f"is in two shards, {first.name} and {second.name}"):
        load(skeleton(), path)


def test_failing_assignment_is_undone(saved: Path) -> None:
    class Stubborn(nn.BatchNorm1d):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "running_var" and "running_var" in self._buffers:
                raise RuntimeError("no")
            super().__setattr__(name, value)

    target = skeleton()
    target[1] = Stubborn(8)
    before, objects = tensors_of(target), [*target.parameters(), *target.buffers()]
    with pytest.raises(CheckpointError, match="'running_var' of Stubborn cannot be assigned: RuntimeError"):
        load(target, saved)
    assert_equal(tensors_of(target), before)
    assert all(a is b for a, b in zip([*target.parameters(), *target.buffers()], objects, strict=True))


def test_layer_that_cannot_be_built(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("broken")

    monkeypatch.setattr(_skeleton, "build", fail)
    with pytest.raises(CheckpointError, match=r"layer '0': Kronecker\(.*\) cannot be built: KeyError"):
        load(skeleton(), saved)


def test_file_that_changes_while_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = rewrite(lambda tensors: tensors.update({"3.bias": torch.zeros(5)}))
    checkpoint = _manifest.read(saved)
    monkeypatch.setattr(tensors, "check_hashes", lambda directory, shards: change(directory))
    with pytest.raises(CheckpointError, match=r"'3.bias' in model.safetensors is torch.float32 \(5,\), the skeleton's"):
        load(skeleton(), saved)
    places = dict.fromkeys(checkpoint.tensors, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        tensors.read_tensors(saved, checkpoint.tensors, places, None)


# Fuzzing -------------------------------------------------------------------------------------------------------------


def leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values of a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from leaves(child, (*path, key))


ODD_VALUES = (
    None, True, -1, 0, 1, 3, 7, 2**31, 2**63, 10**400, 1.5, 1e308, "", "x", "..", "../model.safetensors", "__class__",
    "lowrank", "butterfly", "float64", [], [1], [2, 2], [[1, 2], [3, 4]], [-1, 8], [2**31, 2**31], {}, {"kind": "tt"},
)  # fmt: skip


def mutate_json(document: dict, rng: random.Random) -> None:
    path = rng.choice(list(leaves(document)))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    action = rng.randrange(4)
    if action == 0 and isinstance(parent, dict):
        del parent[path[-1]]
    elif action == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "x", "__init__", "a..b", "0", "model.safetensors", "../x"])] = parent.pop(path[-1])
    elif action == 2 and isinstance(parent[path[-1]], int):
        parent[path[-1]] += rng.choice([-1, 1, 1000, 2**31, -(2**31)])
    else:
        parent[path[-1]] = rng.choice(ODD_VALUES)


def mutate_bytes(data: bytearray, rng: random.Random) -> None:
    action = rng.randrange(4)
    # Half of the positions in the first bytes: header, or the top of the manifest.
    at = rng.randrange(min(len(data), 300 if rng.random() < 0.5 else len(data)))
    if action == 0:
        del data[at:]
    elif action == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif action == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 20))
    else:
        data[:8] = rng.choice([0, 1, 2**20, 2**31, 2**62, 2**63, 2**64 - 1]).to_bytes(8, "little")


def mutate(path: Path, rng: random.Random) -> None:
    name = rng.choice(["structlin.json"] * 4 + sorted(file.name for file in path.iterdir()))
    file = path / name
    action = rng.randrange(4)
    if action < 2 and name.endswith(".json"):
        edit(path, lambda document: mutate_json(document, rng), name)
    elif action < 2:
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        mutate_json(header, rng)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        if rng.random() < 0.5:  # an author who means it gives the right hash
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            edit(path, lambda document: document["shards"].update({name: digest}))
    elif action == 2:
        data = bytearray(file.read_bytes())
        mutate_bytes(data, rng)
        file.write_bytes(data)
    else:
        other = rng.choice(sorted(path.iterdir()))
        rng.choice([file.unlink, lambda: shutil.copy(file, other) if file != other else None])()


@pytest.mark.parametrize("shard_bytes", [2**30, 700], ids=["one file", "shards"])
def test_mutated_checkpoints_are_refused_or_right(shard_bytes: int, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, structured: bool) -> None:
            super().__init__()
            self.body = model() if structured else skeleton()
            self.body.append(LowRankLinear(4, 4, rank=2, dtype=torch.complex64) if structured else nn.Linear(4, 4))
            self.again = self.body[0]
            self.tied = nn.Linear(8, 4)
            self.tied.weight = self.body[3].weight

    expected = tensors_of(original := Model(structured=True))
    source = save(original, tmp_path / "source", max_shard_bytes=shard_bytes)
    target = Model(structured=False)
    before, modules = tensors_of(target), list(target.named_modules(remove_duplicate=False))
    rng = random.Random(shard_bytes)
    refused, slowest = 0, 0.0
    for _ in range(700):
        path = tmp_path / "out"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        mutate(path, rng)
        start = time.monotonic()
        try:
            found = load(target, path)
        except CheckpointError:
            refused += 1
            found = None
        slowest = max(slowest, time.monotonic() - start)
        if found is None:
            now = list(target.named_modules(remove_duplicate=False))
            assert all(a is b for (_, a), (_, b) in zip(now, modules, strict=True))
            assert_equal(tensors_of(target), before)
        else:
            assert_equal(tensors_of(found), expected)
            target = Model(structured=False)
            before, modules = tensors_of(target), list(target.named_modules(remove_duplicate=False))
    assert 500 <= refused < 700  # some are harmless: a byte of the version, say
    assert slowest < 5  # seconds; 0.01 where nothing else runs

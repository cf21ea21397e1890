"""Saving models whose tensors are subclasses: DTensors are gathered, all others refused; none is read by address."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import structlin
from structlin import LowRankLinear


class Wrapper(torch.Tensor):
    """A subclass without memory of its own, as quantisers make them: reading it by address ends the process."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        # What nn.Parameter and a gathering DTensor call (up to torch 2.6 it gathers on one process too).
        known = torch.ops.aten.detach.default, torch.ops.aten.view.default
        assert function in known or function.namespace == "_c10d_functional", function
        return cls(args[0].inner)


class Named(nn.Parameter):
    """Plain memory, but nobody can know."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LowRankLinear(4, 4, rank=1), nn.BatchNorm1d(4), nn.Linear(4, 4))


def skeleton() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("2.weight", nn.Parameter(Wrapper(torch.ones(4, 4))), "Wrapper"),
        ("0.left", nn.Parameter(Wrapper(torch.ones(4, 1))), "Wrapper"),
        ("1.running_mean", Wrapper(torch.ones(4)), "Wrapper"),
        ("2.bias", Named(torch.ones(4)), "Named"),
    ],
)
def test_other_subclasses_are_refused_and_nothing_is_written(name, tensor, kind, tmp_path: Path) -> None:
    bad = model()
    layer, _, attribute = name.partition(".")
    setattr(bad[int(layer)], attribute, tensor)
    message = f"tensor '{name}' is a {kind}; gather or dequantise it, only plain tensors are stored"
    with pytest.raises(structlin.CheckpointError, match=message):
        structlin.save(bad, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def freed() -> torch.Tensor:
    """As FSDP leaves parameters that other processes hold."""
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(12)
    return tensor


@pytest.mark.filterwarnings("ignore")  # prototypes say that they are
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (freed, "has no memory of its size, as weights that are sharded or offloaded; gather them before saving"),
        (cut, "has no memory of its size"),
        (lambda: torch._efficientzerotensor((4,)), "has no memory of its size"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is a nested tensor; pad it"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "is a NestedTensor; gather",
        ),
        (lambda: torch.eye(4).to_sparse(), "torch.sparse_coo; expected a dense tensor"),
        (lambda: torch.eye(4).to_sparse_csr(), "torch.sparse_csr; expected a dense tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "torch.qint8, torch.strided; expected"),
        (lambda: torch.empty(4, dtype=torch.uint1), "torch.uint1, torch.strided; expected a dense tensor"),
        (lambda: torch.ones(4, device="meta"), "is on the meta device; load values before saving"),
    ],
)
def test_tensors_without_plain_memory_are_refused(make, message: str, tmp_path: Path) -> None:
    bad = model()
    bad[2].register_buffer("scale", make())
    with pytest.raises(structlin.CheckpointError, match=f"tensor '2.scale' {message}|tensor '2.scale' is .*{message}"):
        structlin.save(bad, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(4.0).expand(3, 4),
        torch.arange(64.0).view(8, 8)[::2, 1::3],
        torch.arange(9.0).as_strided((4, 4), (1, 1)),
        torch.arange(6.0).view(2, 3).mT,
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        torch.arange(9.0)[5:],
        torch.zeros(3, 0),
    ],
    ids=["expanded", "strided", "overlapping", "transposed", "conjugate", "negative", "offset", "empty"],
)
def test_tensors_of_any_strides_are_stored_by_value(tensor: torch.Tensor, tmp_path: Path) -> None:
    original, target = model(), skeleton()
    original[2].register_buffer("scale", tensor)
    original[2].register_buffer("view", tensor[:1])  # of the same memory: stored by itself
    target[2].register_buffer("scale", torch.empty_like(tensor))
    target[2].register_buffer("view", torch.empty_like(tensor[:1]))
    found = structlin.load(target, structlin.save(original, tmp_path / "out"))
    assert torch.equal(found[2].scale, tensor)
    assert torch.equal(found[2].view, tensor[:1])
    assert found[2].scale.is_contiguous()


def test_parameters_and_buffers_are_plain(tmp_path: Path) -> None:
    plain = model()
    plain[2].register_buffer("scale", nn.Buffer(torch.ones(2)))
    assert structlin.verify(structlin.save(plain, tmp_path / "out")).parameters == 12 + 17 + 20 + 2


# DTensor -------------------------------------------------------------------------------------------------------------


def distributed(plain: nn.Module) -> nn.Module:
    """Shard all parameters, as FSDP2 does, and tie nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in plain.modules():
        for key, parameter in module._parameters.items():
            module._parameters[key] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
    return plain


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_dtensors_are_gathered(tmp_path: Path) -> None:
    expected = model().state_dict()
    original = distributed(model())
    original[2].bias = original[0].bias  # stays tied
    found = structlin.load(skeleton(), structlin.save(original, tmp_path / "out"))
    assert found[2].bias is found[0].bias
    for name, tensor in found.state_dict().items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, expected["0.bias" if name == "2.bias" else name]), name
    assert type(original[0].left).__name__ == "DTensor"


@pytest.mark.usefixtures("group")
def test_dtensors_without_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(structlin.CheckpointError, match=r"tensor '0\.left' is on the meta device; load values"):
        structlin.save(distributed(model().to("meta")), tmp_path / "out")
    original = distributed(model())
    original[1].weight._local_tensor = Wrapper(torch.ones(4))
    with pytest.raises(structlin.CheckpointError, match=r"tensor '1\.weight' is a Wrapper; gather or dequantise"):
        structlin.save(original, tmp_path / "out")


def _save_as_one_of_two(rank: int, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(path / "store"), 2), rank=rank, world_size=2)
    returned = structlin.save(distributed(model()), path / "out")
    assert returned == path / "out"
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_process_0_writes_what_all_processes_hold(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["structlin.checkpoint"])
    processes = [context.Process(target=_save_as_one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = model().state_dict()
    for name, tensor in structlin.load(skeleton(), tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, expected[name]), name

"""The one writer of safetensors files: every dtype, what it refuses, and files of before it was shared."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import structlin
from structlin.checkpoint.tensors import COMPLEX, DTYPES, read_safetensors, write_safetensors

OLD = Path(__file__).parent / "written_by_0_1"


class Quantised(torch.Tensor):
    """A subclass, as quantisers and DTensor make them."""


def content(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_every_dtype_keeps_its_bits(tmp_path):
    raw = torch.arange(64, dtype=torch.uint8)
    tensors = {name: (raw % 2 if name == "BOOL" else raw).view(dtype) for name, dtype in DTYPES.items()}
    tensors |= {str(dtype): raw.view(dtype) for dtype in COMPLEX.values()}
    tensors |= {"conjugate": raw.view(torch.complex64).conj(), "strided": torch.arange(6.0).view(2, 3).mT}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.zeros(0, 2), "expanded": torch.ones(1).expand(3)}
    digest = write_safetensors(tmp_path / "all", tensors, {"a": "text"})
    assert digest == hashlib.sha256((tmp_path / "all").read_bytes()).hexdigest()
    found, metadata = read_safetensors(tmp_path / "all")
    assert metadata == {"a": "text"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        assert (found[name].shape, found[name].dtype) == (plain.shape, plain.dtype)
        assert torch.equal(content(found[name]), content(plain)), name


def test_tensors_are_aligned_to_their_items(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(3, dtype=torch.complex64), "c": torch.ones(1)}
    write_safetensors(tmp_path / "file", {**tensors, "d": torch.ones(1, dtype=torch.float64)}, {})
    size = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert size % 8 == 0
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert list(file.offset_keys()) == ["d", "b", "c", "a"]


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.ones(2).as_subclass(Quantised), "tensor 'x' is a Quantised; gather or dequantise it"),
        (nn.Parameter(torch.ones(2).as_subclass(Quantised)), "tensor 'x' is a Quantised"),
        (torch.ones(2, device="meta"), "tensor 'x' is on the meta device"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo; expected a dense"),
        (torch.ones(2).to(torch.float8_e4m3fnuz), "tensor 'x' is torch.float8_e4m3fnuz"),
        (nn.UninitializedParameter(), "tensor 'x' is not initialised"),
    ],
)
def test_what_is_not_a_plain_dense_tensor_is_refused(tensor, text, tmp_path):
    with pytest.raises(structlin.CheckpointError, match=text):
        write_safetensors(tmp_path / "file", {"good": torch.ones(1), "x": tensor}, {})
    assert list(tmp_path.iterdir()) == []


def test_files_written_before_the_writer_was_shared_still_load():
    skeleton = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64), nn.Linear(3, 4, bias=False))
    skeleton.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
    model = structlin.load(skeleton, OLD / "model")
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(values.real, torch.arange(len(values), dtype=torch.float32))
    assert torch.equal(model[0].left.imag, model[0].left.real / 2)
    assert model.flags.tolist() == [True, False]
    statistics = structlin.Statistics.load(OLD / "statistics.safetensors")
    assert statistics.grams["q"] is statistics.grams["k"]
    assert torch.equal(statistics.grams["q"], torch.tensor([[2, 1j], [-1j, 3]]))
    assert torch.equal(statistics.grams["v"], torch.eye(3, dtype=torch.float64))
    assert statistics.tokens == {"q": 5, "k": 5, "v": 7}
    assert statistics.output_grams["v"].tolist() == [1, 2]

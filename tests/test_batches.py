"""Running models: kinds of batches, where they go, evaluation mode, and the tensor that represents an output."""

from collections import UserDict, namedtuple
from contextlib import suppress
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from structlin.batches import copied, device_of, evaluating, pick, progress_bar, run, to_device, unmasked

Pair = namedtuple("Pair", ["x", "y"])
META = torch.device("meta")
X, Y = torch.arange(3.0), torch.ones(3)


class Minus(nn.Module):
    def forward(self, x, y):
        return x - y


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Pair(X, Y), {"y": Y, "x": X}, UserDict(x=X, y=Y)])
def test_batches_are_called_by_position_or_by_keyword(batch):
    assert torch.equal(run(Minus(), batch), X - Y)
    assert run(Minus(), batch, lambda model, given: (model, given))[1] is batch


def test_tensors_and_packed_sequences_are_the_only_argument():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    assert run(nn.Identity(), X) is X
    assert run(nn.Identity(), packed) is packed
    with pytest.raises(TypeError, match=r"a batch is a str; use a mapping, .* or pass forward="):
        run(nn.Identity(), "text")


class Fields(dict):
    """A mapping whose items are attributes, as those of transformers' BatchEncoding are."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("change", [copied, lambda batch: to_device(batch, torch.device("cpu"))])
def test_mappings_keep_their_type(change):
    batch = Fields(x=X, inner=UserDict(y=Y), fixed=MappingProxyType({"x": X}))
    found = change(batch)
    assert torch.equal(found.x, X)
    assert torch.equal(found.inner["y"], Y)
    assert [type(value) for value in (found, found.inner, found.fixed)] == [Fields, UserDict, dict]
    found["x"] = found.inner["y"] = None
    assert batch.x is X
    assert batch.inner["y"] is Y


def test_tensors_inside_a_batch_are_moved():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    batch = {"pair": Pair(X, [Y, "text"]), "size": X.shape, "packed": packed, "user": UserDict(x=X)}
    moved = to_device(batch, META)
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].x.device == moved["pair"].y[0].device == moved["user"]["x"].device == META
    assert moved["packed"].data.device == META
    assert moved["pair"].y[1] == "text"
    assert moved["size"] == (3,)
    stays = to_device(batch, None)
    assert stays["pair"].x is X
    assert stays["packed"] is packed


def test_device_of_parameters_or_buffers():
    model = nn.Module()
    assert device_of(model) is None
    model.register_buffer("scale", torch.ones(1, device=META))
    assert device_of(model) == META


def test_masked_positions_are_left_out():
    mask = {"attention_mask": torch.tensor([[1, 0], [1, 1]])}
    x = torch.arange(8.0).view(2, 2, 2)
    assert unmasked(x, mask).tolist() == [[0, 1], [4, 5], [6, 7]]
    for tensor, batch in ((x, None), (x[:, 0], mask), (x[:, :1], mask), (x, {"attention_mask": None})):
        assert unmasked(tensor, batch) is tensor


def test_evaluation_mode_ends_with_the_flags_of_before():
    first, second = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.Dropout()
    first[0].eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    for error in (None, KeyError("in the middle")):
        with suppress(KeyError), evaluating(first, second):
            assert not any(module.training for module in (*first.modules(), second))
            assert not torch.backends.mha.get_fastpath_enabled()
            if error:
                raise error
        assert (first.training, first[0].training, first[1].training, second.training) == (True, False, True, True)
        assert torch.backends.mha.get_fastpath_enabled() == fast


def test_the_tensor_of_an_output():
    output = {"loss": X.sum(), "ids": X.long(), "hidden": Y}
    assert pick(X) == ("output", X)
    assert pick(output) == ("output", Y)
    assert pick({**output, "last_hidden_state": X}) == ("last_hidden_state", X)
    assert pick(UserDict(output, last_hidden_state=Y, logits=X)) == ("logits", X)
    with pytest.raises(TypeError, match="an output is a list without a float tensor in it; pass loss="):
        pick([X.long(), "text"])


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    for progress in (False, None):  # None: stderr is no terminal here
        with progress_bar("fit", "layer", 3, progress) as advance:
            advance(3)
    assert capsys.readouterr().err == ""
    with progress_bar("fit", "layer", 3, True) as advance:
        advance(2)
        advance(text="loss 1")
    assert "3/3" in (text := capsys.readouterr().err)
    assert "loss 1" in text

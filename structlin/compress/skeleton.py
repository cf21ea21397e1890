"""A model whose blocks have no values: give some to a part and take them away, and run the model around its blocks."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from structlin.checkpoint._skeleton import Slot, by_first_name, slots_of
from structlin.compress.blocks import Chain, Shelf
from structlin.compress.observe import replaced
from structlin.compress.patched import Run

# Returns the stored values of tensors of the model by name.
Read = Callable[[Sequence[str]], Mapping[str, Tensor]]

# Values --------------------------------------------------------------------------------------------------------------


def slots_in(name: str, block: nn.Module) -> list[Slot]:
    """Return the parameters and persistent buffers of a block, under its name in the model."""
    return list(slots_of(block.named_modules(prefix=name, remove_duplicate=False)))


def has_values(block: nn.Module) -> bool:
    """Whether no parameter is on the meta device."""
    return not any(parameter.is_meta for parameter in block.parameters())


def fill(slots: Iterable[Slot], read: Read) -> None:
    """Give those that have none their values."""
    slots = [slot for slot in slots if slot.tensor.is_meta]
    tensors, _ = by_first_name((slot.name, slot.tensor) for slot in slots)
    values = read(list(tensors))
    _assign(slots, {id(tensor): values[name] for name, tensor in tensors.items()})


def empty(slots: Iterable[Slot]) -> None:
    """Free the values."""
    slots = list(slots)
    _assign(slots, {id(slot.tensor): slot.tensor.detach().to("meta") for slot in slots})


def give_back() -> None:
    """Return freed memory to the system, where the C library can: else pieces between live ones add up over blocks."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it
        trim(0)


def _assign(slots: Sequence[Slot], values: Mapping[int, Tensor]) -> None:
    """Give tensors new values, and those that were one stay one."""
    new = {
        id(slot.tensor): nn.Parameter(values[id(slot.tensor)], requires_grad=slot.tensor.requires_grad)
        if isinstance(slot.tensor, nn.Parameter)
        else values[id(slot.tensor)]
        for slot in slots
    }
    for slot in slots:
        setattr(slot.module, slot.attribute, new[id(slot.tensor)])


def check_apart(model: nn.Module, chains: Sequence[Chain]) -> None:
    """Refuse weights that several parts share: they would be needed when the first of these is freed."""
    part = {module: name for chain in chains for name, block in chain for module in block.modules()}
    owners: dict[int, tuple[str, str]] = {}
    for slot in slots_of(model.named_modules(remove_duplicate=False)):
        mine = part.get(slot.module, "")
        home, first = owners.setdefault(id(slot.tensor), (mine, slot.name))
        if home != mine:
            raise ValueError(
                f"{first!r} and {slot.name!r} are one weight, of different blocks, which cannot be opened one at a "
                "time; compress the model in memory"
            )


# Stand-ins -----------------------------------------------------------------------------------------------------------


class StandIns:
    """Let blocks without values answer with the hidden state that they get, so that a model runs around its chains.

    The first block of a chain computes while it has values: what its output is beside the hidden state (a tuple with
    a position bias, say), the answers of all others are too.

    Args:
        chains: of the model.
    Attributes:
        ends: number of a chain that is done -> its true hidden states by batch, dense and drifted: its last answer.
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.chains = chains
        self.ends: dict[int, tuple[Shelf, Shelf]] = {}
        self.beside: dict[int, tuple[Any, ...] | None] = {}

    def run(self, behind: bool, batch: int, go: Run) -> Any:
        """Run the model on a batch; `behind` tells whether compressed layers answer."""
        answers: dict[nn.Module, nn.Module] = {}
        handles = []
        for number, chain in enumerate(self.chains):
            # What is beside hidden states may depend on the batch; where nothing is, blocks need not run again.
            runs = has_values(chain[0][1]) and bool(self.beside.get(number, True))
            if runs:
                handles.append(chain[0][1].register_forward_hook(partial(self._note, number)))
            for position, (_, block) in enumerate(chain):
                last = position == len(chain) - 1 and number in self.ends
                end = self.ends[number][behind][batch] if last else None
                if position or not runs:
                    answers[block] = _StandIn(partial(self._answer, number, end))
        try:
            with replaced(answers):
                return go()
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, number: int, _module: nn.Module, _args: Any, output: Any) -> None:
        self.beside[number] = output[1:] if isinstance(output, tuple) else None

    def _answer(self, number: int, end: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        states = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
        hidden = next(states, None)
        if end is not None and hidden is not None:
            hidden = end.to(hidden)
        beside = self.beside[number]
        return hidden if beside is None else (hidden, *beside)


class _StandIn(nn.Module):
    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)

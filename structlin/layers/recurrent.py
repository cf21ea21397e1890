"""LSTM and GRU with structured maps: the input's products of all time steps in one call, then the steps in turn."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Self

from structlin.equation.structure import Structure
from structlin.fitting.fit import Families
from structlin.layers.linear import StructuredLinear, build

Map = nn.Linear | StructuredLinear
State = tuple[Tensor, ...]  # the hidden state, and an LSTM's cell state, (batch, hidden)
R = TypeVar("R", nn.LSTM, nn.GRU)


class _Recurrent(nn.Module, ABC):
    """Run cells over time, layer by layer and in one or two directions; the maps are `ih_l0`, `hh_l0`, ..."""

    kind: ClassVar[type[nn.RNNBase]]  # torch's
    gates: ClassVar[int]
    states: ClassVar[int]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, *, structure: Structure | None = None,
        hidden_structure: Structure | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional, self.proj_size = batch_first, dropout, bidirectional, 0
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for layer in range(num_layers):
            size = hidden_size * (1 + bidirectional) if layer else input_size
            for suffix in self.suffixes(layer):
                for side, columns, chosen in (("ih", size, structure), ("hh", hidden_size, hidden_structure)):
                    sizes = columns, self.gates * hidden_size
                    made: Map = (
                        nn.Linear(*sizes, bias, **options) if chosen is None else build(chosen, *sizes, bias, **options)
                    )
                    setattr(self, f"{side}_{suffix}", made)

    def suffixes(self, layer: int) -> list[str]:
        """Return the names of a layer's directions, as torch writes them."""
        return [f"l{layer}", f"l{layer}_reverse"][: 1 + self.bidirectional]

    @property
    def names(self) -> list[str]:
        """The names of all maps, layer by layer."""
        return [f"{side}_{s}" for k in range(self.num_layers) for s in self.suffixes(k) for side in ("ih", "hh")]

    @classmethod
    def _from(
        cls, rnn: nn.RNNBase, structure: Structure | Families | None, hidden: Structure | Families | None,
        ratio: float | None, refine: int | None,
    ) -> Self:  # fmt: skip
        """Open a network of torch: `nn.Linear` maps share its parameters; with a structure, decompose them."""
        if not isinstance(rnn, cls.kind):
            name = cls.kind.__name__
            raise TypeError(f"from_{name.lower()} takes an nn.{name}, not {type(rnn).__name__}")
        if getattr(rnn, "proj_size", 0):
            raise ValueError(f"proj_size={rnn.proj_size}; projections of the hidden state have no form here")
        opened = cls(
            rnn.input_size, rnn.hidden_size, rnn.num_layers, rnn.bias, rnn.batch_first, rnn.dropout, rnn.bidirectional,
            device="meta",
        )  # fmt: skip
        for name in opened.names:
            linear = getattr(opened, name)
            linear.weight = getattr(rnn, f"weight_{name}")
            if rnn.bias:
                linear.bias = getattr(rnn, f"bias_{name}")
            chosen = structure if name.startswith("ih") else hidden
            if structure is None and hidden is None:
                continue
            if chosen is None:
                found = copy.deepcopy(linear)
            else:
                each = None if isinstance(chosen, Structure) else ratio
                found = StructuredLinear.from_linear(linear, structure=chosen, ratio=each, refine=refine)
            setattr(opened, name, found)
        return opened.train(rnn.training)

    def _merged(self, shell: R) -> R:
        """Merge into a copy of a torch network, whose own parameters are not read (they may be on the meta device)."""
        rnn = copy.deepcopy(shell)
        for name in self.names:
            linear = getattr(self, name)
            linear = linear.to_linear() if isinstance(linear, StructuredLinear) else linear
            setattr(rnn, f"weight_{name}", linear.weight)
            if rnn.bias:
                setattr(rnn, f"bias_{name}", linear.bias)
        return rnn.train(self.training)

    def flatten_parameters(self) -> None:
        """Do nothing: models call it to pack the weights of torch's networks for cuDNN."""

    # The forward pass ------------------------------------------------------------------------------------------------

    def _run(self, x: Tensor | PackedSequence, start: State | None) -> tuple[Tensor | PackedSequence, State]:
        """Return the outputs in the form of the input, and the last states (layers x directions, batch, hidden)."""
        shape: tuple[int, ...] = ()
        if isinstance(x, PackedSequence):
            rows, sizes, batched = x.data, x.batch_sizes.tolist(), True
            count = sizes[0]
        else:
            batched = x.ndim == 3
            if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
                axes = "batch, time" if self.batch_first else "time, batch"
                raise ValueError(
                    f"input has shape {tuple(x.shape)}; it must be ({axes}, {self.input_size}) or (time, "
                    f"{self.input_size})"
                )
            ordered = (x.transpose(0, 1) if self.batch_first else x) if batched else x.unsqueeze(1)
            shape = steps, count = tuple(ordered.shape[:2])
            rows, sizes = ordered.reshape(steps * count, self.input_size), [count] * steps
        states = self._start(rows, count, start, batched, x)
        ends: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                rows = F.dropout(rows, self.dropout)
            outputs = []
            for suffix in self.suffixes(layer):
                mine = tuple(state[len(ends)] for state in states)
                hidden, end = self._direction(suffix, rows, sizes, mine)
                outputs.append(hidden)
                ends.append(end)
            rows = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        last = tuple(torch.stack([end[k] for end in ends]) for k in range(self.states))
        if isinstance(x, PackedSequence):
            if x.unsorted_indices is not None:
                last = tuple(state.index_select(1, x.unsorted_indices) for state in last)
            return PackedSequence(rows, x.batch_sizes, x.sorted_indices, x.unsorted_indices), last
        y = rows.reshape(*shape, rows.shape[-1])
        if not batched:
            return y.squeeze(1), tuple(state.squeeze(1) for state in last)
        return (y.transpose(0, 1) if self.batch_first else y), last

    def _start(
        self, rows: Tensor, batch: int, start: State | None, batched: bool, x: Tensor | PackedSequence
    ) -> State:  # fmt: skip
        shape = (self.num_layers * (1 + self.bidirectional), batch, self.hidden_size)
        if start is None:
            return tuple(rows.new_zeros(shape) for _ in range(self.states))
        states = tuple(start) if batched else tuple(state.unsqueeze(1) for state in start)
        if len(states) != self.states or any(state.shape != shape for state in states):
            shapes = [tuple(state.shape) for state in states]
            raise ValueError(f"{len(states)} states of shapes {shapes}; {self.states} of shape {shape} are needed")
        if isinstance(x, PackedSequence) and x.sorted_indices is not None:
            states = tuple(state.index_select(1, x.sorted_indices) for state in states)
        return states

    def _direction(
        self, suffix: str, rows: Tensor, sizes: Sequence[int], state: State
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Run one direction of a layer over rows of all time steps, `sizes` of them in each: those not yet ended."""
        hidden_map: Callable[[Tensor], Tensor] = getattr(self, f"hh_{suffix}")
        inputs = getattr(self, f"ih_{suffix}")(rows).split(list(sizes))
        backward = suffix.endswith("reverse")
        outputs: list[Tensor] = []
        for step in reversed(range(len(sizes))) if backward else range(len(sizes)):
            size = sizes[step]
            now = state if size == state[0].shape[0] else tuple(part[:size] for part in state)
            found = self._cell(inputs[step], hidden_map(now[0]), now)
            outputs.append(found[0])
            # Sequences that have ended, or not begun from behind, keep their states.
            full = now is state
            state = found if full else tuple(torch.cat([a, b[size:]]) for a, b in zip(found, state, strict=True))
        if not outputs:
            return rows.new_zeros(0, self.hidden_size), state
        return torch.cat(outputs[::-1] if backward else outputs), state

    @abstractmethod
    def _cell(self, given: Tensor, recurrent: Tensor, state: State) -> State:
        """Compute the next states from the products with the inputs and with the hidden state."""

    def extra_repr(self) -> str:
        """Sizes and directions."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}, "
            f"bidirectional={self.bidirectional}"
        )


class StructuredLSTM(_Recurrent):
    """Compute what `nn.LSTM` computes, with a structured matrix from the inputs to the gates.

    c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c'), with (i, f, g, o) = W x + b + V h + d. W x of all
    time steps is one product; V h follows step by step. The maps are the attributes `ih_l0` (W), `hh_l0` (V),
    `ih_l0_reverse`, ...

    Cost: the parameters of W's structure, and 4 hidden^2 for V unless it is structured too. The entries of W are
    drawn for the number of inputs, as in `nn.Linear`; `nn.LSTM` draws them for the hidden size, too large for many
    inputs.

    Args:
        input_size: as for `nn.LSTM`, as hidden_size, num_layers, bias, batch_first, dropout and bidirectional are.
        structure: of W in every layer; open fields are filled in. None is dense.
        hidden_structure: of V.
    Raises:
        ValueError: if a structure does not fit the sizes.
    Source: Hochreiter & Schmidhuber 1997; Yang, Krompass & Tresp 2017, Tensor-train recurrent neural networks.
    Example:
        >>> from structlin.structures import TensorTrain
        >>> tt = TensorTrain(rank=4, in_modes=(8, 20, 20, 18), out_modes=(16, 2, 2, 16))
        >>> lstm = StructuredLSTM(57600, 256, structure=tt)
        >>> lstm.ih_l0.num_parameters
        2944
    """

    kind, gates, states = nn.LSTM, 4, 2

    @classmethod
    def from_lstm(
        cls, lstm: nn.LSTM, *, structure: Structure | Families | None = None,
        hidden_structure: Structure | Families | None = None, ratio: float | None = None, refine: int | None = None,
    ) -> Self:  # fmt: skip
        """Decompose the weights of a trained `nn.LSTM`, which is not changed.

        Args:
            lstm: the dense network, without a projection.
            structure: of the maps from the inputs, as for `StructuredLinear.from_linear`; None leaves them dense.
            hidden_structure: of the maps from the hidden state, likewise. Without both the network is only opened: its
                maps are `nn.Linear` modules that share the parameters.
            ratio: parameters kept / dense parameters of a map, for a class or a family.
            refine: steps of refinement.
        Raises:
            TypeError: if it is no `nn.LSTM`.
            ValueError: if it has a projection, or a structure does not fit.
        """
        return cls._from(lstm, structure, hidden_structure, ratio, refine)

    def to_lstm(self, shell: nn.LSTM) -> nn.LSTM:
        """Merge into a copy of a dense network, whose own parameters are not read."""
        return self._merged(shell)

    def forward(
        self, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, State]:  # fmt: skip
        """Run over (time, batch, input), (batch, time, input) with batch_first, (time, input) or packed sequences.

        Args:
            x: the inputs.
            hx: hidden and cell states to begin from, each (layers x directions, batch, hidden); None is zero.
        Returns:
            The hidden states of the last layer at all times, in the form of the input, and the last states.
        Raises:
            ValueError: if a shape does not fit.
        """
        return self._run(x, hx)

    def _cell(self, given: Tensor, recurrent: Tensor, state: State) -> State:
        i, f, g, o = (given + recurrent).chunk(4, -1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class StructuredGRU(_Recurrent):
    """Compute what `nn.GRU` computes, with a structured matrix from the inputs to the gates.

    h' = (1 - z) n + z h, with z = sigmoid(W_z x + V_z h), r = sigmoid(W_r x + V_r h), n = tanh(W_n x + r (V_n h)), each
    product with its bias. Maps, arguments and cost are as in `StructuredLSTM`, with three gates.

    Args:
        input_size: as for `nn.GRU`, as hidden_size, num_layers, bias, batch_first, dropout and bidirectional are.
        structure: of W in every layer; open fields are filled in. None is dense.
        hidden_structure: of V.
    Raises:
        ValueError: if a structure does not fit the sizes.
    Source: Cho et al. 2014.
    Example:
        >>> from structlin.structures import LowRank
        >>> gru = StructuredGRU(64, 32, structure=LowRank(rank=4))
        >>> gru(torch.zeros(5, 2, 64))[0].shape
        torch.Size([5, 2, 32])
    """

    kind, gates, states = nn.GRU, 3, 1

    @classmethod
    def from_gru(
        cls, gru: nn.GRU, *, structure: Structure | Families | None = None,
        hidden_structure: Structure | Families | None = None, ratio: float | None = None, refine: int | None = None,
    ) -> Self:  # fmt: skip
        """Decompose the weights of a trained `nn.GRU`; see `StructuredLSTM.from_lstm`.

        Raises:
            TypeError: if it is no `nn.GRU`.
            ValueError: if a structure does not fit.
        """
        return cls._from(gru, structure, hidden_structure, ratio, refine)

    def to_gru(self, shell: nn.GRU) -> nn.GRU:
        """Merge into a copy of a dense network, whose own parameters are not read."""
        return self._merged(shell)

    def forward(
        self, x: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:  # fmt: skip
        """Run over time; inputs and states are as in `StructuredLSTM.forward`, without a cell state."""
        y, (last,) = self._run(x, None if hx is None else (hx,))
        return y, last

    def _cell(self, given: Tensor, recurrent: Tensor, state: State) -> State:
        r, z, n = given.chunk(3, -1)
        recurrent_r, recurrent_z, recurrent_n = recurrent.chunk(3, -1)
        update = torch.sigmoid(z + recurrent_z)
        new = torch.tanh(n + torch.sigmoid(r + recurrent_r) * recurrent_n)
        (hidden,) = state
        # Under autocast the gates are in low precision and the state is not.
        return (torch.lerp(new.to(hidden.dtype), hidden, update.to(hidden.dtype)),)

"""Split a model into the blocks of its chains of repeated modules, and carry hidden states from block to block."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin.batches import cast_to
from structlin.compress.observe import run_until
from structlin.compress.patched import Pass, Patched, Run, model_passes, without_cache
from structlin.compress.targets import Target

LIMIT = 1 << 30  # bytes of hidden states in memory; more are mapped from a file


@dataclass(frozen=True)
class Part:
    """What is compressed as one: a block of a chain, or layers outside of all chains.

    Args:
        name: dotted name of the block; empty for the whole model.
        module: what runs: the block, or the model.
        targets: its layers, in module order.
        passes: one for each calibration batch; none without calibration.
        own: parameters of the block that nothing outside of it uses; empty for layers outside of chains, which are
            refined from end to end only.
    """

    name: str
    module: nn.Module
    targets: tuple[Target, ...]
    passes: tuple[Pass, ...]
    own: frozenset[nn.Parameter]


Chain = Sequence[tuple[str, nn.Module]]

# Chains --------------------------------------------------------------------------------------------------------------


def find_chains(model: nn.Module, names: Sequence[str] | None = None) -> list[Chain]:
    """Find the lists of two or more modules of one type (a decoder's layers, say) that lie in no other such list.

    Args:
        model: any module.
        names: globs, each for the blocks of one chain; None searches.
    Raises:
        ValueError: if a glob matches fewer than two modules.
    """
    if names is not None:
        chains: list[Chain] = []
        for pattern in names:
            chain = [(name, module) for name, module in model.named_modules() if name and fnmatchcase(name, pattern)]
            inside = tuple(f"{name}." for name, _ in chain)
            chain = [(name, module) for name, module in chain if not name.startswith(inside)]
            if len(chain) < 2:
                raise ValueError(f"blocks: {pattern!r} matches {len(chain)} modules; a chain has two or more")
            chains.append(chain)
        return chains
    found: list[Chain] = []
    taken: tuple[str, ...] = ()
    for name, module in model.named_modules():
        blocks = list(module.named_children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        alike = len(blocks) > 1 and len({type(block) for _, block in blocks}) == 1
        if alike and all(any(True for _ in block.children()) for _, block in blocks) and not name.startswith(taken):
            prefix = f"{name}." if name else ""
            found.append([(f"{prefix}{key}", block) for key, block in blocks])
            taken = (*taken, prefix)
    return found


# Hidden states -------------------------------------------------------------------------------------------------------


class Shelf:
    """Keep one tensor for each batch: in memory, or in files once there are many, mapped while one is in use."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._bytes = limit, 0
        self._tensors: dict[int, Callable[[], Tensor]] = {}
        self._folder: Path | None = None

    def __getitem__(self, number: int) -> Tensor:
        return self._tensors[number]()

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        known = self[number] if number in self._tensors else None
        if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
            known.copy_(tensor)
            return
        self._bytes += tensor.nbytes
        if self._bytes > self._limit:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="structlin-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self._tensors[number] = partial(_mapped, self._folder / str(number), tensor.shape, tensor.dtype)
            self[number].copy_(tensor)
        else:
            kept = tensor.clone()
            self._tensors[number] = lambda: kept


def _mapped(path: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Map a file, which is made where there is none; its pages count as memory as long as the tensor lives."""
    return torch.from_file(str(path), shared=True, size=shape.numel(), dtype=dtype).view(shape)


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state in what a block returns: the tensor, or the first of a tuple."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


@dataclass
class _Call:
    """The arguments of one call of a block: a hidden state in the place `key`, and what other blocks share."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        args, kwargs = list(self.args), dict(self.kwargs)
        like = next(block.parameters(), hidden)
        if (like.device, like.dtype) != (hidden.device, hidden.dtype):  # a block of a streamed model, opened elsewhere
            args, kwargs, hidden = cast_to(args, like), cast_to(kwargs, like), hidden.to(like)
        if isinstance(self.key, int):
            args[self.key] = hidden
        else:
            kwargs[self.key] = hidden
        return hidden_of(block(*args, **kwargs))


@dataclass
class _Recording:
    """All calls of a chain's blocks in one pass, and whether each got what the one before it returned."""

    calls: list[_Call] = field(default_factory=list)
    blocks: list[nn.Module] = field(default_factory=list)
    start: Tensor | None = None
    last: Tensor | None = None
    linked: bool = True

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        places = [*enumerate(args), *kwargs.items()]
        key = next((place for place, value in places if isinstance(value, Tensor) and value.is_floating_point()), None)
        if key is None:
            self.linked = False
            return
        hidden = dict(places)[key]
        if self.calls:
            self.linked &= hidden is self.last
        else:
            self.start = hidden.detach().clone()
        blank = tuple(None if place == key else value for place, value in enumerate(args))
        self.calls.append(_Call(blank, {name: value for name, value in kwargs.items() if name != key}, key))
        self.blocks.append(module)

    def after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        self.linked &= isinstance(first, Tensor)
        self.last = first


def record(chain: Chain, go: Run, stop: bool = False) -> _Recording | None:
    """Run a model and record the calls of a chain; None if its blocks do not run once each, one after the other.

    With `stop` the model runs up to the last block only.
    """
    found, handles = _Recording(), []
    for _, block in chain:
        handles.append(block.register_forward_pre_hook(found.before, with_kwargs=True))
        handles.append(block.register_forward_hook(found.after))
    try:
        run_until(go, {chain[-1][1]: None}, lambda *_: None, stop)
    finally:
        for handle in handles:
            handle.remove()
    return found if found.linked and found.blocks == [block for _, block in chain] else None


class Stream:
    """The hidden states at one block of a chain for every batch: dense, and behind the compressed layers.

    Args:
        patched: the model.
        chain: the blocks.
        runs: each runs the model on one batch.
        drifted: the same for the compressed model; None where both run alike.
    """

    def __init__(
        self, patched: Patched, chain: Chain, runs: Sequence[Run], drifted: Sequence[Run] | None = None,
        limit: int = LIMIT,
    ) -> None:  # fmt: skip
        self.patched, self.chain = patched, chain
        self.dense, self.drifted = Shelf(limit), Shelf(limit)
        self.calls: list[tuple[list[_Call], list[_Call]]] = []  # by batch: dense, drifted
        for number, (go, behind) in enumerate(zip(runs, drifted or runs, strict=True)):
            with torch.no_grad():
                with patched.dense():
                    dense = record(chain, go, stop=True)
                with patched.changed():
                    moved = record(chain, behind, stop=True)
            if dense is None or moved is None:
                raise ValueError(
                    f"blocks {chain[0][0]!r} to {chain[-1][0]!r} run one after the other in the first batch, but not "
                    f"in batch {number}; name others in blocks=, or pass blocks=[] to do without"
                )
            assert dense.start is not None
            assert moved.start is not None
            self.dense[number], self.drifted[number] = dense.start, moved.start
            self.calls.append((dense.calls, moved.calls))

    def passes(self, position: int, masks: Sequence[Tensor | None]) -> tuple[Pass, ...]:
        """Return the passes of the block at a position."""
        block = self.chain[position][1]

        def dense(number: int) -> Tensor:
            with self.patched.dense():
                return self.calls[number][0][position](block, self.dense[number])

        def drifted(number: int) -> Tensor:
            with self.patched.changed():
                return self.calls[number][1][position](block, self.drifted[number])

        return tuple(Pass(partial(dense, n), partial(drifted, n), keep) for n, keep in enumerate(masks))

    def advance(self, passes: Sequence[Pass]) -> None:
        """Replace the hidden states by what the block of the passes makes of them, in the dtype of the model's own."""
        with torch.no_grad():
            for number, each in enumerate(passes):
                for shelf, run in ((self.dense, each.dense), (self.drifted, each.drifted)):
                    shelf[number] = run().to(shelf[number].dtype)  # a streamed block may run in a wider one


# Parts ---------------------------------------------------------------------------------------------------------------


def parts(
    patched: Patched,
    targets: Sequence[Target],
    chains: Sequence[Chain],
    runs: Sequence[Run],
    masks: Sequence[Tensor | None],
) -> Generator[Part, None, None]:
    """Yield the parts of a model in the order in which they run; each is to be compressed before the next is asked for.

    Time: for each chain two runs over all batches, and two of each block. What is no chain when the model runs on the
    first batch (each block once, on what the one before it returned) is left to the parts outside.

    Args:
        patched: the model; what is compressed goes into it.
        targets: to compress, in module order, which is taken for the order in which they run.
        chains: of `find_chains`.
        runs: each runs the model on one batch; none without calibration.
        masks: which tokens of each batch count.
    """
    model = patched.model

    def uses(module: nn.Module) -> Counter[nn.Parameter]:  # a module that two blocks share counts twice
        every = (part for _, part in module.named_modules(remove_duplicate=False))
        return Counter(p for part in every for p in part._parameters.values() if p is not None)

    owners = uses(model)

    def own(module: nn.Module) -> frozenset[nn.Parameter]:
        return frozenset(p for p, count in uses(module).items() if owners[p] == count)

    with without_cache(model):
        with torch.no_grad(), patched.dense():
            chains = [chain for chain in chains if runs and record(chain, runs[0]) is not None]
        for number, position, members in split(targets, chains):
            if number is None:
                whole = own(model) if len(members) == len(targets) else frozenset()
                yield Part("", model, tuple(members), model_passes(patched, runs, masks), whole)
                continue
            name, block = chains[number][position]
            if position == 0:
                stream = Stream(patched, chains[number], runs)
            passes = stream.passes(position, masks)
            if members:
                yield Part(name, block, tuple(members), passes, own(block))
            if position + 1 < len(chains[number]):
                stream.advance(passes)


def split(targets: Sequence[Target], chains: Sequence[Chain]) -> list[tuple[int | None, int, list[Target]]]:
    """Sort targets into blocks: (chain, position, targets), and (None, 0, targets) for those between chains.

    A weight that modules of several blocks share lies outside.
    """
    place: dict[nn.Module, tuple[int, int]] = {}
    for number, chain in enumerate(chains):
        for position, (_, block) in enumerate(chain):
            place |= dict.fromkeys(block.modules(), (number, position))
    outside: dict[int, list[Target]] = {}
    inside: dict[tuple[int, int], list[Target]] = {}
    latest = -1
    for target in targets:
        homes = {place.get(user.module) for user in target.users}
        home = homes.pop() if len(homes) == 1 else None
        if home is None:
            outside.setdefault(latest, []).append(target)
        else:
            latest = max(latest, home[0])
            inside.setdefault(home, []).append(target)
    found: list[tuple[int | None, int, list[Target]]] = []
    for number in range(-1, len(chains)):
        if number >= 0:
            found += [(number, p, inside.get((number, p), [])) for p in range(len(chains[number]))]
        if number in outside:
            found.append((None, 0, outside[number]))
    return found

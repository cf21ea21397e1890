"""Compress a model larger than memory: on a skeleton without values, one block is opened, fitted, stored and freed.

Blocks that have no values cannot run. When the model runs around its chains, stand-ins answer for them with the hidden
state that they get: so every block's own arguments are recorded, and layers outside of the chains see their true inputs
once the chain before them is done. Hidden states are stored with each block, so that work goes on where it was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from structlin.batches import progress_bar
from structlin.checkpoint._manifest import Checkpoint
from structlin.checkpoint._skeleton import Slot, by_first_name, slots_of
from structlin.checkpoint.journal import Journal
from structlin.checkpoint.table import read_table, replace_layers, replaced_weights, table_of
from structlin.checkpoint.tensors import opened, write_safetensors
from structlin.compress.blocks import Chain, Part, Shelf, Stream, find_chains, record, split
from structlin.compress.calibrate import Collecting, collect_passes, masks_of
from structlin.compress.commit import assemble, swap_modules
from structlin.compress.config import Compression
from structlin.compress.data import Data
from structlin.compress.decide import Choices, choose
from structlin.compress.fit_layers import Purse, fit_part
from structlin.compress.output import last_target, vocabulary_of
from structlin.compress.patched import Pass, Patched, model_passes, model_runs, without_cache
from structlin.compress.plan import CompressionPlan, PlanEntry
from structlin.compress.refine import refine
from structlin.compress.report import BlockReport, Coverage, LayerReport, Outcome, Report
from structlin.compress.scramble import scarce, widened
from structlin.compress.skeleton import Read, StandIns, check_apart, empty, fill, give_back, slots_in
from structlin.compress.speed import only_faster
from structlin.compress.targets import Target, find_targets, openings
from structlin.compress.units import asks
from structlin.compress.workers import seeded
from structlin.fitting.fit import check_weight

REST = ""  # the part that holds everything outside of the chains


def compress_stream(
    model: nn.Module,
    config: Compression,
    data: Data,
    read: Read,
    journal: Journal,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Report:
    """Compress a model part by part into the shards of a journal; parts that it has already are not done again.

    Layers are fitted as `compress_model` fits them with `output_metric=False, allocation="uniform"`, and blocks refined
    where `block_epochs` says so. Memory: what lies outside of the chains, one block, and the Grams and fits of its
    layers; hidden states are in files.

    Args:
        model: the skeleton: parameters and persistent buffers on the meta device. It becomes the skeleton of the
            compressed model.
        config: settings, or a plan.
        data: batches, or nothing.
        read: returns the stored values of tensors by name.
        journal: where to.
        device: where each block is fitted and run; None is the CPU.
        dtype: in which it is; None takes that of the model, in which it is stored in any case.
        progress: show a progress bar on stderr (needs tqdm); None shows it on a terminal.
    Returns:
        The report, without a measured quality.
    Raises:
        ValueError: if the model has no chain of blocks, or blocks share weights or are not called in turn.
    """
    targets = find_targets(model, tied=config.tied, meta=True)
    choices = choose(config, targets, last_target(model, targets))
    chains = find_chains(model, config.blocks)
    if not chains:
        raise ValueError(
            "the model has no list of two or more blocks of one type, to be opened one at a time; name them by "
            "blocks=['layers.*'], say, or compress the model in memory"
        )
    check_apart(model, chains)
    pieces = split(targets, chains)
    if not data.batches:  # nothing runs: what lies outside of the chains is opened when these are done
        pieces.sort(key=lambda piece: piece[0] is None)
    covered = Coverage.of(model, targets, set())
    sizes = {target.name: target.linear.weight.element_size() for target in targets}
    few = scarce(data.batches, targets)
    if journal.records:
        replace_layers(model, _table(model, journal))
    total = sum(number is not None for number, _, _ in pieces) + 1
    bar = progress_bar("compress", "layer", len(targets), progress)
    with torch.inference_mode(False), torch.no_grad(), without_cache(model), bar as advance:
        advance(sum(len(found["rows"]) for found in journal.records))
        work = _Work(model, config, data, read, journal, chains, choices, few, device, dtype, advance)
        if REST not in work.done and data.batches:
            work.look()
        journal.begin()
        shards = 0
        for number, position, members in pieces:
            shards += number is not None
            if number is None and REST not in work.done:
                work.outside(members)
            elif number is not None and chains[number][position][0] not in work.done:
                work.block(number, position, members, f"model-{shards:05d}-of-{total:05d}.safetensors")
                give_back()
            elif number is not None:
                work.purse.settle(_entries(work.done[chains[number][position][0]]))
        if REST not in work.done:
            model = work.rest(f"model-{total:05d}-of-{total:05d}.safetensors")
    swap_modules(model, {})  # tells integrations that layers were swapped
    return _report(model, config, targets, sizes, covered, journal)


class _Work:
    """The work on the parts of one model, and its state: what is done, and the hidden states of the chain at work."""

    def __init__(
        self, model: nn.Module, config: Compression, data: Data, read: Read, journal: Journal,
        chains: Sequence[Chain], choices: Choices, few: bool, device: str | None, dtype: torch.dtype | None,
        advance: Callable[..., None],
    ) -> None:  # fmt: skip
        self.model, self.source, self.journal, self.chains = model, read, journal, chains
        self.config = config.changed(block_epochs=config.block_epochs or 0)
        self.choices, self.device, self.dtype, self.advance = choices, device, dtype, advance
        self.data = replace(data, shrinkage=config.shrinkage)
        self.purse = Purse({}, winners={} if data.batches else None)  # without, layers in memory are fitted at once
        self.done = {found["part"]: found for found in journal.records}
        batches = widened(data.batches, config.seed, vocabulary_of(model), few)
        self.learned = len(batches) if few else len(data.batches)  # of them: what statistics see
        self.masks = masks_of(config.mask, batches)
        self.stand_ins = StandIns(chains)
        runs = model_runs(model, batches, data.forward)
        self.runs = [[partial(self.stand_ins.run, b, n, go) for n, go in enumerate(runs)] for b in (False, True)]
        self.stream: Stream | None = None
        self.outer = Patched(model, {})  # layers outside of the chains: stored at the end, they answer until then
        self.outcomes: list[Outcome] = []

    def look(self) -> None:
        """Open what lies outside of the chains, and run the model once to see how its blocks are called."""
        fill(self._outer_slots(), self.read)
        self.outer = Patched(self.model, openings(self._targets()))
        firsts = [slot for chain in self.chains for slot in slots_in(*chain[0])]
        fill(firsts, self.read)
        for chain in self.chains:
            with self.outer.dense():
                if record(chain, self.runs[0][0]) is None:
                    raise ValueError(
                        f"blocks {chain[0][0]!r} to {chain[-1][0]!r} do not run once each, one after the other, on "
                        "what the one before returned; name others by blocks=, or compress the model in memory"
                    )
        empty(firsts)

    def block(self, number: int, position: int, members: Sequence[Target], shard: str) -> None:
        """Open, fit, store and free one block."""
        name, block = self.chains[number][position]
        if self.data.batches and (self.stream is None or self.stream.chain is not self.chains[number]):
            self._start(number, position)
        fill(slots_in(name, block), self.read)
        stored = next((p.dtype for p in block.parameters() if p.is_floating_point()), None)
        block.to(device=self.device, dtype=self.dtype)
        fresh = self._targets(members)
        patched = Patched(self.model, {**openings(fresh), **self.outer.opened}, dict(self.outer.swaps))
        passes: tuple[Pass, ...] = ()
        if self.stream is not None:
            self.stream.patched = patched
            passes = self.stream.passes(position, self.masks)
        outcomes, blocks = self._fit(Part(name, block, fresh, passes, frozenset(block.parameters())), patched)
        states = None
        if self.stream is not None:
            self.stream.advance(passes)
            states = f"states-{number}-{position}.safetensors"
            _store_states(self.journal.folder / states, self.stream, len(passes))
        for parameter, value in patched.values.items():
            parameter.copy_(value)
        inner = {old: new for outcome in outcomes for old, new in outcome.modules.items()}
        dense = slots_in(name, block)  # the targets keep what is swapped out
        swap_modules(block, assemble(inner, fresh))
        if self.dtype is not None:
            block.to(dtype=stored)
        self._store(name, slots_in(name, block), shard, outcomes, table_of(block, name), blocks, states)
        empty([*dense, *slots_in(name, block)])
        for path in self.journal.folder.glob(f"states-{number}-*"):
            if path.name != states:
                path.unlink()

    def outside(self, members: Sequence[Target]) -> None:
        """Fit layers outside of the chains."""
        fill(self._outer_slots(), self.read)
        passes: tuple[Pass, ...] = ()
        fresh = self._targets(members)
        self.outer.opened = {**self.outer.opened, **openings(fresh)}
        if self.data.batches:
            self._end_chains()
            passes = model_passes(self.outer, self.runs[0], self.masks, self.runs[1])
        self.outcomes += self._fit(Part("", self.model, fresh, passes, frozenset()), self.outer)[0]

    def rest(self, shard: str) -> nn.Module:
        """Store everything outside of the chains, and return the model."""
        fill(self._outer_slots(), self.read)
        found = [outcome.target for outcome in self.outcomes]
        self.model = swap_modules(self.model, assemble(self.outer.swaps, found))
        table = table_of(self.model)
        for known in self.done.values():
            for key in ("layers", "shared_layers", "aliases"):
                table[key] = {name: value for name, value in table[key].items() if name not in known["table"][key]}
        self._store(REST, self._outer_slots(), shard, self.outcomes, table, [], None)
        empty(self._outer_slots())
        return self.model

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tensors: of finished parts from their shards, all others from the source."""
        values: dict[str, Tensor] = {}
        for found in self.done.values():
            with opened(self.journal.shards, found["shard"]) as file:
                values |= {name: file.get_tensor(name).clone() for name in names if name in found["tensors"]}
        return values | dict(self.source([name for name in names if name not in values]))

    def _fit(self, part: Part, patched: Patched) -> tuple[list[Outcome], list[BlockReport]]:
        chosen = [target for target in part.targets if not isinstance(self.choices[target.name], str)]
        for target in chosen:
            for matrix in target.matrices:
                check_weight(matrix.detach())
        seen = [target for target in chosen if not target.on_request]
        statistics = None
        if seen and part.passes:
            how, passes = Collecting(mask=self.config.mask, exact=True), part.passes[: self.learned]
            blanks = {target.name for target in seen if self._is_shifted(target)}
            statistics = collect_passes(seen, passes, how, blanks).rounded(how.dtype)
        data = replace(self.data, statistics=statistics)
        screen = only_faster if self.config.require_speedup else list
        with seeded(self.config.seed):
            outcomes = fit_part(part, self.choices, self.purse, data, self.config, patched, self.advance, screen)
            blocks = []
            if self.config.block_epochs and part.passes and part.own:
                swaps = {old: new for outcome in outcomes for old, new in outcome.modules.items()}
                blocks = refine(part, swaps, patched, self.config.block_epochs, len(self.data.batches))
        return outcomes, blocks

    def _is_shifted(self, target: Target) -> bool:
        """Whether a layer is fitted to a Gram of the inputs that it gets behind others; hidden units need their own."""
        narrows = asks(self.choices[target.name], self.config.hidden_units)
        return self.config.sequential is not False and not target.stacked and not narrows

    def _store(
        self, name: str, slots: Iterable[Slot], shard: str, outcomes: Sequence[Outcome],
        table: Mapping[str, Any], blocks: Sequence[BlockReport], states: str | None,
    ) -> None:  # fmt: skip
        tensors, _ = by_first_name((slot.name, slot.tensor) for slot in slots)
        shapes = replaced_weights(self.model, table["layers"])
        plan = CompressionPlan(None, entries=tuple(outcome.entry for outcome in outcomes))
        about = {
            "part": name, "states": states, "table": table, "rows": [asdict(outcome.row) for outcome in outcomes],
            "entries": plan.to_record()["layers"], "blocks": [asdict(block) for block in blocks],
        }  # fmt: skip
        self.journal.add(shard, tensors | {n: torch.full(size, torch.nan) for n, size in shapes.items()}, about)
        self.done[name] = self.journal.records[-1]

    # Hidden states ---------------------------------------------------------------------------------------------------

    def _start(self, number: int, position: int) -> None:
        """Record the calls of a chain, and take up the hidden states at a position."""
        self._end_chains()
        first = slots_in(*self.chains[number][0])
        fill(first, self.read)
        self.stream = Stream(self.outer, self.chains[number], self.runs[0], self.runs[1], limit=0)  # memory is short
        empty(first)
        if position:
            before = self.done[self.chains[number][position - 1][0]]["states"]
            _load_states(self.journal.folder / before, len(self.masks), self.stream.dense, self.stream.drifted)

    def _end_chains(self) -> None:
        """Let chains that are done answer with their true hidden states."""
        self.stream = None
        for number, chain in enumerate(self.chains):
            states = self.done.get(chain[-1][0], {}).get("states")
            if states and number not in self.stand_ins.ends:
                self.stand_ins.ends[number] = Shelf(0), Shelf(0)
                _load_states(self.journal.folder / states, len(self.masks), *self.stand_ins.ends[number])

    # Modules ---------------------------------------------------------------------------------------------------------

    def _targets(self, only: Sequence[Target] | None = None) -> tuple[Target, ...]:
        """Find targets as they are now: of modules that have values, or of the given names."""
        names = None if only is None else {target.name for target in only}
        found = find_targets(self.model, tied=self.config.tied, meta=True)
        return tuple(
            target for target in found if (not target.linear.weight.is_meta if names is None else target.name in names)
        )

    def _outer_slots(self) -> list[Slot]:
        inside = {module for chain in self.chains for _, block in chain for module in block.modules()}
        named = self.model.named_modules(remove_duplicate=False)
        return list(slots_of((name, module) for name, module in named if module not in inside))


def _store_states(path: Path, stream: Stream, count: int) -> None:
    pairs = (("dense", stream.dense), ("drifted", stream.drifted))
    write_safetensors(path, {f"{kind}.{n}": shelf[n] for kind, shelf in pairs for n in range(count)}, {})


def _load_states(path: Path, count: int, dense: Shelf, drifted: Shelf) -> None:
    with safe_open(path, framework="pt") as file:
        for number in range(count):
            dense[number], drifted[number] = (file.get_tensor(f"{kind}.{number}") for kind in ("dense", "drifted"))


# What was done -------------------------------------------------------------------------------------------------------


def _table(model: nn.Module, journal: Journal) -> Checkpoint:
    """Merge the layer tables of the finished parts."""
    keys = ("layers", "shared_layers", "aliases")
    tables = [found["table"] for found in journal.records]
    merged = {key: {name: value for table in tables for name, value in table[key].items()} for key in keys}
    limit = max((size for parameter in model.parameters() for size in parameter.shape), default=1)
    return read_table({**tables[0], **merged}, limit, str(journal.path))


def _entries(found: Mapping[str, Any]) -> Sequence[PlanEntry]:
    """Read what the layers of a finished part became."""
    return CompressionPlan.from_record({**CompressionPlan(None).to_record(), "layers": found["entries"]}).entries


def _report(
    model: nn.Module, config: Compression, targets: Sequence[Target], sizes: Mapping[str, int], covered: Coverage,
    journal: Journal,
) -> Report:  # fmt: skip
    written_rows = [row for found in journal.records for row in found["rows"]]
    rows = {row["name"]: LayerReport(**{**row, "itemsize": sizes[row["name"]]}) for row in written_rows}
    blocks = tuple(BlockReport(**block) for found in journal.records for block in found["blocks"])
    pieces = {piece: size for t in targets if rows[t.name].structure for piece, size in t.pieces()}  # a tied one once
    compressed = sum(pieces.values())
    covered = replace(covered, compressed=compressed, skipped=covered.skipped - compressed)
    entries = {entry.name: entry for found in journal.records for entry in _entries(found)}
    order = [target.name for target in targets]
    plan = CompressionPlan.of(config, [entries[name] for name in order], None)
    return Report(model, tuple(rows[name] for name in order), covered, plan.settings(), blocks=blocks)

"""Statistics of calibration: second moments of each linear map's inputs, and of the gradients at its outputs."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from structlin.checkpoint.tensors import read_safetensors, write_safetensors
from structlin.fitting.objective import InputGram, defect, indefinite

FIELDS = ("grams", "output_grams", "cross_grams")
OLD_NAMES = {"cross_grams": "crosses"}  # of fields, in files that are still read
VERSION = 2  # files of version 1 have no sha256, and are still read
SHRINKAGE = 0.03
OUTPUT_SHRINKAGE = 0.3
ROUNDING = 1e-3  # relative difference of energies that are summed in another order, or on another device
_KEY = "structlin_statistics"  # in the metadata of the file

# Per field and name: shape, dtype, and a number that names with one and the same tensor have in common; None for layers
# that were not called.
_Outline = dict[str, dict[str, tuple[tuple[int, ...], str, int | None]]]


@dataclass(frozen=True)
class StatisticsSummary:
    """A few numbers that tell statistics apart: by them a plan names those that it was fitted with.

    Args:
        layers: number of linear maps.
        tokens: inputs summed, over all of them.
        energy: sum of the traces of their Grams.
        output_energy: the same of their output Grams.
    """

    layers: int
    tokens: int
    energy: float
    output_energy: float

    def agrees(self, other: StatisticsSummary) -> bool:
        """Whether both describe the same statistics, up to rounding."""
        return (self.layers, self.tokens) == (other.layers, other.tokens) and all(
            math.isclose(ours, theirs, rel_tol=ROUNDING)
            for ours, theirs in ((self.energy, other.energy), (self.output_energy, other.output_energy))
        )

    def __str__(self) -> str:
        loss = f", {self.output_energy:.4g} of the loss" if self.output_energy else ""
        return f"statistics of {self.layers} layers and {self.tokens:,} inputs (energy {self.energy:.4g}{loss})"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Hold what calibration saw of each linear map, under the map's first dotted name.

    For a weight W the squared error of the outputs, summed over the tokens, is ||X D^T||^2 = tr(D G D^H) for a change D
    of the weight. Names whose layers saw the same inputs (query, key and value, say) share one tensor: in memory, in a
    file, and through `merge` and `all_reduce`.

    Args:
        grams: G = sum x x^H over the inputs x, shape (in_features, in_features).
        tokens: number of inputs summed; 0 for a layer that was never called, whose Gram is zero.
        output_grams: H = sum g g^H over the gradients g of a loss by the layer's output, shape (out_features,
            out_features), or only its diagonal, (out_features,); empty without a loss.
        cross_grams: C = sum x x'^H over the inputs x of the model and x' of the partly compressed model, shape
            (in_features, in_features); empty but for `collect_shifted`.
    Example:
        >>> half = Statistics({"0": torch.eye(2)}, {"0": 3})
        >>> both = half.merge(half)
        >>> both.tokens["0"], both.grams["0"].diagonal().tolist(), both.nbytes
        (6, [2.0, 2.0], 16)
    """

    grams: Mapping[str, Tensor] = field(repr=False)
    tokens: Mapping[str, int]
    output_grams: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    cross_grams: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _shrunken: dict[tuple[int, float], InputGram | None] = field(default_factory=dict, init=False, repr=False)

    def shrunken(self, name: str, shrinkage: float = SHRINKAGE) -> InputGram | None:
        """Return a layer's shrunken Gram G + shrinkage tr(G) / n I, computed once for each Gram.

        The Gram of a few thousand tokens is noisy where it is small. With 3 % of its mean eigenvalue added to all of
        them, fits of MiniLM's weights get better on held-out text, and converge faster.
        """
        gram = self.grams[name]
        key = id(gram), shrinkage  # layers with the same inputs share one Gram, which this object keeps alive
        if key not in self._shrunken:
            self._shrunken[key] = InputGram.of(gram, shrinkage)
        return self._shrunken[key]

    def metric(self, name: str) -> Tensor | None:
        """Return a layer's shrunken output Gram H + .3 tr(H) / n I, or its diagonal; None without a loss."""
        gram = self.output_grams.get(name)
        if gram is None:
            return None
        diagonal = gram if gram.ndim == 1 else gram.diagonal()
        ridge = OUTPUT_SHRINKAGE * diagonal.real.mean()
        return (
            gram + ridge
            if gram.ndim == 1
            else gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        )

    @property
    def summary(self) -> StatisticsSummary:
        """The numbers by which a plan names these statistics."""
        energy = sum(gram.diagonal().real.sum(dtype=torch.float64).item() for gram in self.grams.values())
        metrics = (gram if gram.ndim == 1 else gram.diagonal().real for gram in self.output_grams.values())
        loss = sum(metric.sum(dtype=torch.float64).item() for metric in metrics)
        return StatisticsSummary(len(self.grams), sum(self.tokens.values()), float(energy), float(loss))

    @property
    def nbytes(self) -> int:
        """Memory of all tensors in B, a shared one counted once."""
        return sum(tensor.nbytes for tensor in self._distinct())

    def check(self, sizes: Mapping[str, tuple[int, int]] | None = None) -> None:
        """Refuse what cannot have been collected: by the layers that are to be fitted with it, or on its own.

        Args:
            sizes: (in_features, out_features) of each matrix that is to be fitted, by name; None looks at values only,
                and not for negative eigenvalues, which take a decomposition.
        Raises:
            ValueError: naming the layer, if its statistics are missing or of another shape, or hold NaN, infinite
                values or no sum x x^H.
        """
        if self.tokens.keys() != self.grams.keys():
            raise ValueError("its tokens and its Gram matrices have different names")
        if missing := [name for name in sizes or () if name not in self.grams]:
            known = f"they know {list(self.grams)[:5]}" if self.grams else "they are empty"
            raise ValueError(
                f"the statistics lack {len(missing)} of {len(sizes or ())} layers to be compressed, such as "
                f"{missing[:5]}; {known}. Collect them from this very model, with all of its layers"
            )
        if sizes and not any(self.tokens.values()):
            raise ValueError(
                "the statistics saw no input: there was no batch (an iterator is exhausted after one pass), or no "
                "layer was called; collect them from a list of batches"
            )
        for name, count in self.tokens.items():
            if type(count) is not int or count < 0:
                raise ValueError(f"layer {name!r}: tokens={count!r}; give the number of inputs summed")
        seen: dict[int, str | None] = {}
        for what in FIELDS:
            for name, tensor in getattr(self, what).items():
                size = (sizes or {}).get(name, (len(self.grams.get(name, tensor)), len(tensor)))[what == "output_grams"]
                wanted = [(size, size), (size,)] if what == "output_grams" else [(size, size)]
                if tuple(tensor.shape) not in wanted:
                    raise ValueError(
                        f"layer {name!r}: {what} of shape {tuple(tensor.shape)}; it needs "
                        f"{' or '.join(map(str, wanted))}: collect them from this very model"
                    )
                if id(tensor) not in seen:
                    seen[id(tensor)] = _fault(what, tensor, sizes is not None)
                if fault := seen[id(tensor)]:
                    raise ValueError(f"layer {name!r}: {what} {fault}")

    def merge(self, *others: Statistics) -> Statistics:
        """Sum statistics of several sets of batches, on the devices of the first.

        Names share a sum where they share a tensor in every part.

        Args:
            others: statistics of the same layers.
        Returns:
            New statistics; the parts stay as they were.
        Raises:
            ValueError: if names, shapes or dtypes differ, naming the layer.
        """
        parts = (self, *others)
        outlines = [part._outline() for part in parts]
        for outline in outlines[1:]:
            _check_alike(outlines[0], outline, "another")

        def total(what: str, name: str) -> Tensor:
            result = getattr(self, what)[name].clone()
            for other in others:
                result += getattr(other, what)[name].to(result.device)
            return result

        return self._summed(outlines, total, {name: sum(part.tokens[name] for part in parts) for name in self.tokens})

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Statistics:
        """Sum the statistics of all ranks; each must call it, with statistics of the same layers.

        Args:
            group: process group, None for the default one.
        Returns:
            New statistics, the same on every rank.
        Raises:
            RuntimeError: if torch.distributed has no process group.
            ValueError: on every rank, if names, shapes or dtypes differ, naming the layer.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("there is no process group; call torch.distributed.init_process_group first")
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (self._outline(), dict(self.tokens)), group=group)
        # Ranks may share different tensors. All reduce those that every rank shares, in the order of the first rank.
        outlines = [outline for outline, _ in gathered]
        for rank, outline in enumerate(outlines):
            _check_alike(outlines[0], outline, f"rank {rank}")

        def total(what: str, name: str) -> Tensor:
            result = getattr(self, what)[name].clone(memory_format=torch.contiguous_format)
            dist.all_reduce(result, group=group)
            return result

        return self._summed(
            outlines, total, {name: sum(tokens[name] for _, tokens in gathered) for name in self.tokens}
        )

    def rounded(self, dtype: torch.dtype) -> Statistics:
        """Return the same sums in another dtype, complex ones in its counterpart."""

        def total(what: str, name: str) -> Tensor:
            found: Tensor = getattr(self, what)[name]
            return found.to(dtype.to_complex() if found.is_complex() else dtype)

        return self._summed([self._outline()], total, dict(self.tokens))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; a shared tensor is written once. A file of that name is replaced at the end.

        Args:
            path: where to; its directory must exist.
        Raises:
            CheckpointError: if a tensor cannot be stored, or on a big-endian machine.
            OSError: if the file cannot be written; what was there stays.
        """
        tensors = {str(number): tensor for number, tensor in enumerate(self._distinct())}
        keys = {id(tensor): key for key, tensor in tensors.items()}
        record: dict[str, Any] = {"version": VERSION, "tokens": dict(self.tokens)}
        record |= {what: {name: keys[id(t)] for name, t in getattr(self, what).items()} for what in FIELDS}
        record["complex"] = [key for key, tensor in tensors.items() if tensor.is_complex()]
        record["sha256"] = _digest(record, tensors)
        target = Path(path).resolve()
        aside = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
        try:
            write_safetensors(aside, tensors, {_KEY: json.dumps(record)})
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote, on the CPU; what was shared is shared again.

        Args:
            path: the file.
        Raises:
            ValueError: if the file is damaged, not one of `save`, or of another version, or holds no statistics.
            OSError: if it cannot be opened.
        """
        try:
            tensors, metadata = read_safetensors(Path(path))
            record = json.loads(metadata.get(_KEY, "null"))
            if not isinstance(record, dict):
                raise ValueError(f"its metadata lacks {_KEY!r}")
            if record.get("version") not in (1, VERSION):
                raise ValueError(f"version {record.get('version')}; this structlin reads versions 1 and {VERSION}")
            expected = record.pop("sha256", None)
            tensors |= {key: torch.view_as_complex(tensors[key]) for key in record["complex"]}
            keys = {what: record[what if what in record else OLD_NAMES[what]] for what in FIELDS}
            parts = {what: {name: tensors[key] for name, key in found.items()} for what, found in keys.items()}
            if (expected is not None or record["version"] != 1) and _digest(record, tensors) != expected:
                raise ValueError("its content has another sha256 than it had when it was written; copy it again")
            found = cls(tokens=record["tokens"], **parts)
            found.check()
        except OSError:
            raise
        except Exception as error:  # safetensors and torch raise many kinds
            raise ValueError(f"{path}: not a file of Statistics.save, or damaged: {error}") from error
        return found

    def _distinct(self) -> list[Tensor]:
        return list({id(tensor): tensor for what in FIELDS for tensor in getattr(self, what).values()}.values())

    def _outline(self) -> _Outline:
        numbers = {id(tensor): number for number, tensor in enumerate(self._distinct())}
        return {
            what: {
                name: (tuple(t.shape), str(t.dtype), numbers[id(t)] if self.tokens[name] else None)
                for name, t in getattr(self, what).items()
            }
            for what in FIELDS
        }

    def _summed(
        self, outlines: Sequence[_Outline], total: Callable[[str, str], Tensor], tokens: dict[str, int]
    ) -> Statistics:
        """Compute `total(field, name)` once for all names that share a tensor in every outline.

        Zero Grams of layers that were not called count as shared, if others with inputs are.
        """
        parts: dict[str, dict[str, Tensor]] = {what: {} for what in FIELDS}
        sums: dict[tuple[str, tuple[int | str | None, ...]], Tensor] = {}
        for what in FIELDS:
            for name in outlines[0][what]:
                numbers = tuple(outline[what][name][2] for outline in outlines)
                shared = what, (name,) if set(numbers) == {None} else numbers
                if shared not in sums:
                    sums[shared] = total(what, name)
                parts[what][name] = sums[shared]
        return Statistics(tokens=tokens, **parts)


def _fault(what: str, tensor: Tensor, decompose: bool) -> str | None:
    """Say why a tensor is no statistic of its kind."""
    if what == "cross_grams":
        return None if torch.isfinite(tensor).all() else "hold NaN or infinite values; collect them again"
    return defect(tensor) or (indefinite(tensor) if decompose and tensor.ndim == 2 else None)


def _digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a record and of the bits of tensors."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        digest.update(f"{key} {plain.dtype} {tuple(plain.shape)}".encode())
        if plain.nbytes:  # by address: torch's tensors have no buffer interface, and `numpy()` needs numpy
            digest.update(memoryview((ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())))
    return digest.hexdigest()


def _check_alike(first: _Outline, other: _Outline, who: str) -> None:
    for what in FIELDS:
        for name in sorted(first[what].keys() ^ other[what].keys()):
            raise ValueError(
                f"layer {name!r}: only one part has its {what}, the first or {who}; collect the same layers"
            )
        for name, (shape, dtype, _) in first[what].items():
            if other[what][name][:2] != (shape, dtype):
                has = "{} {}".format(*other[what][name][:2])
                raise ValueError(f"layer {name!r}: {what} of {shape} {dtype}, but {who} has {has}; collect them alike")

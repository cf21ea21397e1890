"""The report of a compression: a row per linear map, every parameter accounted for, quality at each stage."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from structlin.compress.config import Compression
from structlin.compress.plan import PlanEntry
from structlin.compress.quality import Quality
from structlin.compress.tables import shape, table
from structlin.compress.targets import STRUCTURED, Piece, Target, unreached
from structlin.compress.taxonomy import Taxonomy, geometries
from structlin.layers.factored import Factored


@dataclass(frozen=True)
class Coverage:
    """Parameters of the model before compression, in three kinds that add up to all of them.

    Args:
        compressed: in layers that get a structure (weights and biases).
        skipped: in linear maps that stay dense, for the reason in their row.
        unreached: in modules of other types, by type.
        bytes: of all of them.
    """

    compressed: int
    skipped: int
    unreached: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    @classmethod
    def of(cls, model: nn.Module, targets: Sequence[Target], compressed: set[str]) -> Coverage:
        """Count the parameters of a dense model, given its targets and the names of those that get a structure."""
        seen: set[Piece] = set()
        counts = {True: 0, False: 0}
        reached: Counter[int] = Counter()
        for chosen in (True, False):  # a shared bias counts where its layer is compressed
            for target in targets:
                if (target.name in compressed) == chosen:
                    for piece, size in target.pieces():
                        if piece not in seen:
                            seen.add(piece)
                            counts[chosen] += size
                            reached[piece[0]] += size
        size = sum(parameter.nbytes for parameter in model.parameters() if not is_lazy(parameter))
        return cls(counts[True], counts[False], unreached(model, reached), size)

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return self.compressed + self.skipped + sum(self.unreached.values())

    def __str__(self) -> str:
        def share(count: int) -> str:
            return f"{count:,} ({100 * count / max(self.total, 1):.1f} %)"

        others = ", ".join(f"{kind} {count:,}" for kind, count in self.unreached.items())
        return (
            f"coverage: {self.total:,} parameters = {share(self.compressed)} compressed + {share(self.skipped)} skipped"
            f" + {share(sum(self.unreached.values()))} unreached" + (f" ({others})" if others else "")
        )


@dataclass(frozen=True)
class LayerReport:
    """One linear map: what it was, what it became, or why it stayed.

    Args:
        name: dotted name, empty for the root.
        aliases: its other names, and those of layers that share its weight.
        in_features: size of the input.
        out_features: size of the output.
        structure: the structure with its sizes, or None.
        parameters_before: entries of the dense weight, or of all matrices of a stack.
        parameters_after: learned entries of the factors; the dense count where it stayed.
        bias_lost: entries of the bias that went with hidden units.
        flops_before: per token, 2 in out.
        flops_after: per token, of the cheaper sequential contraction.
        error: relative Frobenius error of the weight as fitted, before its block is refined; None where it stayed.
        output_error: relative error of the outputs, in the norms that the fit minimised (see `Statistics.shrunken`),
            likewise; None without calibration.
        seconds: time of the fit.
        reason: why it stayed dense, None where it did not.
        count: number of matrices of these sizes: 1, or the experts of a stack.
        called: whether calibration called the layer; None without calibration.
        itemsize: bytes of one entry of the weight.
        hooks: number of forward and backward hooks that were kept.
        speed: with `require_speedup`, the worst measured time of the replacement / that of the dense layer.
        bypassed: whether the model, run on a batch with its new modules, still read the dense weight.
    """

    name: str
    aliases: tuple[str, ...]
    in_features: int
    out_features: int
    structure: str | None
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int
    error: float | None = None
    output_error: float | None = None
    seconds: float = 0.0
    reason: str | None = None
    count: int = 1
    called: bool | None = None
    itemsize: int = 4
    hooks: int = 0
    bias_lost: int = 0
    speed: float | None = None
    bypassed: bool = False

    @classmethod
    def dense(cls, entry: PlanEntry) -> LayerReport:
        """Return the row of a layer that stays dense."""
        return cls(
            entry.name, entry.aliases, entry.in_features, entry.out_features, None,
            parameters_before=entry.parameters_before, parameters_after=entry.parameters_before,
            flops_before=2 * entry.in_features * entry.out_features,
            flops_after=2 * entry.in_features * entry.out_features, reason=entry.reason, count=entry.count,
        )  # fmt: skip

    @property
    def lost(self) -> int:
        """Parameters before - parameters after, those of the bias too."""
        return self.parameters_before - self.parameters_after + self.bias_lost


@dataclass(frozen=True)
class Outcome:
    """The result of one target.

    Args:
        target: the weight and its users.
        entry: what it gets, with its sizes.
        row: of the report.
        modules: old module -> new module; empty where the layer stays dense.
    """

    target: Target
    entry: PlanEntry
    row: LayerReport
    modules: Mapping[nn.Module, nn.Module]

    @property
    def layer(self) -> Factored | None:
        """The structured layer, None where the layer stays dense."""
        return next((module for module in self.modules.values() if isinstance(module, Factored)), None)

    def kept(self, reason: str) -> Outcome:
        """Return the outcome of a layer that stays dense after all, for this reason if it has none yet."""
        entry = replace(self.entry, structure=None, reason=self.entry.reason or reason, sizes=None, fitted=None)
        row = replace(
            self.row, structure=None, reason=entry.reason, parameters_after=entry.parameters_after, bias_lost=0,
            flops_after=self.row.flops_before, error=None, output_error=None,
        )  # fmt: skip
        return Outcome(self.target, entry, row, {})


@dataclass(frozen=True)
class BlockReport:
    """What the refinement of a block did.

    Args:
        name: dotted name; empty for the whole model.
        before: distance from the dense block's outputs, behind the compressed layers before it, on batches that the
            refinement did not learn from, where there are six or more: |y' - y|^2 / |y|^2, or the KL divergence of a
            model's logits.
        after: the same with the refined parameters.
        steps: optimizer steps.
        seconds: time taken.
    """

    name: str
    before: float
    after: float
    steps: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"block {self.name or '(the model)'}: error {self.before:.4f} -> {self.after:.4f} in {self.steps} steps, "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Report:
    """The result of `compress_model`; prints as a table.

    Args:
        model: the compressed model: the argument, or its replacement where the root itself was a linear layer.
        layers: one row per linear map, in module order.
        coverage: every parameter accounted for.
        compression: the settings: the plan that was carried out, without fits and statistics.
        qualities: task, fidelity and size of the dense model, the compressed one, and others that `measure` added.
        blocks: what the refinement of each block did.
    """

    model: nn.Module = field(repr=False)
    layers: tuple[LayerReport, ...]
    coverage: Coverage
    compression: Compression = field(repr=False)
    qualities: tuple[Quality, ...] = ()
    blocks: tuple[BlockReport, ...] = ()

    def measure(self, stage: str, evaluator: Callable[[nn.Module, str], Quality]) -> Report:
        """Return the report with the quality of the model as it is now, after healing, say.

        Args:
            stage: its name.
            evaluator: an `Evaluator`, best the one that `compress_model(evaluate=)` was given: a report keeps no
                batches.
        """
        return replace(self, qualities=(*self.qualities, evaluator(self.model, stage)))

    def taxonomy(self) -> Taxonomy:
        """Describe the model as it is now in the terms of 'Geometry is all you need' (Xu, Sharmin & Mandic 2024).

        The losses are those of the last stage that was measured.
        """
        size = self.parameters_after / max(self.parameters_before, 1)
        found = Taxonomy(tuple(geometries(self.model)), size)
        if not self.qualities:
            return found
        first, last = self.qualities[0], self.qualities[-1]
        kept = last.top1 if last.cosine is None else last.cosine
        return replace(
            found,
            accuracy_lost=None if first.task is None or last.task is None else first.task - last.task,
            fidelity_lost=None if kept is None else 1 - kept,
        )

    @property
    def parameters_before(self) -> int:
        """Parameters of the whole model before."""
        return self.coverage.total

    @property
    def parameters_after(self) -> int:
        """Parameters of the whole model after."""
        return self.coverage.total - sum(row.lost for row in self.layers)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters before."""
        return self.coverage.bytes

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters after."""
        return self.bytes_before - sum(row.lost * row.itemsize for row in self.layers)

    @property
    def verdict(self) -> str | None:
        """Say it where nothing was compressed, dense weights still run, or most parameters were not reached."""
        unreached = {kind: count for kind, count in self.coverage.unreached.items() if not kind.endswith(STRUCTURED)}
        if not any(row.structure for row in self.layers):
            reasons = Counter(row.reason for row in self.layers).most_common(1)
            return "nothing was compressed: " + (
                f"{sum(self.coverage.unreached.values()):,} parameters are already structured"
                if len(unreached) < len(self.coverage.unreached)
                else f"{reasons[0][1]} of {len(self.layers)} layers: {reasons[0][0]}"
                if reasons
                else "the model has no linear map that is known"
            )
        if bypassed := [row.name for row in self.layers if row.bypassed]:
            return (
                f"the model still runs the dense weights of {len(bypassed)} layers ({', '.join(bypassed[:5])}): it "
                "holds the old modules elsewhere too, in a plain list or as a bound method; keep them as submodules "
                "only, or exclude those layers"
            )
        if 2 * sum(unreached.values()) > self.coverage.total:
            kinds = ", ".join(unreached)
            return f"more than half of the parameters were not reached: they are in modules of types {kinds}"
        return None

    @property
    def ratio(self) -> float:
        """Parameters after / before over the compressed layers' weights; 1 if there is none."""
        rows = [row for row in self.layers if row.structure]
        before = sum(row.parameters_before for row in rows)
        return sum(row.parameters_after for row in rows) / before if before else 1.0

    def to_json(self) -> str:
        """Write everything but the model as JSON.

        Raises:
            ValueError: if the mask of the settings is a function.
        """
        content: dict[str, Any] = {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "verdict": self.verdict,
            "coverage": asdict(self.coverage),
            "qualities": [asdict(quality) for quality in self.qualities],
            "compression": self.compression.to_record(),
            "layers": [asdict(row) for row in self.layers],
            "blocks": [asdict(block) for block in self.blocks],
        }
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        head = ("layer", "shape", "structure", "parameters", "kept", "FLOPs", "error", "output error", "s")
        rows = [head, *(_cells(row) for row in self.layers)]
        notes = [f"{row.name}: {row.hooks} hooks kept" for row in self.layers if row.hooks]
        notes += [
            f"{row.name}: calibration never called it; where code reads its weight, each read builds the dense matrix"
            for row in self.layers
            if row.called is False
        ]
        return "\n".join(
            [
                *([self.verdict] if self.verdict else []),
                *table(rows),
                *notes,
                *map(str, self.blocks),
                str(self.coverage),
                f"model: {self.parameters_before:,} -> {self.parameters_after:,} parameters "
                f"({self.parameters_after / max(self.parameters_before, 1):.3f}), "
                f"{self.bytes_before / 2**20:.2f} -> {self.bytes_after / 2**20:.2f} MiB; "
                f"compressed weights keep {self.ratio:.3f}",
                *map(str, self.qualities),
            ]
        )


def _cells(row: LayerReport) -> tuple[str, ...]:
    name = (row.name or "(root)") + (f" (+{len(row.aliases)} aliases)" if row.aliases else "")
    if row.structure is None:
        return name, shape(row), f"dense: {row.reason}", f"{row.parameters_before:,}", "1", "1", "", "", ""
    return (
        name, shape(row), row.structure, f"{row.parameters_after:,}",
        f"{row.parameters_after / row.parameters_before:.3f}", f"{row.flops_after / row.flops_before:.2f}",
        "" if row.error is None else f"{row.error:.4f}", "" if row.output_error is None else f"{row.output_error:.4f}",
        f"{row.seconds:.2f}",
    )  # fmt: skip

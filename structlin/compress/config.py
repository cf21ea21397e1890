"""`Compression`: every setting of a compression, checked when it is made, and the rules among them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any, get_args

from torch import Tensor, nn
from typing_extensions import Self

from structlin.checkpoint import bounded
from structlin.equation.structure import Structure, to_record
from structlin.fitting.budget import Budget, check_ratio
from structlin.fitting.fit import Families
from structlin.layers.linear import StructuredLinear
from structlin.structures import Blast, Kaleidoscope, LowRank, family, sum_of

# What "auto" chooses from. Low rank is always solved exactly, so that the choice is never worse than it; the two sums
# were best in benchmarks/results/structures_tried.md.
AUTO: Families = (LowRank, sum_of(LowRank, Kaleidoscope), sum_of(LowRank, Blast))

ALLOCATIONS = ("auto", "uniform", "global")
TIES = ("skip", "replace")
VERSION = 1
# Keywords that users of other libraries try -> what to write here.
INSTEAD = {
    "rank": "write structlin.structures.LowRank(rank=...) as the structure, or give a ratio",
    "terms": "write structlin.structures.Kronecker(terms=...) as the structure, or give a ratio",
    "target_modules": 'name layers in rules, with None as the structure: rules={"query": LowRank(rank=8)}',
    "modules_to_not_convert": "write exclude=[...]",
    "ignore": "write exclude=[...]",
    "skip": "write exclude=[...]",
    "dataset": "write calibration=batches",
    "device": "move the model first: model.to(device)",
    "dtype": "convert the model first: model.to(dtype)",
}

Pattern = str | Callable[[str, nn.Module], bool]
Value = Structure | str | None | Mapping[str, Any]
Rules = Mapping[Pattern, Value]
Mask = str | Callable[[Any], Tensor | None] | None


@dataclass(frozen=True)
class Choice:
    """What one layer gets: a structure with its sizes, or one or more classes and the ratio to size them by."""

    structure: Structure | Families
    ratio: float | None = None
    refine: int | None = None


@dataclass(frozen=True)
class Compression:
    """All settings of a compression, checked when it is made.

    `compress_model` and `plan_compression` take one, or build one from their keywords.

    Args:
        structure: for layers that no rule names. A registered name (with `ratio`); `"a+b"` for the sum of two; "auto"
            (with `ratio`) for the best of low rank, low rank + K-matrix and low rank + BLAST; a layer class, for its
            structure; an instance with its sizes; or None to stay dense.
        ratio: parameters kept / dense parameters, of each layer or, with allocation="global", of all of them together.
        rules: pattern -> structure, name, None, or a mapping with `structure`, `ratio`, `refine` and hyperparameters.
            A pattern is a glob on the dotted name or on its last parts ("query" matches "layer.0.query"), a regular
            expression after `re:`, or a predicate(name, module). The first match wins.
        exclude: patterns of layers that stay dense, whatever the rules say.
        budget: what the ratio counts: "parameters", "bytes", or "flops" per token.
        allocation: "uniform" gives each layer the ratio. "global" gives all of them together that ratio: of several
            divisions the one that held-back batches like best (see `allocate.allocate`). "auto" is global where there
            are such batches.
        tied: "skip" leaves a weight that an embedding shares dense; "replace" compresses it for all of its users,
            also where one of them is the output layer.
        skip_last: leave the output layer dense unless a rule names it.
        refine: refinement steps of each fit; None takes the structure's default.
        hidden_units: where "auto" chooses, batches are given and an MLP keeps at most 70 % of its parameters, remove
            hidden units, and fit structures to the smaller maps or keep these dense (see `units.narrow`).
        output_metric: weigh errors at a layer's outputs by what they do to the model's outputs, where batches are given
            and gradients reach the layers (see `calibrate.sampled_loss`).
        sequential: fit each layer to the inputs that the compressed layers before it produce, a quarter of the way
            towards the original outputs. None: where calibration is given as batches, which it needs.
        block_epochs: passes over the batches in which all parameters of a block are refined, towards the dense block's
            outputs; 0 for none. Each takes in three scrambled copies of batches of tokens, against overfitting (see
            `scramble`). None, where calibration is given as batches: 3, or 10 without copies.
        model_epochs: passes in which then all blocks are refined from end to end; 0 for none. None: 6 of two or more
            blocks, if their compressed layers have at most 2^28 parameters.
        blocks: globs, each naming the blocks of one chain, such as ["model.layers.*"]; None finds them, and an empty
            list takes the whole model as one block.
        require_speedup: leave a layer dense unless its replacement, frozen and timed on this machine, is faster for one
            sentence's and for one batch's number of rows (`speed.TOKENS`).
        mask: which tokens count in calibration, see `collect_statistics`.
        held_back: share of the calibration batches (at most 8 of them) that only checks see, without `validation`.
        shrinkage: share of the Gram's mean eigenvalue that is added to all of them, see `Statistics.shrunken`.
        seed: of torch's generators while a model is compressed; their states are restored afterwards.
    Raises:
        ValueError: if a setting is out of range, a name unknown, or a rule contradicts itself.
        TypeError: if a setting or a rule is of the wrong kind.
    Example:
        >>> Compression("lowrank", ratio=0.5, rules={"*.attention.*": {"ratio": 0.75}}).ratio
        0.5
    """

    structure: Value
    _: KW_ONLY
    ratio: float | None = None
    rules: Rules = field(default_factory=dict)
    exclude: Sequence[str] = ()
    budget: Budget = "parameters"
    allocation: str = "auto"
    tied: str = "skip"
    skip_last: bool = True
    refine: int | None = None
    hidden_units: bool = True
    output_metric: bool = True
    sequential: bool | None = None
    block_epochs: int | None = None
    model_epochs: int | None = None
    blocks: Sequence[str] | None = None
    require_speedup: bool = False
    mask: Mask = "auto"
    held_back: float = 0.1
    shrinkage: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("budget", get_args(Budget)), ("allocation", ALLOCATIONS), ("tied", TIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use {_either(allowed)}")
        for name in ("skip_last", "hidden_units", "output_metric", "sequential", "require_speedup"):
            if not isinstance(getattr(self, name), bool | (NoneType if name == "sequential" else bool)):
                raise TypeError(f"{name}={getattr(self, name)!r}; use True or False")
        for name in ("refine", "block_epochs", "model_epochs"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        _check_count("seed", self.seed)
        if self.ratio is not None:
            check_ratio(self.ratio)
        check_mask(self.mask)
        if not 0 < self.held_back < 1:
            raise ValueError(f"held_back={self.held_back} is outside (0, 1); it is a share of the calibration batches")
        if not 0 <= self.shrinkage < math.inf:
            raise ValueError(f"shrinkage={self.shrinkage} is negative or not finite; use a share such as 0.03")
        if not isinstance(self.rules, Mapping):
            raise TypeError(f"rules is a {type(self.rules).__name__}; give a mapping of patterns to structures")
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise TypeError(f"exclude={self.exclude!r}; give a list of patterns, such as ['*.classifier']")
        if isinstance(self.blocks, str) or not all(isinstance(pattern, str) for pattern in self.blocks or ()):
            raise TypeError(f"blocks={self.blocks!r}; give a list of patterns, such as ['model.layers.*']")
        object.__setattr__(self, "blocks", None if self.blocks is None else tuple(self.blocks))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "rules", dict(self.rules))  # the caller's may change
        self.choices()  # reading the rules checks them

    def choices(self) -> tuple[Choice | None, list[tuple[Pattern, Choice | None]]]:
        """Read the default and the rules; None means to stay dense."""
        default = self._choice(self.structure, None)
        for pattern in self.rules:
            if not isinstance(pattern, str) and not callable(pattern):
                raise TypeError(f"a pattern is a {type(pattern).__name__}; use a glob, 're:...' or a predicate")
        kept: list[tuple[Pattern, Choice | None]] = [(pattern, None) for pattern in self.exclude]
        return default, kept + [(pattern, self._choice(value, default)) for pattern, value in self.rules.items()]

    def _choice(self, value: Value, default: Choice | None) -> Choice | None:
        if value is None or value == {"structure": None}:
            return None
        if isinstance(value, Mapping):
            return _from_mapping(value, default, self.ratio, self.refine)
        structure = _named(value)
        if isinstance(structure, Structure):
            return Choice(structure, None, self.refine)
        if self.ratio is None:
            raise ValueError(f"structure {value!r} needs a ratio (or an instance with its sizes: LowRank(rank=8))")
        return Choice(structure, self.ratio, self.refine)

    def changed(self, **settings: Any) -> Self:
        """Return a copy with other values of some settings, checked again."""
        return dataclasses.replace(self, **settings)

    def check_batches(self, batches: Sequence[Any]) -> None:
        """Refuse to go without batches where a stage that was asked for runs the model."""
        if (self.sequential or self.block_epochs or self.model_epochs) and not batches:
            raise ValueError("sequential=True and block or model epochs run the model: pass calibration as batches")

    # JSON ------------------------------------------------------------------------------------------------------------

    def to_record(self) -> dict[str, Any]:
        """Return the settings as plain JSON data.

        Raises:
            ValueError: if a rule's pattern or the mask is a function; name layers by globs instead.
        """
        record: dict[str, Any] = {"version": VERSION}
        for entry in dataclasses.fields(Compression):
            record[entry.name] = _written(entry.name, getattr(self, entry.name))
        return record

    def to_json(self) -> str:
        """Write the settings as JSON; see `to_record`."""
        return json.dumps(self.to_record(), indent=2)

    @classmethod
    @bounded.explained("a stored Compression")
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_record` returned; absent settings take their defaults.

        Raises:
            ValueError: if the version or a setting is unknown, or a setting is bad.
        """
        if record.get("version") != VERSION:
            raise ValueError(f"settings of version {record.get('version')}; this structlin reads version {VERSION}")
        settings = {name: value for name, value in record.items() if name != "version"}
        check_names(settings, "a stored Compression")
        settings["structure"] = read_rule(settings.get("structure"))
        settings["rules"] = {pattern: read_rule(value) for pattern, value in settings.get("rules", {}).items()}
        return cls(**settings)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; see `from_record`."""
        return cls.from_record(bounded.parse(text.encode()))


def with_settings(structure: Value | Compression, settings: Mapping[str, Any], caller: str) -> Compression:
    """Build the settings from a verb's arguments: a structure and keywords, or a Compression that keywords change."""
    check_names(settings, caller)
    return structure.changed(**settings) if isinstance(structure, Compression) else Compression(structure, **settings)


def check_names(settings: Mapping[str, Any], caller: str) -> None:
    """Refuse unknown settings by name.

    Raises:
        TypeError: naming the nearest setting.
    """
    known = [entry.name for entry in dataclasses.fields(Compression)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = INSTEAD.get(name) or (f"did you mean {near[0]!r}?" if near else f"the settings are {known}")
            raise TypeError(f"{caller} has no setting {name!r}; {hint}")


def check_mask(mask: Mask) -> None:
    """Refuse what does not tell which tokens count."""
    if mask is not None and mask != "auto" and not callable(mask):
        raise ValueError(f"mask={mask!r} is unknown; use 'auto', None or a callable(batch)")


def matches(pattern: Pattern, names: Sequence[str], module: nn.Module) -> bool:
    """Whether a glob on a name or its last parts, `re:` and a regular expression, or a predicate matches any name."""
    if callable(pattern):
        return any(pattern(name, module) for name in names)
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for name in names)


def describe(pattern: Pattern) -> str:
    """Write a pattern as reports show it."""
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", "predicate")


# Reading rules -------------------------------------------------------------------------------------------------------


def _from_mapping(
    value: Mapping[str, Any], default: Choice | None, ratio: float | None, refine: int | None
) -> Choice:  # fmt: skip
    """Read a rule such as {"structure": "kronecker", "terms": 4} or {"ratio": 0.25}."""
    fields = dict(value)
    structure: Any = _named(fields.pop("structure")) if "structure" in fields else default and default.structure
    if "structure" in value and "ratio" in value and isinstance(structure, Structure):
        raise ValueError(f"rule {dict(value)} gives a ratio beside {structure}, which has its sizes; give one")
    # Hyperparameters fix the sizes, so that the general ratio does not apply to them.
    ratio, refine = fields.pop("ratio", None if fields else ratio), fields.pop("refine", refine)
    if ratio is not None:
        check_ratio(ratio)
    if refine is not None:
        _check_count("refine", refine)
    if structure is None:
        raise ValueError(f"rule {dict(value)} names no structure and there is no default; add structure=")
    if fields or (not isinstance(structure, Structure) and ratio is None):
        if ratio is not None or isinstance(structure, Structure):
            raise ValueError(f"rule {dict(value)} gives hyperparameters besides a ratio or an instance; give one")
        if not isinstance(structure, type):
            raise ValueError(f"rule {dict(value)}: {value.get('structure')!r} finds its sizes from a ratio; add ratio=")
        return Choice(_instance(structure, fields), None, refine)
    if isinstance(structure, Structure) and "ratio" in value:
        structure = type(structure)
    return Choice(structure, None if isinstance(structure, Structure) else ratio, refine)


def _named(value: Any) -> Structure | Families:
    """Return an instance, or what a name or a layer class stands for."""
    if isinstance(value, type) and issubclass(value, StructuredLinear) and value.structure_class is not None:
        value = value.structure_class.name
    if isinstance(value, str):
        return AUTO if value == "auto" else family(value)
    if isinstance(value, Structure):
        return value
    kind = type(value).__name__
    raise TypeError(f"a rule holds {kind}; use a structure, its name, its layer class, a mapping, or None (dense)")


def _instance(cls: type[Structure], fields: Mapping[str, Any]) -> Structure:
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"{cls.name} does not take {dict(fields)}: {error}") from error


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={value!r}; use a whole number from 0")


def _either(allowed: Sequence[str]) -> str:
    *others, last = map(repr, allowed)
    return f"{', '.join(others)} or {last}"


def _written(name: str, value: Any) -> Any:
    if callable(value) and not isinstance(value, (Structure, type)):
        raise ValueError(
            f"{name} holds a function, which JSON cannot; name layers by globs, and masks by 'auto' or None"
        )
    if isinstance(value, Structure):
        return to_record(value)
    if isinstance(value, Mapping):
        return {_written(name, key): _written(name, item) for key, item in value.items()}
    if isinstance(value, type):
        return value.structure_class.name  # type: ignore[attr-defined]
    return list(value) if isinstance(value, tuple) else value


def read_rule(value: Any) -> Any:
    """Read a structure or a rule: records of structures have a `kind`."""
    if not isinstance(value, Mapping):
        return value
    if "kind" in value:
        return bounded.read_structure(value)
    return {name: read_rule(item) if name == "structure" else item for name, item in value.items()}

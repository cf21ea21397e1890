"""The `Structure` interface, and the registry of known structures."""

from __future__ import annotations

import dataclasses
import difflib
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from structlin.equation.spec import Spec


class Structure(ABC):
    """A kind of structured matrix with its hyperparameters: subclass it as a frozen dataclass.

    A structure defines its equation and the decomposition of a dense weight. All else (forward, backward, counts,
    initialisation, printing, storage) follows from the equation.

    A field may be left open (None) where the size of the layer or its weight determines it; `resolve` fills it in.
    Layers and checkpoints hold resolved structures. A field holds a number, a string, None, a structure, or a tuple of
    these.
    """

    name: ClassVar[str]  # registered, and written to files
    aliases: ClassVar[tuple[str, ...]] = ()  # other names that are accepted
    refine_steps: ClassVar[int] = 0  # default refinement; above 0 for a structure without a closed form
    sized: ClassVar[bool] = True  # whether `candidates` finds sizes from a budget
    repeats: ClassVar[tuple[str, ...]] = ()  # fields that multiply the number of factors, instead of sizing them

    def __post_init__(self) -> None:
        """Turn lists into tuples, and raise TypeError for a field that does not fit its annotation."""
        for name, kind in _field_kinds(type(self)).items():
            given = getattr(self, name)
            value = _plain(given)
            if not _is_kind(value, kind):
                expected = getattr(kind, "__name__", None) if isinstance(kind, type) else kind
                raise TypeError(f"{type(self).__name__}: {name}={given!r} is of the wrong kind; use {expected}")
            object.__setattr__(self, name, value)  # a frozen dataclass has no other way in

    @abstractmethod
    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Structure:
        """Fill in open fields, and check every field for a layer of this size.

        Args:
            in_features: size of the input.
            out_features: size of the output.
            weight: dense matrix (out_features, in_features), for fields that depend on it.
        Raises:
            ValueError: if a field is out of range, naming the range.
        """

    @abstractmethod
    def spec(self, in_features: int, out_features: int) -> Spec:
        """Write the equation of a resolved structure."""

    @abstractmethod
    def decompose(self, weight: Tensor) -> Iterable[Tensor]:
        """Return factors that approximate a dense weight (out_features, in_features), in the order of the equation."""

    def suited(self, weight: Tensor) -> Structure:
        """Choose what depends on the weight alone, and not on the size: open places of a sparse matrix, say.

        Args:
            weight: dense matrix (out_features, in_features), its rows and columns scaled by the roots of the Grams'
                diagonals.
        """
        return self

    @classmethod
    @abstractmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterable[Structure]:
        """Yield the largest members of at most `budget` parameters, one per choice of shape; the fit decides."""


class Family(Protocol):
    """Structures of one kind whose sizes a budget finds: a structure's class, or a sum of such (`SumFamily`)."""

    @property
    def name(self) -> str:
        """The name, as in a rule or on a command line."""

    @property
    def refine_steps(self) -> int:
        """Default number of refinement steps of the members."""

    def candidates(self, in_features: int, out_features: int, budget: int) -> Iterable[Structure]:
        """Yield the largest members of at most `budget` parameters, as `Structure.candidates` does."""


def check_range(name: str, value: int, largest: int, rest: str) -> None:
    """Raise ValueError for a field outside 1..largest; `rest` says why that is the range, and the way out."""
    if not 1 <= value <= largest:
        raise ValueError(f"{name}={value} is outside 1..{largest}{rest}")


@cache
def _field_kinds(cls: type[Structure]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """Convert lists to tuples, and integers of any library to int."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def _is_kind(value: Any, kind: Any) -> bool:
    """Return whether a value fits an annotation (union, tuple or class); an int fits float, a bool fits bool only."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_kind(value, arg) for arg in args)
    if origin is tuple and isinstance(value, tuple):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(kinds) == len(value) and all(map(_is_kind, value, kinds))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else origin or kind)


S = TypeVar("S", bound=type[Structure])

_REGISTRY: dict[str, type[Structure]] = {}


def register(cls: S) -> S:
    """Add a structure to the registry under its `name` and `aliases` (a class decorator).

    Raises:
        ValueError: if another class has one of the names.
        TypeError: if the class is not a frozen dataclass.
    """
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise TypeError(f"{cls.__name__} is not a frozen dataclass; decorate it with @dataclass(frozen=True)")
    for name in (cls.name, *cls.aliases):
        owner = _find(name)
        if owner is not None and owner.__qualname__ != cls.__qualname__:  # a reloaded module registers again
            raise ValueError(f"the name {name!r} belongs to {owner.__name__}; choose another name")
    _REGISTRY[cls.name] = cls
    return cls


def registered(*, sized: bool = False) -> dict[str, type[Structure]]:
    """Return the registered structures by name; with `sized`, only those that find their sizes from a ratio."""
    return {name: cls for name, cls in _REGISTRY.items() if cls.sized or not sized}


def structure_class(name: str) -> type[Structure]:
    """Look up a structure by its registered name or an alias.

    Raises:
        ValueError: if the name is unknown; the message lists the known names and the nearest of them.
    """
    found = _find(name)
    if found is None:
        names = [other for cls in _REGISTRY.values() for other in (cls.name, *cls.aliases)]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"structure {name!r} is unknown; use one of {sorted(_REGISTRY)}, a sum such as 'lowrank+kmatrix', or for "
            f"whole models 'auto'{hint}"
        )
    return found


def _find(name: str) -> type[Structure] | None:
    return next((cls for cls in _REGISTRY.values() if name in (cls.name, *cls.aliases)), None)


def hyperparameters(structure: Structure) -> dict[str, Any]:
    """Return the fields of a structure by name."""
    assert dataclasses.is_dataclass(structure)
    return {field.name: getattr(structure, field.name) for field in dataclasses.fields(structure)}


def least_factors(structure: Structure) -> int:
    """Return a number that the factors of a structure reach at least, without writing its equation.

    An equation is as long as a file's few digits ask for, which is why readers count before they write it.

    Example:
        >>> from structlin.structures import Kaleidoscope, LowRank, Sum
        >>> least_factors(Sum((LowRank(rank=2), Kaleidoscope(width=10**7))))
        10000001
    """
    fields = hyperparameters(structure)
    repeated = [fields[name] for name in structure.repeats]
    values = [item for value in fields.values() for item in (value if isinstance(value, tuple) else (value,))]
    inside = sum(least_factors(value) for value in values if isinstance(value, Structure))
    return max(1, inside, *(value for value in repeated if value is not None))


def to_record(structure: Structure) -> dict[str, Any]:
    """Return a structure as plain JSON data: its registered name under `kind`, and its fields."""
    return {"kind": structure.name, **{name: _written(value) for name, value in hyperparameters(structure).items()}}


def _written(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_written(item) for item in value]
    return to_record(value) if isinstance(value, Structure) else value


def from_record(record: Mapping[str, Any]) -> Structure:
    """Read the data that `to_record` returned; lists become tuples, records become structures.

    Raises:
        ValueError: if the kind is unknown or the structure lacks one of the fields.
    """
    fields = {name: _read(value) for name, value in record.items() if name != "kind"}
    cls = structure_class(str(record.get("kind")))
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not set(fields) <= known:
        raise ValueError(f"{cls.name} has no field {sorted(set(fields) - known)}; it has {sorted(known)}")
    return cls(**fields)


def _read(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_read, value))
    return from_record(value) if isinstance(value, Mapping) else value


def shown(structure: Structure) -> dict[str, Any]:
    """Return the fields to print: those that are set, without the ones kept out of the repr (long ones)."""
    hidden = {field.name for field in dataclasses.fields(structure) if not field.repr}  # type: ignore[arg-type]
    given = hyperparameters(structure).items()
    return {name: value for name, value in given if value is not None and name not in hidden}


def show(structure: Structure) -> str:
    """Describe a structure in a line: its name and the fields that are set, the parts of a sum joined by a plus."""
    fields = shown(structure)
    if set(fields) == {"parts"}:
        return " + ".join(show(part) for part in fields["parts"])
    given = ", ".join(f"{name}={value}" for name, value in fields.items())
    return f"{structure.name}({given})"

"""What a structure is, and the registry of those that there are."""

from __future__ import annotations

import dataclasses
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from structlin.equation.spec import Spec


class Structure(ABC):
    """A family of structured matrices with its hyperparameters: subclass it as a frozen dataclass.

    A structure says which modes its equation has and how a dense weight decomposes into it. All else (forward,
    backward, counts, initialisation, printing, storage, budget search) follows from the equation.

    Fields may be left open (None) where they can be found from the size of the layer or from its weight; `resolve`
    fills them in. A resolved structure is what a layer holds and what a checkpoint stores. Fields are numbers, strings,
    None, structures, or tuples of them.
    """

    name: ClassVar[str]
    # Refinement steps that `from_linear` takes unless told otherwise: above 0 for a structure without a closed form.
    refine_steps: ClassVar[int] = 0
    # Whether `candidates` finds sizes from a budget.
    sized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Make lists tuples, and check every field against its annotation.

        Raises:
            TypeError: if a field is of another kind.
        """
        for name, kind in _field_kinds(type(self)).items():
            given = getattr(self, name)
            value = _plain(given)
            if not _is_kind(value, kind):
                expected = getattr(kind, "__name__", None) if isinstance(kind, type) else kind
                raise TypeError(f"{type(self).__name__}: {name}={given!r} is of the wrong kind; use {expected}")
            object.__setattr__(self, name, value)  # the way of frozen dataclasses

    @abstractmethod
    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Structure:
        """Fill in open fields and check all of them for a layer of this size.

        Args:
            in_features: size of the input.
            out_features: size of the output.
            weight: dense matrix (out_features, in_features), for fields that follow from it.
        Raises:
            ValueError: if a field is out of range, naming the range.
        """

    @abstractmethod
    def spec(self, in_features: int, out_features: int) -> Spec:
        """Write the equation of a resolved structure."""

    @abstractmethod
    def decompose(self, weight: Tensor) -> Iterable[Tensor]:
        """Approximate a dense weight (out_features, in_features) by the factors of the (resolved) equation."""

    @classmethod
    @abstractmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterable[Structure]:
        """Yield the largest members of at most `budget` parameters; one per choice of shape, the fit decides."""


@cache
def _field_kinds(cls: type[Structure]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """Lists as tuples, whole numbers of any library as int."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def _is_kind(value: Any, kind: Any) -> bool:
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
    """Add a structure to the registry under its `name` (a class decorator).

    Raises:
        ValueError: if another class has the name.
        TypeError: if the class is not a frozen dataclass.
    """
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise TypeError(f"{cls.__name__} is not a frozen dataclass; decorate it with @dataclass(frozen=True)")
    if _REGISTRY.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"the name {cls.name!r} belongs to {_REGISTRY[cls.name].__name__}; choose another name")
    _REGISTRY[cls.name] = cls
    return cls


def registered(*, sized: bool = False) -> dict[str, type[Structure]]:
    """Return the registered structures by name; with `sized`, those that find their sizes from a ratio."""
    return {name: cls for name, cls in _REGISTRY.items() if cls.sized or not sized}


def structure_class(name: str) -> type[Structure]:
    """Look a structure up by its registered name.

    Raises:
        ValueError: if the name is unknown, listing those that are known.
    """
    if name not in _REGISTRY:
        raise ValueError(f"structure {name!r} is unknown; use one of {sorted(_REGISTRY)}, or for whole models 'auto'")
    return _REGISTRY[name]


def hyperparameters(structure: Structure) -> dict[str, Any]:
    """Return the fields of a structure by name."""
    assert dataclasses.is_dataclass(structure)
    return {field.name: getattr(structure, field.name) for field in dataclasses.fields(structure)}


def to_record(structure: Structure) -> dict[str, Any]:
    """Write a structure as plain JSON data: its registered name under `kind`, and its fields."""
    return {"kind": structure.name, **{name: _written(value) for name, value in hyperparameters(structure).items()}}


def _written(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_written(item) for item in value]
    return to_record(value) if isinstance(value, Structure) else value


def from_record(record: Mapping[str, Any]) -> Structure:
    """Read what `to_record` wrote, lists back to tuples and records to structures.

    Raises:
        ValueError: if the kind is unknown or the fields are not those of the structure.
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


def show(structure: Structure) -> str:
    """Write a structure for people: its name and the fields that are set, the parts of a sum with a plus."""
    fields = hyperparameters(structure)
    if set(fields) == {"parts"}:
        return " + ".join(show(part) for part in fields["parts"])
    given = ", ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    return f"{structure.name}({given})"

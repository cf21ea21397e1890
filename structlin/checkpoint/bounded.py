"""Bounds on what a file may ask of its reader: JSON, structures and messages of limited size."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from structlin.equation.structure import Structure, from_record, least_factors

BYTES = 32 * 2**20
# Commas and opening brackets, which bound the number of values: an empty list in Python takes 20 times its text.
MARKS = 2**20
DEPTH = 32
MESSAGE = 2000  # letters of an error
LETTERS = 1000  # of a name
TEXT = 2**18  # letters of a hyperparameter: the places of a sparse matrix, a bit each
# Planning takes seconds for a chain of FACTORS, and grows with a high power of the length. A sum of FACTORS has fewer
# than VALUES in its record.
FACTORS = 128
VALUES = 4096
ITEMS = 64  # of a list: a torch tensor has no more axes
LARGEST_AXIS = 2**31 - 1


def shortened(message: str, most: int = MESSAGE) -> str:
    """Cut the middle out of a long message: a hostile field is not repeated whole."""
    half = most // 2 - 3
    return message if len(message) <= most else f"{message[:half]} ... {message[-half:]}"


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Raise what wrong data leads to as a ValueError of bounded length; `where` names what is no ValueError itself."""
    try:
        yield
    except ValueError as error:
        raise ValueError(shortened(str(error))) from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(shortened(f"{where}: {type(error).__name__}: {error}")) from error


def check_marks(text: bytes) -> None:
    """Refuse JSON text of too many values before it is parsed.

    Raises:
        ValueError: saying how many are allowed.
    """
    if (marks := sum(map(text.count, (b",", b"[", b"{")))) > MARKS:
        raise ValueError(f"{marks} commas and brackets; expected at most {MARKS}")


def parse(text: bytes) -> Any:
    """Parse JSON of bounded size and depth, without duplicate keys, NaN or infinities.

    Raises:
        ValueError: saying what is wrong with the text.
    """
    if len(text) > BYTES:
        raise ValueError(f"{len(text)} B; expected at most {BYTES} B")
    check_marks(text)
    try:
        value = json.loads(text.decode(), object_pairs_hook=_distinct, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:  # far deeper than check_depth allows
        raise ValueError(f"nested deeper than {DEPTH} levels") from error
    except ValueError as error:
        raise ValueError(shortened(f"not valid JSON: {error}")) from error
    check_depth(value)
    return value


def check_depth(value: Any, depth: int = DEPTH) -> None:
    """Refuse JSON data of too many levels.

    Raises:
        ValueError: saying how many are allowed.
    """
    if isinstance(value, (dict, list)):
        if depth < 1:
            raise ValueError(f"nested deeper than {DEPTH} levels")
        for child in value.values() if isinstance(value, dict) else value:
            check_depth(child, depth - 1)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"duplicate key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r}")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def check_values(value: Any, limit: int, where: str) -> int:
    """Check the numbers, texts and lists of a structure's record; return how many values it has.

    Args:
        value: JSON data.
        limit: the largest number.
        where: names the value in errors.
    Raises:
        ValueError: naming the value and what is allowed.
    """
    if isinstance(value, dict):
        # A letter of base64 holds six places of a sparse matrix: a text warrants a count of so many.
        limit = max(limit, 6 * max((len(item) for item in value.values() if isinstance(item, str)), default=0))
        return 1 + sum(check_values(item, limit, f"{where}: {key[:LETTERS]}") for key, item in value.items())
    if isinstance(value, list):
        if len(value) > ITEMS:
            raise ValueError(f"{where}: {len(value)} items; expected at most {ITEMS}")
        return 1 + sum(check_values(item, limit, where) for item in value)
    if isinstance(value, int) and abs(value) > limit:
        raise ValueError(f"{where}: {value} exceeds {limit}, the largest that sizes or tensors warrant")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value} is not finite")
    if isinstance(value, str) and len(value) > TEXT:
        raise ValueError(f"{where}: {len(value)} letters; expected at most {TEXT}")
    return 1


def check_record(record: Any, limit: int, where: str) -> None:
    """Check a structure's record before it is read; the arguments and errors are those of `check_values`."""
    check_depth(record)
    if (count := check_values(record, limit, where)) > VALUES:
        raise ValueError(f"{where}: {count} values of hyperparameters; expected at most {VALUES}")


def check_factors(structure: Structure, where: str) -> None:
    """Refuse a structure of too many factors before its equation is written.

    Raises:
        ValueError: saying how many are allowed.
    """
    if (least := least_factors(structure)) > FACTORS:
        raise ValueError(f"{where}: {structure} has {least} tensors or more; expected up to {FACTORS}")


def read_structure(record: Mapping[str, Any], limit: int = LARGEST_AXIS) -> Structure:
    """Read what `to_record` returned, checked.

    Args:
        record: JSON data.
        limit: the largest number.
    Raises:
        ValueError: naming the field and what is allowed.
    """
    check_record(record, limit, "structure")
    structure = from_record(record)
    check_factors(structure, "structure")
    return structure

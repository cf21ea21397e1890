"""The file from which a healing resumes: replaced at once, with a checksum, and read without running code in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

FORMAT = 4
_MARK = b"structlin heal sha256 "  # at the end of the file, before the 64 digits of all that is before the mark
_END = len(_MARK) + 64


def probe(path: Path) -> None:
    """Find out whether the file can be written, and leave it as it is.

    Raises:
        OSError: naming the path.
    """
    with _replacing(path):
        pass


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at once: an interruption leaves the old one.

    Raises:
        OSError: if it cannot be written, naming the path.
        TypeError: if the content could not be read again.
    """
    with _replacing(path) as fresh:
        with fresh.open("wb") as file:
            torch.save(content, file)
        if found := get_unsafe_globals_in_checkpoint(fresh):  # they could not be read again by weights_only=True
            raise TypeError(f"the optimizer's state holds {found[0]}, which is not stored; use checkpoint=None")
        with fresh.open("r+b") as file:
            digest = _digest(file, fresh.stat().st_size)
            file.write(_MARK + digest)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut may leave the new name with no content
        os.replace(fresh, path)


def read(path: Path, about: Mapping[str, str]) -> dict[str, Any]:
    """Read a file that `write` wrote, and refuse one whose "about" differs.

    Raises:
        ValueError: if it is damaged or of something else.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r} is not a file; name a file, such as {str(path / 'heal')!r}")
    try:
        with path.open("rb") as file:
            size = max(path.stat().st_size - _END, 0)
            file.seek(size)
            end = file.read()
            file.seek(0)
            intact = end == _MARK + _digest(file, size)
            if end.startswith(_MARK) and not intact:
                raise damaged(path)
            file.seek(0)  # given a path, torch would go by its suffix
            content: dict[str, Any] = torch.load(file, weights_only=True)
        theirs = content["about"]
        pairs = {name: (about.get(name, "missing"), theirs.get(name, "missing")) for name in {**about, **theirs}}
    except Exception as error:  # torch raises many kinds
        raise damaged(path) from error
    lines = [f"{name} is {ours}, in the file {other}" for name, (ours, other) in pairs.items() if ours != other]
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ValueError(
            f"{path} is of another healing: {'; '.join(lines[:3])}{more}. Give the student, parameters and optimizer "
            "that it was written with, or delete it to start again"
        )
    if not intact:
        raise damaged(path)
    return content


def damaged(path: Path) -> ValueError:
    """Return the error for a file that cannot be used."""
    return ValueError(f"{path}: damaged, or not a checkpoint of this version of heal; delete it to start again")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a new file beside the path to write to, remove it at the end, and name the path in errors."""
    fresh = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.touch()
        try:
            yield fresh
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"the checkpoint cannot be written: {error.strerror}", str(path)) from error


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the sha256 of the first bytes of a file as text, and leave the file behind them."""
    digest = hashlib.sha256()
    while size and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()

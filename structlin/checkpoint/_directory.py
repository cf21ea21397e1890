"""The directory of a checkpoint, which is replaced at once."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from structlin.checkpoint._files import OWN
from structlin.checkpoint.tensors import CheckpointError


def _sibling(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.structlin-{what}")


def readable(directory: Path) -> Path:
    """Return the directory, or the old one that a crash in the middle of a save left beside it."""
    target = directory.resolve()
    previous = _sibling(target, "previous")
    if not target.exists() and previous.is_dir():
        return previous
    if not target.is_dir():
        raise CheckpointError(f"{directory}: no such directory; expected one written by structlin.save")
    return target


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yield a new directory that takes the place of `directory` when the block ends without an error.

    Files of the old directory that are not a checkpoint's are kept (by hard links where the file system has them).
    """
    target = directory.resolve()
    fresh = _sibling(target, f"tmp-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _repair(target)
        fresh.mkdir()
        yield fresh
        if target.exists():
            _keep_foreign(target, fresh)
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
        _swap(fresh, target)
    except (OSError, shutil.Error) as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _repair(target: Path) -> None:
    """Undo what a killed save left: its temporaries, and an old directory that was moved aside."""
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file")
    previous = _sibling(target, "previous")
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(target)
    prefix = _sibling(target, "tmp-").name
    for path in target.parent.iterdir():
        if path.name.startswith(prefix):
            shutil.rmtree(path, ignore_errors=True)


def _keep_foreign(target: Path, fresh: Path) -> None:
    def own(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder) == target and OWN.fullmatch(name)}

    shutil.copytree(target, fresh, symlinks=True, ignore=own, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and os.name == "posix"):
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(fresh: Path, target: Path) -> None:
    previous = _sibling(target, "previous")
    try:
        if target.exists():
            target.rename(previous)
        fresh.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)

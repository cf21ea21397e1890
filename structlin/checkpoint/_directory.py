"""The directory of a checkpoint: its file names, bounded JSON, and its replacement in one step."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from structlin.checkpoint import bounded

MANIFEST = "structlin.json"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
OWN = re.compile(f"{re.escape(MANIFEST)}|{re.escape(INDEX)}|{SHARD.pattern}")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged, or does not fit the model; nothing was changed."""

    def __init__(self, message: str) -> None:
        super().__init__(bounded.shortened(message))


@contextmanager
def explaining(problem: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Raise errors of one kind as a CheckpointError that names the problem first."""
    try:
        yield
    except CheckpointError:
        raise
    except kind as error:
        raise CheckpointError(f"{problem}: {type(error).__name__}: {error}") from error


def plain_file(directory: Path, name: str) -> Path:
    """Return the path of a regular file of the directory, possibly a link: the Hugging Face cache links to its blobs.

    The name must be one of `OWN`, so that no file can name a path outside the directory.
    """
    path = directory / name
    with explaining(f"{path}: missing or unreadable", OSError):
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait forever
            raise CheckpointError(f"{path}: not a regular file; put a copy of the file there")
    return path


def read_json(directory: Path, name: str) -> Any:
    """Read a JSON file within the bounds of `bounded.parse`."""
    path = plain_file(directory, name)
    if (size := path.stat().st_size) > bounded.BYTES:
        raise CheckpointError(f"{path}: {size} B; expected at most {bounded.BYTES} B")
    try:
        return bounded.parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def readable(directory: Path) -> Path:
    """Return the directory, or its predecessor if a crash between the two renames of a save left only that."""
    target = directory.resolve()
    previous = _sibling(target, "previous")
    if not target.exists() and previous.is_dir():
        return previous
    if not target.is_dir() and HUB_ID.fullmatch(str(directory)):
        return _in_hub_cache(str(directory))
    if not target.is_dir():
        raise CheckpointError(f"{directory}: no such directory; expected one written by structlin.save")
    return target


def _in_hub_cache(name: str) -> Path:
    """Return the snapshot of a repository in the cache of the Hugging Face hub: nothing is downloaded."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}"
    with explaining(f"{name}: no such directory, nor in the cache {cache}; run hf download {name}", OSError):
        revision = (cache / "refs" / "main").read_text("utf-8").strip()
    snapshot = cache / "snapshots" / plain_part(revision)
    if not snapshot.is_dir():
        raise CheckpointError(f"{name}: the cache {cache} has no snapshot {revision}; run hf download {name}")
    return snapshot


def plain_part(name: str) -> str:
    """Refuse a name that could lead out of its directory."""
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
        raise CheckpointError(f"{name!r} is no name of a directory")
    return name


def _sibling(target: Path, what: str) -> Path:
    # In the same parent: a rename is atomic only within one file system.
    return target.with_name(f".{target.name}.structlin-{what}")


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yield a new directory that replaces `directory` if the block succeeds.

    Files that do not belong to a checkpoint move along, as hard links where the file system has them.
    """
    target = directory.resolve()  # a link to the directory stays a link
    fresh = _sibling(target, f"tmp-{secrets.token_hex(4)}")
    with explaining(f"{directory}: cannot be written", OSError):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _repair(target)
            fresh.mkdir()
            yield fresh
            if target.exists():
                _keep_foreign(target, fresh)
            # All data reaches the disk before the rename does: a power cut must not leave a new name with empty files.
            for path in (*fresh.rglob("*"), fresh):
                _sync(path)
            _swap(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _repair(target: Path) -> None:
    """Clean up after a killed save: put back a directory that was moved aside, delete temporary ones."""
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file")
    previous = _sibling(target, "previous")
    if previous.exists() and not target.exists():
        previous.rename(target)
    for path in target.parent.iterdir():
        if path == previous or path.name.startswith(_sibling(target, "tmp-").name):
            shutil.rmtree(path, ignore_errors=True)


def _keep_foreign(target: Path, fresh: Path) -> None:
    def own(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder) == target and (OWN.fullmatch(name) or (fresh / name).exists())}

    shutil.copytree(target, fresh, symlinks=True, ignore=own, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _sync(path: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and os.name == "posix"):
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(fresh: Path, target: Path) -> None:
    # No portable call exchanges two directories. A crash between the two renames leaves `previous`, see `readable`.
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

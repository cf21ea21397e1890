"""The directory of a checkpoint as readers see it: file names, bounded JSON, and reads beside a saver."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from structlin.checkpoint import bounded

MANIFEST = "structlin.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
PREVIOUS = ".structlin-previous"  # in a directory whose files are being replaced one by one: links to the old ones
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
OWN = re.compile(f"{re.escape(MANIFEST)}|{re.escape(INDEX)}|{SHARD.pattern}")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name

TRIES = 10  # to read a checkpoint that is saved again and again
T = TypeVar("T")


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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file to errors of writing it, which have none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # one of a bare text shows that text alone
            error.filename = error.filename or path.name
        raise


def plain_file(directory: Path, name: str) -> Path:
    """Return the path of a regular file of the directory, possibly a link: the Hugging Face cache links to its blobs.

    The name must be one of `OWN`, so that no file can name a path outside the directory.
    """
    path = directory / name
    with explaining(f"{path}: missing or unreadable", OSError):
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait forever
            raise CheckpointError(f"{path}: not a regular file; put a copy of the file there")
        path.open("rb").close()  # safetensors calls a file that may not be read a missing one
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
    """Return the folder that holds the checkpoint: the directory, or what a save that was cut off left beside or in it.

    Raises:
        CheckpointError: if there is no such directory, or it may not be searched.
    """
    with explaining(f"{directory}: cannot be read", OSError):
        target = directory.resolve()
        # The target twice: a save may end, and remove the previous one, between the first two looks.
        for folder in (target, sibling(target, "previous"), target):
            found = folder / PREVIOUS if (folder / PREVIOUS).is_dir() else folder
            if holds_checkpoint(found):
                return found
        if target.is_dir():
            return target  # what it lacks is said by who reads it
        if HUB_ID.fullmatch(str(directory)):
            return _in_hub_cache(str(directory))
        with suppress(FileNotFoundError, NotADirectoryError):
            target.stat()  # a parent that may not be searched is another thing
    raise CheckpointError(f"{directory}: no such directory; expected one written by structlin.save")


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder has the first file that is read of a checkpoint, or of a folder of transformers."""
    return any((folder / name).exists() for name in (MANIFEST, INDEX, SINGLE))


def undisturbed(directory: Path, read: Callable[[Path], T]) -> T:
    """Read a checkpoint, and again if a saver replaced it meanwhile, so that the result is never of two saves.

    Args:
        directory: of the checkpoint.
        read: gets the folder to read; has no lasting effects.
    Raises:
        CheckpointError: of `read`, if the checkpoint was at rest; if it was replaced in each of `TRIES` tries.
    """
    for _ in range(TRIES):
        before = _state(directory)
        try:
            with explaining(f"{directory}: cannot be read", OSError):
                found = read(readable(directory))
        except Exception:
            if before == _state(directory):
                raise
        else:
            if before == _state(directory):
                return found
            del found  # there may be no memory for two
    raise CheckpointError(
        f"{directory}: replaced while it was read, {TRIES} times; load it when it is saved less often"
    )


def _state(directory: Path) -> object:
    """Return what differs after a save: each makes new files, and one that is undone makes new links to the old."""
    try:
        folder = readable(directory)
    except CheckpointError:
        return None
    return folder, [_identity(folder / name) for name in ("", MANIFEST, INDEX, SINGLE, CONFIG)]


def _identity(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    times = (found.st_size, found.st_mtime_ns, found.st_ctime_ns) if stat.S_ISREG(found.st_mode) else ()
    return found.st_dev, found.st_ino, *times


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


def sibling(target: Path, what: str) -> Path:
    """Return the hidden path beside a directory that a save uses: a rename is atomic only within one file system."""
    return target.parent / f".{target.name}.structlin-{what}"

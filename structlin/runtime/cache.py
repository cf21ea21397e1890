"""Files in the user's cache: only those that no other user could have written are read; writing is atomic."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

WORK = "structlin-tmp-"  # temporary folders begin so
ABANDONED = 3600  # s after which a temporary folder is that of a killed process


def cache_folder() -> Path:
    """Return the folder of records and built kernels: $STRUCTLIN_CACHE, else `structlin` in the user's cache."""
    if named := os.environ.get("STRUCTLIN_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structlin"
    except RuntimeError as error:
        raise FileNotFoundError("no home folder is known; set $STRUCTLIN_CACHE to a folder of your own") from error


def listed(start: str, end: str) -> list[Path]:
    """Return the files of the cache whose names start and end so; none if the folder cannot be read."""
    try:
        folder = cache_folder()
        return sorted(folder / name for name in os.listdir(folder) if name.startswith(start) and name.endswith(end))
    except OSError:
        return []


def read(path: Path) -> bytes:
    """Read a file of the cache.

    Raises:
        FileNotFoundError: if there is none, or none that this user can reach.
        OSError: if other users than root own it or its folder, or may write to them; or if it cannot be read.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise FileNotFoundError(f"there is no {path}") from error
    _trust(path.parent, path.parent.stat())
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file")
    _trust(path, status)
    return path.read_bytes()


def write(path: Path, content: bytes) -> None:
    """Write a file that its owner alone may open; readers see all of it or nothing, even after a power cut."""
    with workplace(path.parent) as folder:
        made = folder / path.name
        with open(made, "xb", opener=partial(os.open, mode=0o600)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():
            remove(path)  # `replace` cannot
        made.replace(path)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Make a temporary folder in the cache (whence files can be moved at once), and remove those of killed processes.

    Raises:
        OSError: if the cache's folder cannot be made or written, or if other users own it or may write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _trust(folder, folder.stat())
    for left in folder.glob(f"{WORK}*"):
        with suppress(OSError):  # another process may be removing it too
            if left.lstat().st_mtime < time.time() - ABANDONED:
                remove(left)
    with tempfile.TemporaryDirectory(prefix=WORK, dir=folder) as made:
        yield Path(made)


def _trust(path: Path, status: os.stat_result) -> None:
    """Refuse what another user could have written: a library in the cache is code that runs in this process."""
    if os.name != "posix":
        return
    if status.st_uid not in (0, os.geteuid()):  # root may write anywhere: an image's kernel serves all its users
        raise PermissionError(
            f"{path} belongs to user {status.st_uid}, not to root or to {os.geteuid()} who runs this process; "
            "set $STRUCTLIN_CACHE to a folder of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"users other than its owner may write to {path} (mode {stat.S_IMODE(status.st_mode):o}); "
            f"run chmod go-w {path}, or set $STRUCTLIN_CACHE to a folder of your own"
        )

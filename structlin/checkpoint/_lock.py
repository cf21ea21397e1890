"""One saver at a time: a lock on a directory that ends with its owner, however that ends."""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from structlin.checkpoint._directory import CheckpointError, explaining, naming, sibling

LOCK = ".structlin-lock"
OWNER_BYTES = 200
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # in a folder that all may write, a link may lead to any file
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

if sys.platform == "win32":
    import msvcrt

    FAR = 2**30  # others cannot read bytes that are locked: lock one behind the text

    def _try_lock(handle: int) -> None:
        os.lseek(handle, FAR, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
        os.lseek(handle, 0, os.SEEK_SET)

    def _unlock(handle: int) -> None:
        os.lseek(handle, FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _try_lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this opening of the file: threads exclude each other

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing would not do: processes forked meanwhile have the handle too


@contextmanager
def locked(target: Path) -> Iterator[Path]:
    """Keep other savers, in any process or thread, away from a directory while the block runs.

    Args:
        target: the directory; if it is missing, its parent is there.
    Yields:
        The lock file: beside the directory, or in it where the parent cannot be written.
    Raises:
        CheckpointError: naming the process that has the lock.
    """
    path = sibling(target, "lock")
    with explaining(f"{target}: cannot be written", OSError):
        try:
            handle = _taken(path, target)
        except OSError:
            if not target.is_dir():
                raise
            path = target / LOCK
            handle = _taken(path, target)
    try:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        with explaining(f"{target}: cannot be written", OSError), naming(path):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
        yield path
    finally:
        if _is_named(handle, path):  # and not another's, where a user deleted ours
            with suppress(OSError):  # Windows deletes no open file
                path.unlink()  # before the lock ends: who opened this file sees that it has lost its name
        with suppress(OSError):
            _unlock(handle)
        os.close(handle)
        if os.name == "nt":
            with suppress(OSError):  # if another has opened it by now
                path.unlink()


def _taken(path: Path, target: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        except PermissionError as error:
            if path.exists():
                raise CheckpointError(f"{target} is being saved by another user; {_advice(path)}") from error
            raise
        try:
            _try_lock(handle)
            if _is_named(handle, path):
                return handle
        except BlockingIOError as error:
            owner = os.read(handle, OWNER_BYTES).decode("utf-8", "replace") or "another process"
            os.close(handle)
            raise CheckpointError(f"{target} is being saved by {owner}; {_advice(path)}") from error
        except OSError as error:
            if error.errno in NO_LOCKS:
                warnings.warn(f"{path.parent} has no file locks; let one process save {target} at a time", stacklevel=2)
                return handle
            os.close(handle)
            raise
        os.close(handle)


def _is_named(handle: int, path: Path) -> bool:
    """Whether a path still leads to the open file: its last owner may have deleted it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _advice(path: Path) -> str:
    return f"wait for it, save elsewhere or, if it is gone for good, delete {path}"

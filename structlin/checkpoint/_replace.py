"""The directory of a checkpoint as savers see it: locked, replaced in one step, and mended after a crash.

A new directory is written beside the old one and takes its name. Where that cannot be or should not (a mount point,
the working directory, a parent without write permission), the files are replaced one by one, while `PREVIOUS` in
the directory holds links to all the old ones: as long as it exists, it is the checkpoint.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from structlin.checkpoint._directory import (
    CONFIG,
    MANIFEST,
    OWN,
    PREVIOUS,
    CheckpointError,
    explaining,
    holds_checkpoint,
    sibling,
)
from structlin.checkpoint._lock import locked

TEMPORARY = ".structlin-tmp-"  # in a directory; beside one, its name goes before


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yield a new directory that replaces `directory` if the block succeeds.

    Files that do not belong to a checkpoint move along, as hard links where the file system has them.
    """
    with explaining(f"{directory}: cannot be written", OSError):
        target = directory.resolve()  # a link to the directory stays a link
        if any(".structlin-" in part for part in target.parts):  # "." in a directory that another process has replaced
            raise CheckpointError(
                f"{target} is what another save leaves behind; give the path of the checkpoint itself"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target) as lock:
            stays = lock.parent != target.parent or must_stay(target)
            _repair(target, stays)
            fresh = _temporary(target, inside=stays)
            fresh.mkdir()
            try:
                if target.exists():
                    fresh.chmod(stat.S_IMODE(target.stat().st_mode) | stat.S_IRWXU)
                yield fresh
                for path in (*fresh.iterdir(), fresh):
                    sync(path)
                if target.exists():
                    _keep_modes(target, fresh)
                if stays:
                    _replace_files(target, fresh)
                else:
                    _replace_directory(target, fresh)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)


def must_stay(target: Path) -> bool:
    """Whether a directory cannot be replaced as a whole, or this process would lose its working directory by it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return os.path.ismount(target)
    return os.path.ismount(target) or target in (here, *here.parents)


def _temporary(target: Path, *, inside: bool) -> Path:
    name = f"{TEMPORARY}{secrets.token_hex(4)}"
    return target / name if inside else target.parent / f".{target.name}{name}"


def _repair(target: Path, stays: bool) -> None:
    """Mend what a killed save left: put the previous checkpoint back if there is no other, delete temporary folders."""
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file")
    if (target / PREVIOUS).exists():
        _put_back(target)
    previous = sibling(target, "previous")
    if previous.exists() and holds_checkpoint(target):
        with suppress(OSError):
            _discard(previous, _temporary(target, inside=False))
    elif previous.exists():
        if stays:
            raise CheckpointError(f"{previous} is the checkpoint, as a crash left it; move its files into {target}")
        if target.exists():  # made by the user: what it holds goes to the checkpoint
            shutil.copytree(target, previous, symlinks=True, copy_function=link_or_copy, dirs_exist_ok=True)
            _sync_folders(previous)
            shutil.rmtree(target)
        previous.rename(target)
    # The lock is ours: who made these is gone.
    for folder, start in ((target.parent, f".{target.name}{TEMPORARY}"), (target, TEMPORARY)):
        with suppress(FileNotFoundError, PermissionError):  # a new directory; a parent that may not be listed
            for name in os.listdir(folder):
                if name.startswith(start):
                    shutil.rmtree(folder / name, ignore_errors=True)


def _keep_modes(target: Path, fresh: Path) -> None:
    """Give each new file the permissions of the one that it replaces, or of another one of the old checkpoint."""
    old = sorted(path for path in target.iterdir() if OWN.fullmatch(path.name) and path.is_file())
    for path in fresh.iterdir():
        for like in [target / path.name, *old]:
            if like.is_file():
                shutil.copymode(like, path)
                break


def sync(path: Path) -> None:
    """Force a file or a folder's list of names to the disk."""
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and os.name == "posix"):
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_or_copy(source: str | Path, destination: str | Path) -> None:
    """Make a hard link in the place of what is there, or a copy where the file system has none."""
    Path(destination).unlink(missing_ok=True)
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)
        sync(Path(destination))


def _sync_folders(top: Path) -> None:
    for folder, _, _ in os.walk(top):
        sync(Path(folder))


def _discard(folder: Path, aside: Path) -> None:
    """Delete a folder that is read if it is there: it must not be seen half deleted."""
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


# The directory as a whole --------------------------------------------------------------------------------------------


def _replace_directory(target: Path, fresh: Path) -> None:
    written = os.listdir(fresh)
    if target.exists():
        _keep_foreign(target, fresh)
        _sync_folders(fresh)
    # All data is on the disk before the rename: a power cut must not leave a new name with empty files.
    if not _swap(fresh, target):
        inside = _temporary(target, inside=True)
        inside.mkdir()
        try:
            _link_all(fresh, inside, written)
            _replace_files(target, inside)
        finally:
            shutil.rmtree(inside, ignore_errors=True)


def _keep_foreign(target: Path, fresh: Path) -> None:
    def own(folder: str, names: list[str]) -> set[str]:
        if Path(folder) != target:
            return set()
        ours = (name for name in names if OWN.fullmatch(name) or name.startswith(".structlin-"))
        return {*ours, *os.listdir(fresh)}

    shutil.copytree(target, fresh, symlinks=True, ignore=own, copy_function=link_or_copy, dirs_exist_ok=True)


def _swap(fresh: Path, target: Path) -> bool:
    """Let a new directory take the name of the old one; return False if the old one cannot be renamed."""
    # No portable call exchanges two directories. A crash between the two renames leaves `previous`, see `readable`.
    previous = sibling(target, "previous")
    if target.exists():
        try:
            target.rename(previous)
        except OSError:  # a bind mount, a lower layer of an overlay, a directory of another user in a sticky one
            return False
    try:
        fresh.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise
    sync(target.parent)
    if previous.exists():
        with suppress(OSError):  # Windows, with a reader in it: the next save tries again
            _discard(previous, _temporary(target, inside=False))
    return True


# File by file --------------------------------------------------------------------------------------------------------


def _replace_files(target: Path, fresh: Path) -> None:
    """Move files into a directory, in the place of the old checkpoint; readers have the old one until all are there."""
    new = os.listdir(fresh)
    old = _temporary(target, inside=True)
    old.mkdir()
    try:
        _link_all(target, old, (n for n in os.listdir(target) if OWN.fullmatch(n) or n == CONFIG or n in new))
        old.rename(target / PREVIOUS)
        sync(target)
        _move(fresh, target)
    except BaseException:
        shutil.rmtree(old, ignore_errors=True)
        if (target / PREVIOUS).exists():
            _put_back(target)
        raise
    _discard(target / PREVIOUS, _temporary(target, inside=True))
    sync(target)


def _put_back(target: Path) -> None:
    """Undo what a replacement of files has done."""
    fresh = _temporary(target, inside=True)
    fresh.mkdir()
    _link_all(target / PREVIOUS, fresh, os.listdir(target / PREVIOUS))
    _move(fresh, target)
    shutil.rmtree(fresh, ignore_errors=True)  # a rename between two links to one file does nothing
    _discard(target / PREVIOUS, fresh)


def _link_all(source: Path, destination: Path, names: Iterable[str]) -> None:
    for name in names:
        path = source / name
        if path.is_symlink():  # a relative one leads elsewhere from another folder
            (destination / name).symlink_to(path.resolve())
        else:
            link_or_copy(path, destination / name)
    sync(destination)


def _move(fresh: Path, target: Path) -> None:
    new = sorted(os.listdir(fresh), key=lambda name: (name == MANIFEST, name))  # last: it names the others
    for name in new:
        os.replace(fresh / name, target / name)
    for name in os.listdir(target):
        if OWN.fullmatch(name) and name not in new:
            (target / name).unlink()
    sync(target)

"""The directory of a checkpoint: locked, replaced where it stands, read beside savers and after crashes."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from structlin import LowRankLinear
from structlin.checkpoint import CheckpointError, _lock, _replace, api, load, save, tensors, verify
from structlin.checkpoint._lock import locked
from structlin.checkpoint.journal import Journal

posix = pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")


def model(value: float = 0.0) -> nn.Sequential:
    """All of its parameters have one value."""
    found = nn.Sequential(LowRankLinear(8, 8, rank=2), nn.Linear(8, 8))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.fill_(value)
    return found


def value_in(path: str | Path, **options: object) -> float:
    """The value of all parameters of a checkpoint."""
    found = load(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), path, **options)
    values = {float(entry) for parameter in found.parameters() for entry in parameter.detach().flatten()}
    assert len(values) == 1, values
    return values.pop()


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = save(model(0), tmp_path / "out", max_shard_bytes=200)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read and write everything: be another user."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# One saver at a time -------------------------------------------------------------------------------------------------


def test_second_saver_is_told_who_saves(saved: Path) -> None:
    with locked(saved) as lock:
        owner = (
            f"out is being saved by process {os.getpid()} on {socket.gethostname()} since 2.*; wait for it, save else"
        )
        with pytest.raises(CheckpointError, match=owner):
            save(model(1), saved)
        assert value_in(saved) == 0
        assert verify(saved).layers
        assert lock.name in names(saved.parent)
    save(model(1), saved)
    assert names(saved.parent) == ["out"]


def test_a_lock_file_without_an_owner_is_no_lock(saved: Path) -> None:
    lock = saved.parent / ".out.structlin-lock"
    lock.write_text("process 1 on elsewhere since 2020")
    save(model(1), saved)
    assert names(saved.parent) == ["out"]
    assert value_in(saved) == 1


def test_threads_save_one_at_a_time(saved: Path) -> None:
    barrier, problems = threading.Barrier(3), []

    def saver(value: int) -> None:
        barrier.wait()
        for _ in range(8):
            try:
                save(model(value), saved, max_shard_bytes=200)
            except CheckpointError as error:
                problems.append(str(error))

    threads = [threading.Thread(target=saver, args=(value,)) for value in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("is being saved by" in problem for problem in problems)
    assert value_in(saved) in (1, 2, 3)
    assert names(saved.parent) == ["out"]


def test_a_lock_file_that_its_owner_has_deleted_is_made_again(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = _lock._try_lock, []

    def after_another(handle: int) -> None:
        real(handle)
        if not tries:
            (saved.parent / ".out.structlin-lock").unlink()
        tries.append(handle)

    monkeypatch.setattr(_lock, "_try_lock", after_another)
    with locked(saved) as lock:
        assert len(tries) == 2
        assert lock.read_text().startswith(f"process {os.getpid()} ")
        with pytest.raises(CheckpointError, match="is being saved by"), locked(saved):
            pass


def test_file_systems_without_locks_are_reported(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(_lock, "_try_lock", fail)
    with pytest.warns(UserWarning, match="has no file locks; let one process save .*out at a time"):
        save(model(1), saved)
    assert value_in(saved) == 1
    assert names(saved.parent) == ["out"]


@posix
def test_lock_of_another_user(open_folder: Path) -> None:
    lock = open_folder / ".out.structlin-lock"
    lock.touch(0o400)
    with unprivileged():
        (open_folder / "out").mkdir()
        lock_error = "out is being saved by another user; .*delete .*structlin-lock"
        with pytest.raises(CheckpointError, match=lock_error):
            save(model(1), open_folder / "out")
    assert names(open_folder / "out") == []


@posix
def test_lock_file_that_is_a_link_is_not_written(saved: Path) -> None:
    (saved.parent / "precious").write_text("precious")
    (saved.parent / ".out.structlin-lock").symlink_to("precious")
    save(model(1), saved)
    assert (saved.parent / "precious").read_text() == "precious"
    assert value_in(saved) == 1


def test_unfinished_work_locks_its_target(tmp_path: Path) -> None:
    with Journal.opened(tmp_path / "out", {}) as journal:
        with pytest.raises(CheckpointError, match="is being saved by process"), Journal.opened(tmp_path / "out", {}):
            pass
        with pytest.raises(CheckpointError, match="is being saved by process"):
            save(model(), tmp_path / "out")
        journal.begin()
        with pytest.raises(CheckpointError, match=r"out: cannot be written: .*No space left on device: 'model.safete"):
            full_disk_in(lambda: journal.add("model.safetensors", {"a": torch.ones(2)}, {}))
        journal.add("model.safetensors", {"a": torch.ones(2)}, {})
        journal.finish()
    assert names(tmp_path) == ["out"]


def test_unfinished_work_refuses_a_target_that_must_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(CheckpointError, match=r"holds the working directory, .*; give a new"),
        Journal.opened(Path(), {}),
    ):
        pass
    assert names(tmp_path) == []


# Directories that stay where they are --------------------------------------------------------------------------------


def full_disk_in(run: Callable[[], object]) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        run()


@pytest.mark.parametrize("shown", [".", ".."])
def test_working_directory_stays(shown: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "logs").mkdir()
    here = saved if shown == "." else saved / "logs"
    monkeypatch.chdir(here)
    identity, before = saved.stat().st_ino, names(saved)
    assert value_in(shown) == 0
    save(model(1), shown, max_shard_bytes=200)
    assert Path.cwd() == here
    assert saved.stat().st_ino == identity
    assert names(saved) == before
    assert names(saved.parent) == ["out"]
    assert value_in(shown) == value_in(saved) == 1
    save(model(2), shown)
    assert names(saved) == ["logs", "model.safetensors", "structlin.json", "tokenizer.json"]
    assert value_in(saved) == 2


def test_working_directory_that_another_process_replaces(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    saved.rename(saved.parent / ".out.structlin-previous")
    with pytest.raises(CheckpointError, match="previous is what another save leaves behind; give the path of the chec"):
        save(model(1), ".")
    assert value_in(saved) == 0


def test_first_save_into_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").touch()
    save(model(1), ".")
    assert names(tmp_path) == ["model.safetensors", "notes", "structlin.json"]
    assert value_in(".") == 1


def test_mount_points_stay(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == saved)
    before = names(saved), saved.stat().st_ino
    save(model(1), saved, max_shard_bytes=200)
    assert (names(saved), saved.stat().st_ino) == before
    assert value_in(saved) == 1


@posix
def test_parent_that_may_not_be_written(open_folder: Path) -> None:
    with unprivileged():
        path = save(model(0), open_folder / "parent" / "out")
        path.parent.chmod(0o500)
        try:
            save(model(1), path, max_shard_bytes=200)
            assert value_in(path) == 1
            shards = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
            assert names(path) == [*shards, "model.safetensors.index.json", "structlin.json"]
            with locked(path) as lock:
                assert lock.parent == path
                with pytest.raises(CheckpointError, match="is being saved by process"):
                    save(model(2), path)
            with pytest.raises(CheckpointError, match=r"other: cannot be written: PermissionError"):
                save(model(2), path.parent / "other")
            with pytest.raises(CheckpointError, match=r"lies in one that may not be written"), Journal.opened(path, {}):
                pass
        finally:
            path.parent.chmod(0o700)
        assert names(path.parent) == ["out"]


@pytest.mark.parametrize("links", [True, False])
def test_directory_that_cannot_be_renamed(links: bool, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bind mount, say, or a lower layer of an overlay."""
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == saved:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "rename", fail)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    before = names(saved), saved.stat().st_ino
    save(model(1), saved, max_shard_bytes=200)
    assert (names(saved), saved.stat().st_ino) == before
    assert names(saved.parent) == ["out"]
    assert value_in(saved) == 1


@posix
def test_shards_that_are_links_are_put_back_as_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(model(0), tmp_path / "out")
    (tmp_path / "blob").write_bytes((path / "model.safetensors").read_bytes())
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("../blob")
    monkeypatch.chdir(path)
    interrupt_the_move(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        save(model(1), ".")
    assert (path / "model.safetensors").is_symlink()
    assert value_in(path) == 0


def interrupt_the_move(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    real, left = os.replace, [at]

    def replacing(source: object, destination: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr(os, "replace", replacing)


@pytest.mark.parametrize("at", range(1, 6))
def test_interrupted_replacement_of_files_is_undone(at: int, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.chdir(saved)
    interrupt_the_move(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        save(model(1), ".", max_shard_bytes=200)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert names(saved.parent) == ["out"]


def test_full_disk_names_the_file_and_changes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(saved)
    for path in (str(saved), "."):
        with pytest.raises(
            CheckpointError, match=r"cannot be written: OSError: .*space left on device: 'model.safetens"
        ):
            full_disk_in(lambda path=path: save(model(1), path))
        assert names(saved) == before
        assert names(saved.parent) == ["out"]
        assert value_in(saved) == 0
        monkeypatch.chdir(saved)


def test_interrupt_just_after_the_renames_keeps_the_new(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        found = rename(self, target)
        if target == saved:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(model(1), saved)
    assert value_in(saved) == 1
    save(model(2), saved)
    assert names(saved.parent) == ["out"]


# Crashes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_file", [False, True])
def test_new_directory_after_a_crash_loses_nothing(with_file: bool, saved: Path) -> None:
    saved.rename(saved.parent / ".out.structlin-previous")
    saved.mkdir()
    if with_file:
        (saved / "tokenizer.json").write_text("[]")
        (saved / "more").mkdir()
        (saved / "more" / "notes").touch()
    assert value_in(saved) == 0
    with pytest.raises(CheckpointError, match="No space left"):
        full_disk_in(lambda: save(model(1), saved))
    assert value_in(saved) == 0
    save(model(1), saved, max_shard_bytes=200)
    assert value_in(saved) == 1
    assert (saved / "tokenizer.json").read_text() == ("[]" if with_file else "{}")
    assert (saved / "more" / "notes").exists() == with_file
    assert names(saved.parent) == ["out"]


def test_crash_and_a_new_directory_that_must_stay(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.rename(saved.parent / ".out.structlin-previous")
    saved.mkdir()
    monkeypatch.chdir(saved)
    with pytest.raises(CheckpointError, match=r"structlin-previous is the checkpoint, .*; move its files into .*out"):
        save(model(1), ".")
    assert value_in(".") == 0


# Readers beside a saver ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["whole", "in place"])
def shown(request: pytest.FixtureRequest, saved: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The directory, as one that is replaced as a whole or file by file."""
    if request.param == "whole":
        return str(saved)
    monkeypatch.chdir(saved)
    return "."


def save_while_reading(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], times: int) -> None:
    """Run something between the headers and the data, so many times."""
    real, left = api._read, [times]

    def read(folder: Path, skeleton: nn.Module | None) -> object:
        found = real(folder, skeleton)
        if left[0]:
            left[0] -= 1
            run()
        return found

    monkeypatch.setattr(api, "_read", read)


@pytest.mark.parametrize("check_hashes", [True, False])
def test_reader_beside_a_saver_gets_the_new(check_hashes: bool, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_while_reading(monkeypatch, lambda: save(model(1), shown, max_shard_bytes=200), 1)
    assert value_in(shown, check_hashes=check_hashes) == 1
    save_while_reading(monkeypatch, lambda: save(model(2), shown, metadata={"a": 2}), 1)
    assert verify(shown, check_hashes=check_hashes).metadata == {"a": 2}


def test_reader_beside_a_saver_that_is_interrupted(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader sees files of both saves, and at the end the same ones as at its beginning."""
    real, begun = tensors.opened, []

    def opened(directory: Path, shard: str) -> object:
        if ".structlin-tmp" in str(directory):
            pass  # read by `save`
        elif not begun:
            begun.append(shard)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_replace, "_put_back", lambda _: None)
                interrupt_the_move(patch, 3)
                with pytest.raises(KeyboardInterrupt):
                    save(model(1), ".", max_shard_bytes=200)
        elif len(begun) < 3:
            begun.append(shard)
            if len(begun) == 3:
                _replace._put_back(saved)
        return real(directory, shard)

    checkpoint = api._read(saved, None)
    monkeypatch.setattr(api, "_read", lambda folder, skeleton: replace(checkpoint, directory=folder))
    monkeypatch.setattr(tensors, "opened", opened)
    monkeypatch.chdir(saved)
    assert value_in(".", check_hashes=False) == 0
    assert begun[:3] == list(checkpoint.shards)


def test_reader_gives_up_after_some_tries(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_while_reading(monkeypatch, lambda: save(model(1), shown), 100)
    skeleton = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(CheckpointError, match="replaced while it was read, 10 times; load it when"):
        load(skeleton, shown)
    assert type(skeleton[0]) is nn.Linear


def test_reader_in_the_middle_of_a_replacement_of_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, found = os.replace, []

    def replacing(source: object, destination: object) -> None:
        real(source, destination)
        found.append(value_in(saved, check_hashes=False))

    monkeypatch.chdir(saved)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replacing)
        save(model(1), ".", max_shard_bytes=200)
    assert found == [0] * 5
    assert value_in(saved) == 1


# Permissions and foreign files ---------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("max_shard_bytes", [200, 5 * 2**30])
def test_new_files_have_the_permissions_of_the_old(max_shard_bytes: int, saved: Path, shown: str) -> None:
    saved.chmod(0o750)
    for path in saved.iterdir():
        path.chmod(0o640 if path.name == "structlin.json" else 0o600)
    save(model(1), shown, max_shard_bytes=max_shard_bytes)
    assert saved.stat().st_mode & 0o777 == 0o750
    for path in saved.iterdir():
        assert path.stat().st_mode & 0o777 == (0o640 if path.name == "structlin.json" else 0o600), path.name


def test_foreign_files_are_not_written_again(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        (saved / f"foreign-{number}").touch()
    calls, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(handle), fsync(handle)))
    save(model(1), saved)
    assert len(calls) < 20
    assert len(names(saved)) == 103


@posix
def test_permission_denied_is_said(open_folder: Path) -> None:
    path = save(model(0), open_folder / "parent" / "out")
    path.parent.chmod(0)
    with unprivileged():
        for read in (value_in, verify):
            with pytest.raises(CheckpointError, match="out: cannot be read: PermissionError"):
                read(path)
    path.parent.chmod(0o755)
    (path / "model.safetensors").chmod(0)
    with (
        unprivileged(),
        pytest.raises(CheckpointError, match=r"model.safetensors: missing or unreadable: PermissionErr"),
    ):
        value_in(path)


def test_directory_that_goes_away_while_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_while_reading(monkeypatch, lambda: shutil.rmtree(saved), 1)
    with pytest.raises(CheckpointError, match="no such directory"):
        verify(saved)

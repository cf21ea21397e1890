"""Only a library that is as it was built, and that no other user could have written, is loaded; no failure is fatal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from test_kernels import switch_on

from structlin.layers.linear import build
from structlin.runtime import cache, kernels
from structlin.runtime.kernels import native, wheel
from structlin.structures import LowRank

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are those of POSIX")
root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may give files away")
OTHER, THIRD = 12345, 54321  # users


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty cache, whose libraries are written by no compiler, and a process that has looked for none yet."""
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(native.SWITCH, "on")
    monkeypatch.setattr(native._State, "usable", None)
    monkeypatch.setattr(native._State, "broken", None)
    monkeypatch.setattr(native, "_compile", lambda target: target.write_bytes(b"a library"))
    monkeypatch.setattr(native, "_loaded", lambda: True)
    monkeypatch.setattr(wheel, "find", lambda: (None, []))
    return tmp_path / "cache"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def to_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def to_link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("elsewhere")))


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def writable(path: Path) -> None:
    path.chmod(0o602)


DAMAGE = {
    cut: "is damaged",
    empty: "is damaged",
    to_folder: "is not a regular file",
    to_link: "is not a regular file",
    dangling: "is not a regular file",
    writable: r"may write to .*\(mode 602\); run chmod go-w .*",
}


@posix
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_refused_by_name_and_built_again(damage, folder):
    path = kernels.build()
    assert kernels.available()
    damage(path)
    native._State.usable = None
    with pytest.warns(UserWarning, match=f"(?=.*{path.name}).*{DAMAGE[damage]}"):
        assert not kernels.available()
    assert not kernels.available()  # said once
    assert kernels.build() == path
    assert path.read_bytes() == b"a library"
    assert kernels.available()


@root
@pytest.mark.parametrize("whose", ["file", "folder"])
def test_what_others_own_is_refused(whose, folder):
    path = kernels.build()
    os.chown(path if whose == "file" else folder, OTHER, OTHER)
    with pytest.warns(UserWarning, match=f"{path if whose == 'file' else folder} belongs to user 12345, not to root"):
        assert not kernels.available()
    if whose == "file":
        assert kernels.build().stat().st_uid == 0
        assert kernels.available()
    else:
        with pytest.raises(RuntimeError, match=r"cannot be made: .* belongs to user 12345"):
            kernels.build()


@posix
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_is_refused(mode, folder):
    kernels.build()
    folder.chmod(mode)
    with pytest.warns(UserWarning, match=f"may write to {folder} .mode {mode:o}.; run chmod go-w {folder}"):
        assert not kernels.available()
    with pytest.raises(RuntimeError, match=f"cannot be made: users other than its owner may write to {folder}"):
        kernels.build()


@posix
def test_no_umask_lets_others_write(folder):
    before = os.umask(0)
    try:
        path = kernels.build()
    finally:
        os.umask(before)
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert kernels.available()


def test_a_library_that_does_not_load_is_named_and_built_again(folder, monkeypatch):
    path = kernels.build()
    made = path.stat().st_ino
    assert kernels.build().stat().st_ino == made
    monkeypatch.setattr(native, "_loaded", lambda: False)
    with pytest.warns(UserWarning, match=f"{path} does not load"):
        assert not kernels.available()
    assert kernels.build().stat().st_ino != made


@pytest.mark.parametrize("own", [b"own 1", b"own 2", b"own 3", b"own 4"])  # files before and behind the other
def test_a_library_that_does_not_load_gives_way_to_the_next_build(own, folder, monkeypatch):
    kernels.build()

    def load(path):
        if path.read_bytes() != own:
            raise ImportError("another system built it")
        native._State.broken = None

    monkeypatch.setattr(native, "_loaded", lambda: False)
    monkeypatch.setattr(native, "_load_built", lambda path: setattr(native._State, "broken", path) or load(path))
    with pytest.warns(UserWarning, match="does not load: another system built it"):
        assert not kernels.available()
    monkeypatch.setattr(native, "_compile", lambda target: target.write_bytes(own))
    path = kernels.build()
    assert kernels.available()
    assert [*folder.iterdir()] == [path]


def test_a_compiler_that_writes_nothing_is_named(folder, monkeypatch):
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(native, "_compile", lambda target: None)
    with pytest.raises(RuntimeError, match=r"compiler \(CXX='true'\) reports success, but wrote no library"):
        kernels.build()


def test_threads_load_it_once(folder, monkeypatch):
    loads = []
    monkeypatch.setattr(native, "_load", lambda word: loads.append(word) or time.sleep(0.1) or True)
    threads = [Thread(target=kernels.available) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["on"]


def test_leftovers_of_killed_builds_are_removed(folder):
    (folder / "structlin-tmp-old" / "chain.o").mkdir(parents=True)
    (folder / "structlin-tmp-new").mkdir()
    (folder / "another").mkdir()
    folder.chmod(0o700)
    for name in ("structlin-tmp-old", "another"):
        os.utime(folder / name, (0, time.time() - cache.ABANDONED - 60))
    path = kernels.build()
    assert {entry.name for entry in folder.iterdir()} == {"structlin-tmp-new", "another", path.name}


def test_a_write_that_fails_leaves_the_old_file(folder, monkeypatch):
    path = kernels.build()

    def full(handle):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.write(path, b"new")
    assert [entry.read_bytes() for entry in folder.iterdir()] == [b"a library"]


# The switch ----------------------------------------------------------------------------------------------------------


def imported(word, *more):
    environment = {**os.environ, native.SWITCH: word}
    command = [sys.executable, "-c", "import structlin; print(structlin.kernels.native.switch())"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_another_word_is_refused_at_import():
    done = imported("OF")
    assert done.returncode
    assert "ValueError: STRUCTLIN_KERNELS='OF' is none of on, off, build; set one of them" in done.stderr
    assert imported("Off").stdout == "off\n"


@pytest.mark.parametrize("word", ["", "on", "ON", "off", "Off", "build", "BUILD"])
def test_words_of_the_switch(word, folder, monkeypatch):
    monkeypatch.setenv(native.SWITCH, word)
    assert kernels.available() == (word.lower() == "build")
    kernels.build()
    assert kernels.available() == (word.lower() != "off")


@pytest.mark.parametrize("word", ["0", "1", "true", "of", " off"])
def test_other_words_are_refused(word, folder, monkeypatch):
    monkeypatch.setenv(native.SWITCH, word)
    with pytest.raises(ValueError, match=f"STRUCTLIN_KERNELS='{word}' is none of on, off, build"):
        native.switch()


def test_no_failure_to_build_reaches_a_forward_pass(folder, monkeypatch):
    def fails(target):
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(native, "_compile", fails)
    monkeypatch.setenv(native.SWITCH, "build")
    layer = build(LowRank(rank=3), 16, 20)
    x = torch.randn(5, 16)
    with pytest.warns(UserWarning, match="STRUCTLIN_KERNELS=build, but there is no compiler") as said:
        y = layer(x)
    assert len(said) == 1
    assert torch.equal(layer(x), y)  # without a warning, which would be an error here
    with pytest.raises(RuntimeError, match="there is no compiler"):
        kernels.build()


def test_a_cache_that_cannot_be_written_is_a_warning(folder, monkeypatch):
    folder.write_text("a file in the folder's place")
    monkeypatch.setenv(native.SWITCH, "build")
    with pytest.warns(UserWarning, match=r"STRUCTLIN_KERNELS=build, but the native .* cannot be made: .*File exists"):
        assert not kernels.available()
    monkeypatch.setattr(native._State, "usable", None)
    monkeypatch.setenv(native.SWITCH, "on")
    assert not kernels.available()


@pytest.mark.parametrize("place", ["x" * 300, "a-file/cache"])
def test_a_cache_that_cannot_be_reached_is_as_none(place, folder, monkeypatch, tmp_path):
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path / place))
    assert not kernels.available()
    with pytest.raises(RuntimeError, match="cannot be made"):
        kernels.build()


def test_without_a_home_there_is_no_cache(folder, monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    for name in ("STRUCTLIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert not kernels.available()
    with pytest.raises(RuntimeError, match=r"no home folder is known; set \$STRUCTLIN_CACHE"):
        kernels.build()


@pytest.mark.parametrize("named", ["no-such-compiler", "no-such-cache g++", '"', " "])
def test_a_compiler_that_is_not_there_is_named(named, folder, monkeypatch):
    monkeypatch.setenv("CXX", named)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, and there is no|cannot be split"):
        native._run(["--version"])


def test_a_compiler_may_have_arguments(folder, monkeypatch, tmp_path):
    program = tmp_path / "my cc"
    program.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/given"\n')
    program.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{program}' g++ -pipe")
    native._run(["-c", "chain.cpp"])
    assert (tmp_path / "given").read_text() == "g++ -pipe -c chain.cpp\n"


# In processes of their own -------------------------------------------------------------------------------------------

FORWARD = """
import os, sys, torch
from structlin import LowRankLinear, kernels
if len(sys.argv) > 1:  # after the imports, as Python's own files may be closed to this user
    stem = kernels.native._stem()
    kernels.native._stem = lambda: stem
    os.seteuid(int(sys.argv[1]))
torch.manual_seed(0)
layer = LowRankLinear(16, 20, rank=3)
for tokens in (1, 40):
    x = torch.randn(tokens, 16)
    assert torch.allclose(layer(x), x @ layer.to_dense().T + layer.bias, atol=1e-5)
print(kernels.available())
"""


def forward(folder, *arguments, **more):
    """What a new process says that runs a layer, and its warnings."""
    environment = {**os.environ, "STRUCTLIN_CACHE": str(folder), native.SWITCH: "on", **more}
    command = [sys.executable, "-c", FORWARD, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The real library, alone in a cache."""
    switch_on(monkeypatch)
    copy = shutil.copy2(kernels.build(), tmp_path)
    tmp_path.chmod(0o700)
    return Path(copy)


def test_a_truncated_library_kills_nothing(library):
    assert forward(library.parent) == ("True", "")
    os.truncate(library, 4096)
    said, warned = forward(library.parent)
    assert said == "False"
    assert f"{library} is damaged" in warned


@root
def test_a_cache_of_another_user_is_as_none(library):
    """Whether this user can see into it or not; what root made serves all who can read it."""
    assert forward(library.parent, str(OTHER)) == ("False", "")
    for path in (library.parent, *library.parent.parents):
        path.chmod(path.stat().st_mode | 0o055)
    library.chmod(0o644)
    assert forward(library.parent, str(OTHER)) == ("True", "")
    os.chown(library.parent, THIRD, THIRD)
    said, warned = forward(library.parent, str(OTHER))
    assert said == "False"
    assert f"{library.parent} belongs to user {THIRD}, not to root or to {OTHER}" in warned

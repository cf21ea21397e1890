"""Long work that survives being killed: finished shards lie in a folder aside, which takes its name at the end.

The folder has a journal of JSON lines. The first says what the work is, each further one what a finished part is. A
line is written once all that it names has reached the disk; a line that a crash cut off is dropped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from structlin.checkpoint._directory import INDEX, CheckpointError, explaining, sibling
from structlin.checkpoint._lock import locked
from structlin.checkpoint._replace import must_stay, sync
from structlin.checkpoint.tensors import check_hashes, write_safetensors

JOURNAL = "journal.jsonl"


class Journal:
    """The finished parts of one piece of work; to be made by `opened`.

    Args:
        target: the folder to be; the work lies beside it, under a hidden name.
        about: JSON data that tells this work from others.
    Attributes:
        records: of the finished parts, in their order.
        folder: of the journal, for files that only the work needs.
        shards: the folder that becomes the target.
    Raises:
        CheckpointError: if other work for the same target is unfinished, or a finished shard is damaged.
    """

    def __init__(self, target: Path, about: Mapping[str, Any]) -> None:
        self.target = target
        self.folder = sibling(self.target, "unfinished")
        self.shards, self.path = self.folder / "model", self.folder / JOURNAL
        self.about = about
        lines = self._lines() if self.shards.is_dir() else []
        if lines[1:] and lines[0] != json.loads(json.dumps(about)):
            raise CheckpointError(
                f"{self.folder} holds unfinished work of another model, text or setting; go on with these, or delete it"
            )
        self.records: list[dict[str, Any]] = lines[1:]
        check_hashes(self.shards, {record["shard"]: record["sha256"] for record in self.records})

    @classmethod
    @contextmanager
    def opened(cls, target: Path, about: Mapping[str, Any]) -> Iterator[Journal]:
        """Open the journal of a piece of work; no other process or thread works for the same target meanwhile.

        Args:
            target: the folder to be, missing or empty.
            about: as of `Journal`.
        Raises:
            CheckpointError: if another works for the target, or the target cannot be replaced.
        """
        with explaining(f"{target}: cannot be written", OSError):
            target = target.resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target) as lock:
            if lock.parent != target.parent or must_stay(target):
                reason = "is a mount point, holds the working directory, or lies in one that may not be written"
                raise CheckpointError(f"{target} {reason}; give a new folder in it")
            yield cls(target, about)

    def begin(self) -> None:
        """Make the folder, unless it holds finished parts."""
        with explaining(f"{self.target}: cannot be written", OSError):
            if not self.records:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.shards.mkdir(parents=True)
                self._append(self.about)

    def add(self, shard: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a shard, then the line that makes it count.

        Args:
            shard: its file name.
            tensors: by name.
            record: JSON data on the part.
        """
        with explaining(f"{self.target}: cannot be written", OSError):
            digest = write_safetensors(self.shards / shard, tensors, {"format": "pt"})
            sync(self.shards)
            size = sum(tensor.nbytes for tensor in tensors.values())
            line = {"shard": shard, "sha256": digest, "bytes": size, "tensors": sorted(tensors), **record}
            self._append(line)
            self.records.append(json.loads(json.dumps(line)))

    def finish(self) -> None:
        """Write the index, and let the folder take its name."""
        with explaining(f"{self.target}: cannot be written", OSError):
            index = {
                "metadata": {"total_size": sum(record["bytes"] for record in self.records)},
                "weight_map": {name: record["shard"] for record in self.records for name in record["tensors"]},
            }
            (self.shards / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
            for path in (*self.shards.rglob("*"), self.shards):
                sync(path)
            if self.target.exists():
                self.target.rmdir()  # empty, or this fails
            self.shards.rename(self.target)
            sync(self.target.parent)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync(self.folder)

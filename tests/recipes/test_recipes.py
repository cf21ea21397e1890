"""Every recipe runs at a tiny size, as a script, and stores what it says it stores."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import subprocess
import sys
import wave
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

pytest.importorskip("sklearn")
pytest.importorskip("transformers")


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(RECIPES / name), "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def stored(results: Path, name: str) -> list[dict[str, Any]]:
    lines = (results / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert {"command", "date", "machine", "threads", "torch", "structlin", "commit"} <= set(row)
        assert "/tmp" not in row["command"]
        assert str(results.parent) not in row["command"]
    table = (results / f"{name}.md").read_text(encoding="utf-8")
    assert sum(line.startswith("|") for line in table.splitlines()) == len(rows) + 2
    assert f"`{rows[0]['command']}`" in table
    return rows


def test_train_from_scratch(tmp_path):
    done = run(
        "train_from_scratch.py", "--structures", "lowrank", "kmatrix", "--width", "64", "--ratio", "0.5",
        "--epochs", "2", "--seeds", "1", "--results", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kmatrix: accuracy" in done.stderr
    rows = stored(tmp_path / "results", "train_digits")
    assert [row["structure"] for row in rows] == ["dense", "lowrank", "kmatrix"]
    dense, *others = rows
    for row in others:
        assert row["accuracy"] > 0.3
        assert row["parameters"] <= dense["parameters"] - 2 * 64 * 32
    assert rows[1]["layer"] == "LowRank(rank=16)"


def test_finetune_after_compression(tmp_path):
    done = run(
        "finetune_after_compression.py", "--structures", "lowrank", "phm", "--width", "64", "--ratio", "0.25",
        "--dense-epochs", "10", "--epochs", "3", "--seeds", "1", "--results", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = stored(tmp_path / "results", "finetune_digits")
    assert [row["structure"] for row in rows] == ["dense", "lowrank", "phm"]
    for row in rows[1:]:
        assert row["before"] > 0.9
        assert row["compressed"] < row["finetuned"]
        assert 0.2 < row["kept"] < 0.26
        assert 0 < row["error"] < 1
        assert row["parameters"] < rows[0]["parameters"]


def test_compress_cnn(tmp_path):
    done = run(
        "compress_cnn.py", "--structures", "tucker", "lowrank", "--epochs", "6", "--results", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = stored(tmp_path / "results", "cnn_digits")
    assert [row["structure"] for row in rows] == ["dense", "tucker", "lowrank"]
    assert rows[0]["compressed"] > 0.9
    for row in rows[1:]:
        assert 0.2 < row["kept"] < 0.27
        assert row["compressed"] < row["tuned"]
        assert row["tuned"] > 0.9
    assert rows[1]["layer"].startswith("ConvKernel(form='tucker', kernel=(3, 3)")


def test_train_lstm(tmp_path):
    """Digits are told apart by their pitch here."""
    generator = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(tmp_path / "recordings.zip", "w") as archive:
        for digit, index in itertools.product(range(10), range(6)):
            length = 1500 + 100 * index
            tone = torch.sin(torch.arange(length) * 0.2 * (digit + 1)) + 0.1 * torch.randn(length, generator=generator)
            sound = io.BytesIO()
            with wave.open(sound, "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                file.writeframes((tone * 8000).short().numpy().tobytes())
            archive.writestr(f"{digit}_anna_{index}.wav", sound.getvalue())
    done = run(
        "train_lstm.py", "--data", tmp_path / "recordings.zip", "--epochs", "12", "--seeds", "1", "--rounds", "1",
        "--results", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dense, tt, *_ = stored(tmp_path / "results", "lstm_digits")
    assert dense["accuracy"] == tt["accuracy"] == 1
    assert tt["parameters"] < dense["parameters"] / 50
    dense, tt, *_ = stored(tmp_path / "results", "lstm_video")
    assert tt["parameters"] == 2944
    assert dense["parameters"] == 57600 * 1024
    assert tt["both"] < dense["both"] == 1


@pytest.fixture
def stsb(tmp_path) -> Path:
    """A file in the format of STS-B; quotes are plain characters there, and some lines have extra columns."""
    path = tmp_path / "sts-tiny.csv"
    pairs = [
        ("5.000", 'the "list is a list', 'the "list is a list'),
        ("2.500", "return the value of the file", "return the name of the file"),
        ("0.000", "it is an object", "and that with this not in"),
    ]
    lines = ["\t".join(["main", "test", "2026", str(k), *pair]) for k, pair in enumerate(pairs)]
    path.write_text("\n".join([*lines[:2], lines[2] + "\textra\tcolumns"]) + "\n", encoding="utf-8")
    return path


def test_compress_minilm(tmp_path, tiny_bert, stsb):
    out = tmp_path / "out" / "model"
    done = run(
        "compress_minilm.py", "--model", tiny_bert, "--stsb", stsb, "--structures", "lowrank", "kmatrix",
        "--ratios", "0.5", "0.6", "--refine", "3", "--sentences", "40", "--rounds", "2",
        "--results", tmp_path / "results", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[4/4] kmatrix at ratio 0.6" in done.stderr
    assert "40 embeddings equal to the last bit" in done.stdout
    rows = stored(tmp_path / "results", "minilm_compression")
    assert [row["structure"] for row in rows[:3]] == ["dense", "lowrank", "kmatrix"]
    dense, *others = rows
    assert dense["cosine"] == pytest.approx(1, abs=1e-5)
    assert dense["rank_correlation"] == pytest.approx(1, abs=1e-5)
    assert dense["model"] == "tiny_bert"
    for row in others:
        assert row["layers"] == 12  # the pooler stays
        assert row["kept"] <= row["ratio"]
        assert row["parameters_model"] < dense["parameters_model"]
        assert row["mib"] < dense["mib"]
        assert 0 < row["error_mean"] <= row["error_max"] < 1
        assert row["cosine"] < 1
        assert -1 <= row["stsb_spearman"] <= 1
        assert row["speed"] > 0
    assert {path.suffix for path in out.iterdir()} == {".safetensors", ".json"}

    corrupt = Path(f"{out}_embeddings.safetensors")
    data = bytearray(corrupt.read_bytes())
    data[-2] ^= 1
    corrupt.write_bytes(data)
    again = run("compress_minilm.py", "--model", tiny_bert, "--sentences", "40", "--load", out)
    assert again.returncode == 1
    assert "DIFFER" in again.stdout


def test_compress_minilm_takes_all_structures_only_on_request(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("compress_minilm")
    few, every = recipe.parse([]), recipe.parse(["--structures", "all"])
    assert {"lowrank", "kronecker", "shapeshifter", "lowrank+kmatrix"} < set(few.structures) < set(every.structures)
    assert few.ratios == [0.5]
    assert few.results != recipe.ROOT / "benchmarks" / "results"  # the stored table stays
    with pytest.raises(SystemExit):
        recipe.parse(["--structures", "everything"])


def test_learn_permutation(tmp_path):
    done = run(
        "learn_permutation.py", "--seeds", "1", "--steps", "300", "--starts", "1", "--epochs", "4",
        "--results", tmp_path / "results", "--figures", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {(row["network"], row["pixels"]): row for row in stored(tmp_path / "results", "permuted_digits")}
    assert rows["CNN", "original"]["accuracy"] > rows["CNN", "permuted"]["accuracy"]
    learned = rows["learned permutation + CNN", "permuted"]
    assert learned["front"] == 11 * 32
    assert learned["found"] > 0.056  # of a random order: each pair is one of 112 neighbours among 2,016
    assert rows["K-matrix + CNN", "permuted"]["front"] < rows["dense + CNN", "permuted"]["front"]

"""The recipes that run the sources' experiments again: with --quick each ends in seconds, stores, draws, settles."""

from __future__ import annotations

import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def run(name: str, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a recipe with --quick; results and figures go to `folder`."""
    command = [
        sys.executable, "-W", "error", str(RECIPES / name), "--quick", "--threads", "1",
        "--results", str(folder), "--figures", str(folder), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


def stored(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert {"command", "date", "machine", "threads", "torch", "structlin", "commit"} <= set(row)
        assert str(folder.parent) not in row["command"]
    table = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert sum(line.startswith("|") for line in table.splitlines()) == len(rows) + 2
    return rows


def drawn(folder: Path, name: str) -> str:
    """Check both forms of a figure and return the SVG's text."""
    assert 5_000 < (folder / f"{name}.png").stat().st_size < 150_000
    return (folder / f"{name}.svg").read_text(encoding="utf-8")


def test_tensorizing(tmp_path):
    done = run("tensorizing.py", tmp_path)
    rows = stored(tmp_path, "tensorizing_digits")
    assert {row["shape"] for row in rows} == {"dense", "matrix rank", "4^3", "2^6", "8 x 8"}
    assert rows[0]["parameters"] == 64 * 64
    for row in rows:
        assert row["lowest"] <= row["error"] <= row["highest"]
        assert len(row["errors"]) == 3
        assert (row["size"] is None) == (row["layer"] == "dense")  # all others are within a size
    vgg = {row["layer"]: row for row in stored(tmp_path, "tensorizing_vgg_digits")}
    assert list(vgg) == ["dense", "TT4", "TT2", "TT1", "MR50", "MR5", "MR1"]
    assert vgg["TT1"]["parameters"] == 2 * 4 + 7 * 4 + 8 * 4
    assert vgg["MR1"]["compression"] == vgg["dense"]["parameters"] / (112 + 64)
    dense, tt = stored(tmp_path, "tensorizing_time")
    assert dense["time_100"] == 1
    assert tt["ms_1"] > 0
    assert "confirmed" in done.stdout or "refuted" in done.stdout
    assert "test error, %" in drawn(tmp_path, "tensorizing_digits")


def test_kronecker_shapeshifter(tmp_path):
    done = run("kronecker_shapeshifter.py", tmp_path)
    rows = stored(tmp_path, "kronecker_shapeshifter_digits")
    assert {row["structure"] for row in rows} == {"dense", "kronecker", "shapeshifter", "lowrank", "tt", "phm"}
    found = {(row["structure"], row["sizes"]): row for row in rows}
    kronecker, shapeshifter = found["kronecker", "terms 4"], found["shapeshifter", "rank 4"]
    assert kronecker["parameters"] == shapeshifter["parameters"] == 4 * (6 * 10 + 10 * 6)
    assert kronecker["smooth"] < shapeshifter["smooth"] / 2
    for matrix in ("random", "trained", "smooth"):
        assert found["kronecker", "terms 1"][matrix] > kronecker[matrix]
        assert shapeshifter[matrix] == pytest.approx(
            found["lowrank", "rank 4"][matrix], rel=1e-5
        )  # the same for a square
    assert rows[0]["replaced"] == rows[0]["scratch"] > 0.3
    assert len(kronecker["random_all"]) == 3
    assert "smooth matrix*: **confirmed**, holds in 2 of 2" in done.stdout
    timed = stored(tmp_path, "kronecker_time")
    assert [row["sizes"] for row in timed] == [row["sizes"] for row in rows]
    assert all(row["lower_64"] <= row["time_64"] * 1.5 for row in timed)
    assert timed[1]["flops"] == pytest.approx(6 * 6 * (10 + 10) / 60**2)  # (6 x 10) (x) (10 x 6), the cheaper order
    for name in ("kronecker_shapeshifter_digits", "kronecker_matrices_digits"):
        assert "parameters, in Kronecker terms" in drawn(tmp_path, name)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_which_structure(tmp_path):
    """Of invented results: what is beaten is left out, FLOPs are counted, times are looked up, the rest is named."""
    results = tmp_path / "given"
    results.mkdir()
    write(results, "train_digits", [
        {"structure": "dense", "accuracy": 0.9, "parameters": 1000},
        {"structure": "lowrank", "accuracy": 0.8, "parameters": 500},
        {"structure": "monarch", "accuracy": 0.7, "parameters": 600},
        {"structure": "kronecker", "accuracy": 0.5, "parameters": 10},
        {"structure": "unheard of", "accuracy": 0.99, "parameters": 1},
        {"structure": "tt", "parameters": 400},
    ])  # fmt: skip
    speed = {"structure": "lowrank(rank=64)", "library": "structlin", "mode": "inference", "cell_threads": 1}
    write(results, "speed_simple", [
        speed | {"parameters_ratio": 0.45, "tokens": 1, "ratio": 0.25},
        speed | {"parameters_ratio": 0.55, "tokens": 1, "ratio": 0.35},
        speed | {"parameters_ratio": 0.1, "tokens": 512, "ratio": 0.1},
        speed | {"parameters_ratio": 0.5, "tokens": 1, "ratio": 9, "cell_threads": 2},
    ])  # fmt: skip
    write(results, "another", [{"x": 1}])
    done = run("which_structure.py", tmp_path, "--read", results)
    rows = {row["structure"]: row for row in stored(tmp_path, "which_structure")}
    assert list(rows) == ["dense", "lowrank", "kronecker"]
    assert rows["lowrank"]["kept"] == 0.5
    assert rows["lowrank"]["flops"] == pytest.approx(0.5)
    assert rows["lowrank"]["time_1"] == pytest.approx(0.3)
    assert rows["lowrank"]["time_512"] is None
    assert rows["lowrank"]["fronts"] == "kept, flops, time 1"
    assert rows["dense"]["fronts"] == "kept, flops, time 1, time 512"
    for text in ("another (1)", "no loss: train_digits (1)", "no single structure (unheard of): train_digits (1)"):
        assert text in done.stderr
    assert "kronecker (0.01 to 0.01)" in (tmp_path / "which_structure.md").read_text(encoding="utf-8")
    drawn(tmp_path, "which_structure")


def test_which_structure_without_results(tmp_path):
    command = [sys.executable, str(RECIPES / "which_structure.py"), "--read", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "holds no results that this recipe reads" in done.stderr


def test_images_of_both_sets(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    load = importlib.import_module("tensorizing").load
    (images, labels), (test, _) = load(None, 0, 32)
    assert (images.shape, test.shape, len(labels)) == ((1347, 1024), (450, 1024), 1347)
    for part in ("train", "t10k-even"):
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + bytes([255]) * (3 * 28 * 28))
        with gzip.open(tmp_path / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + bytes([4, 5, 6]))
    (images, labels), (test, _) = load(tmp_path, 2, 32)
    assert (images.shape, test.shape, labels.tolist()) == ((2, 1024), (3, 1024), [4, 5])
    assert images.sum() == 2 * 28 * 28  # padded by zeros
    assert load(tmp_path, 2, 8)[0][0].sum() == pytest.approx(2 * 28 * 28 / 16)


def test_settle(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    settle = importlib.import_module("_findings").settle
    assert "**even**, holds in 0 of 1 cases, even in 1." in settle("a < b", [("x", [1.0], [1.001])])
    assert settle("a < b", [("x", [1, 2], [3, 4])]) == (
        "- *a < b*: **confirmed**, holds in 1 of 1 cases. x: 1.50 against 3.50 (apart)."
    )
    assert "**refuted**, holds in 0 of 1 cases. x: 2 against 1." in settle("a < b", [("x", [1, 3], [1, 1])], ".0f")
    assert "**refuted as a rule**, holds in 1 of 2" in settle("a < b", [("x", [1], [2]), ("y", [2], [1])])

"""The recipes that repeat the sources' experiments on models run in seconds and store what they say they store."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FIGURES = RECIPES.parent / "docs" / "figures"

for module in ("sklearn", "matplotlib", "transformers"):
    pytest.importorskip(module)


def run(name: str, results: Path, stored: str | None = None) -> tuple[list[dict[str, Any]], str]:
    """Return the stored rows and what was printed, and see that the figures stay as they are."""
    before = {path: path.stat().st_mtime_ns for path in FIGURES.glob("*")}
    command = [sys.executable, "-W", "error", str(RECIPES / f"{name}.py"), "--quick", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in FIGURES.glob("*")} == before
    lines = (results / f"{stored or name}.jsonl").read_text(encoding="utf-8").splitlines()
    text = (results / f"{stored or name}.md").read_text(encoding="utf-8")
    assert "confirmed" in done.stdout or "refuted" in done.stdout
    assert "Where this differs" in text
    return [json.loads(line) for line in lines], done.stdout


def test_delight_and_transformers_of_one_size(tmp_path):
    rows, printed = run("train_delight", tmp_path)
    assert "Against a transformer of twice its parameters" in printed
    last = {(row["network"], row["size"]): row for row in rows}
    assert len(last) == 4
    assert len(rows) == 4 * 6
    for width in (16, 24):
        dense, light = last["transformer", width], last["DeLighT", width]
        assert light["parameters"] == pytest.approx(dense["parameters"], rel=0.02)
        assert light["steps"] == dense["steps"] == 12
    for row in rows:
        assert row["lowest"] <= row["perplexity"] <= row["highest"] < 110
    for network in ("transformer", "DeLighT"):
        mine = [row["perplexity"] for row in rows if (row["network"], row["size"]) == (network, 24)]
        assert mine == sorted(mine, reverse=True)


def test_recurrent_networks_in_tensor_trains(tmp_path):
    rows, printed = run("tt_rnn", tmp_path, stored="tt_rnn_digits")
    assert "gives the rates of `uncapped` here" in printed
    dense, adam, groups, *_ = rows
    assert dense["weights"] == 4 * 128 * (8 + 128)
    # The inputs' cores: 2 x 32 x 4, 4 x 2 x 4 x 4, 4 x 2 x 4; the hidden state's: 8 x 32 x 4, 4 x 4 x 4 x 4, 4 x 4 x 4.
    assert adam["weights"] == groups["weights"] == 416 + 1344
    assert [row["network"] for row in rows] == ["LSTM", *["tt-LSTM 4"] * 3, "GRU", "tt-GRU 4"]
    for row in rows:
        assert row["rule"] == "uncapped" or 0.15 < row["lowest"] <= row["accuracy"] <= row["highest"]


def test_a_rule_by_modes_is_that_of_groups_where_no_core_is_wide(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("tt_rnn")
    assert recipe.distinct(recipe.layer("LSTM", "tt", 4, 8, 512)) == ["adam", "param_groups", "uncapped"]
    wide = recipe.layer("LSTM", "tt", 8, 8, 512)
    assert recipe.distinct(wide) == list(recipe.RULES)
    [group] = [g for g in recipe.by_modes(wide, 0.1) if g["params"][0] is wide.hh_l0.core_2]
    size = wide.hh_l0.core_2.square().mean().sqrt().item() * (3 * 512) ** 0.5
    assert group["lr"] == pytest.approx(0.1 * size * (512 / 8) ** 0.5 / 3)


def test_the_taxonomy_of_one_model(tmp_path):
    rows, printed = run("taxonomy", tmp_path)
    assert "Fidelity is lost before accuracy" in printed
    dense, *others = rows
    assert [row["structure"] for row in rows] == ["dense", "lowrank", "tt", "lowrank+blast"]
    assert (dense["eta"], dense["delta_1"], dense["delta_2"]) == (1, 0, 0)
    for row in others:
        assert 0.5 < row["eta"] < 0.62  # half of the linear layers, and the embedding
        assert row["dimension"] < 0.5
        assert row["delta_1"] == pytest.approx(dense["accuracy"] - row["accuracy"])
        assert 0 <= row["delta_2_lowest"] <= row["delta_2"] <= row["delta_2_highest"] < 0.2
    assert others[0]["maps"] == "projection to 8, embedding into 32"


def test_a_front_holds_what_nothing_beats(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("taxonomy")
    sizes = [("dense", 1.0, 0.0), ("a", 0.8, 0.1), ("b", 0.8, 0.2), ("c", 0.5, 0.3), ("d", 0.6, 0.3), ("e", 0.2, 0.9)]
    rows = [{"structure": name, "eta": eta, "delta_1": loss} for name, eta, loss in sizes]
    assert [row["structure"] for row in recipe.front(rows, "delta_1")] == ["a", "c", "e"]

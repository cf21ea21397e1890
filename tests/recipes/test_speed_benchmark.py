"""The speed benchmark: a wrong layer is never timed, what it counts is right, and the script stores its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from structlin import KMatrix, KroneckerLinear, LowRankLinear
from structlin.layers.linear import build
from structlin.structures import PHM, Kaleidoscope, Kronecker, LowRank, Monarch, Sum

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _speed

    return _speed


class Altered(nn.Module):
    """A layer whose output or input gradient is off by a hundredth."""

    def __init__(self, layer: nn.Module, output: float = 1.0, gradient: float = 1.0) -> None:
        super().__init__()
        self.layer = layer
        self.output = output
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        return self.output * self.layer(x + (self.gradient - 1) * (x - x.detach()))


@pytest.mark.parametrize("mode", ["inference", "eval", "forward", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_layer_is_measured(speed, mode, dtype):
    layer = KroneckerLinear(24, 12, terms=2, dtype=dtype)
    row = speed.measure(
        speed.Subject.of("right", layer), nn.Linear(24, 12, dtype=dtype), mode, 3, speed.Effort(3, 1e-5)
    )  # fmt: skip
    assert row["error"] < speed.TOLERANCE[dtype]
    assert ("gradient_error" in row) == (mode == "training")
    assert row["ratio"] == row["layer_us"] / row["dense_us"]
    assert row["parameters_ratio"] == layer.spec.ratio
    factored = f"autograd: {layer.plan(4).summary}"
    ways = {"inference": "kept dense matrix", "eval": factored.replace("autograd", "chunks of rows")}
    assert row["plan"] == ways.get(mode, factored)
    assert layer.training == (mode not in ways)


@pytest.mark.parametrize("mode", ["inference", "forward", "training"])
def test_wrong_output_is_caught_before_timing(speed, mode, monkeypatch):
    monkeypatch.setattr(speed, "interleaved", lambda *_: pytest.fail("timed"))
    layer = LowRankLinear(16, 16, rank=4)
    wrong = speed.Subject.of("wrong", layer, Altered(layer, output=1.01))
    with pytest.raises(ValueError, match=rf"wrong, {mode}, 3 tokens: error=0\.01 exceeds 0\.0001 .* nothing was timed"):
        speed.measure(wrong, nn.Linear(16, 16), mode, 3, speed.Effort(3))


def test_wrong_gradient_is_caught_before_timing(speed, monkeypatch):
    monkeypatch.setattr(speed, "interleaved", lambda *_: pytest.fail("timed"))
    layer = LowRankLinear(16, 16, rank=4)
    wrong = speed.Subject.of("wrong", layer, Altered(layer, gradient=1.01))
    with pytest.raises(ValueError, match=r"gradient_error=0\.01 exceeds"):
        speed.measure(wrong, nn.Linear(16, 16), "training", 3, speed.Effort(3))


def test_not_a_number_is_caught(speed):
    layer = LowRankLinear(16, 16, rank=4)
    wrong = speed.Subject.of("wrong", layer, Altered(layer, output=float("nan")))
    with pytest.raises(ValueError, match="error=nan"):
        speed.measure(wrong, nn.Linear(16, 16), "inference", 3, speed.Effort(3))


def test_bytes(speed):
    """Of nn.Linear and of a low rank, by hand (float32)."""
    dense, layer = nn.Linear(32, 48), LowRankLinear(32, 48, rank=4)
    calls = {name: speed.Call.new(module, dense.weight, "training", 8) for name, module in (("d", dense), ("l", layer))}
    assert speed.saved_bytes(calls["d"]) == 0
    assert speed.saved_bytes(calls["l"]) == 4 * 8 * 4  # (tokens, rank)
    outputs, inputs, weight = 4 * 8 * 48, 4 * 8 * 32, 4 * 32 * 48
    assert speed.peak_bytes(calls["d"]) == outputs + inputs + weight + 4 * 48
    assert speed.peak_bytes(calls["l"]) >= outputs + inputs + 4 * 4 * (32 + 48) + 4 * 48
    inference = speed.Call.new(dense, dense.weight, "inference", 8)
    assert speed.saved_bytes(inference) is None
    assert speed.peak_bytes(inference) is None


STEPS = [PHM(n=2), PHM(n=4), Kronecker(terms=4), Kronecker(terms=16), Kaleidoscope(width=4), Monarch(blocks=4)]


@pytest.mark.parametrize("structure", [*STEPS, Sum(parts=(LowRank(rank=64), Kaleidoscope(width=2)))])
@pytest.mark.parametrize("features", [512, 768])
def test_a_step_takes_little_more_memory_than_dense(structure, features, speed):
    """In plain torch, at 512 tokens, once the buffers that are kept between calls are there."""
    dense = nn.Linear(features, features)
    layer = build(structure, features, features)
    _, ours, theirs = (
        speed.peak_bytes(speed.Call.new(module, dense.weight, "training", 512)) for module in (layer, layer, dense)
    )
    assert 0 < ours <= 1.1 * theirs


def test_missing_library_is_said(speed, monkeypatch):
    import _peers

    absent = _peers.Peer((LowRank,), ("no_such_module",), lambda *_: pytest.fail("built"))
    monkeypatch.setattr(_peers, "PEERS", {"absent": absent})
    said: list[str] = []
    assert _peers.counterparts(LowRankLinear(16, 16, rank=4), said.append) == {}
    assert said == ["  absent left out: ModuleNotFoundError: No module named 'no_such_module'"]
    assert _peers.versions() == {}


def test_kronecker_sparse_stages_make_the_matrix(speed):
    import _peers

    layer = KMatrix(12, 18, in_modes=(3, 4), out_modes=(6, 3))
    product = torch.eye(18)
    for stage in _peers.kronecker_sparse(layer):
        product = product @ _peers.stage_matrix(stage)
    torch.testing.assert_close(product, layer.to_dense())


def test_script(tmp_path):
    results = tmp_path / "results"
    command = [
        sys.executable, "-W", "error", str(BENCHMARKS / "speed.py"), "--suite", "butterfly", "overhead",
        "--only", "lowrank at 0.5", "--quick", "--rounds", "3", "--tokens", "1", "--mode", "inference", "training",
        "--kernel", "off", "--results", str(results),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "no case of butterfly contains 'lowrank at 0.5'" in done.stderr
    lines = (results / "speed_overhead_torch.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["library"], row["mode"]) for row in rows] == [
        (library, mode) for library in ("structlin", "simple") for mode in ("inference", "training")
    ]
    assert {row["plan"] for row in rows if row["library"] == "simple"} == {"last_first"}
    for row in rows:
        assert {"command", "date", "machine", "threads", "dtype", "torch", "structlin", "commit"} <= set(row)
        assert (row["case"], row["structure"], row["tokens"], row["samples"]) == (
            "lowrank at 0.5, 64 x 64", "lowrank(rank=16)", 1, 3,
        )  # fmt: skip
        assert (row["cell_threads"], row["cell_dtype"]) == (1, "float32")
        assert row["parameters_ratio"] == row.get("flop_ratio", 0.5) == 0.5
        assert ("flop_ratio" in row) == (row["library"] == "structlin")
        assert row["ratio"] > 0
        assert row.get("break_even", 0.5 / row["ratio"]) == pytest.approx(0.5 / row["ratio"])
    table = (results / "speed_overhead_torch.md").read_text(encoding="utf-8")
    assert sum(line.startswith("|") for line in table.splitlines()) == len(rows) + 2
    assert not (results / "speed_butterfly_torch.md").exists()
    subprocess.run([sys.executable, str(BENCHMARKS / "speed_report.py"), "--results", str(results)], check=True)
    short = (results / "speed_overhead_torch_ratios.md").read_text(encoding="utf-8")
    assert "| out x in                |   library | FLOPs | parameters | inference, 1 | training, 1 |" in short
    assert f"{rows[0]['ratio']:.2f} | " in short
    assert f"{rows[1]['ratio']:.2f} |\n" in short

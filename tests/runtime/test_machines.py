"""Every plan is made for the machine that runs it: no record is a default, and the measured one is asked for."""

from __future__ import annotations

import ast
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import structlin
from structlin.fitting.fit import fit
from structlin.layers.linear import build
from structlin.runtime import machines
from structlin.runtime.kernels import chain_of, operators
from structlin.runtime.machines import machine_of, remember
from structlin.runtime.planner import CPU, CPU_AMX, Machine, find_plan, search
from structlin.runtime.ways import Key, predicted, ways
from structlin.structures import Kaleidoscope, Kronecker, LowRank, Sum

FILES = sorted(Path(structlin.__file__).parent.rglob("*.py"))
HERE = torch.device("cpu")


def defaults(source: str) -> list[str]:
    """Functions with a parameter `machine` that has a default."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            arguments = node.args
            positional = [*arguments.posonlyargs, *arguments.args]
            optional = positional[len(positional) - len(arguments.defaults) :]
            optional += [a for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value]
            found += [getattr(node, "name", "lambda") for argument in optional if argument.arg == "machine"]
    return found


def test_no_machine_is_a_default():
    assert {file.name: found for file in FILES if (found := defaults(file.read_text()))} == {}


def test_the_check_sees_defaults():
    for source in (
        "def plan(tokens, machine=CPU): ...",
        "def plan(*, order, machine=None): ...",
        "lambda machine=0: 0",
    ):
        assert len(defaults(source)) == 1
    assert defaults("def plan(machine, tokens=1): ...") == []


# Who plans -------------------------------------------------------------------------------------------------------


def layer():
    return build(Kronecker(terms=2, shape=((4, 6), (12, 8))), 48, 48)


def train():
    one = layer()
    one(torch.randn(5, 48)).sum().backward()


def evaluate():
    with torch.no_grad():
        layer().eval()(torch.randn(5, 48))


def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        layer()(torch.randn(5, 48))


def vmap():
    torch.vmap(layer())(torch.randn(3, 5, 48))


def order():
    one = layer()
    one.use_plan("forward")
    one(torch.randn(5, 48))


def autotune():
    one = layer()
    one.use_plan("auto", autotune=True)
    one(torch.randn(5, 48))


def compiled():
    torch.compile(layer(), backend="eager", fullgraph=True)(torch.randn(5, 48))


def explain():
    layer().explain(5)


def refine():
    rows = torch.randn(60, 48)
    fit(torch.randn(48, 48), Sum((LowRank(rank=2), Kaleidoscope())), gram=rows.T @ rows, refine=3)


def double_backward():
    spec = layer().spec
    factors = [torch.randn(shape, requires_grad=True) for shape in spec.shapes]
    x = torch.randn(5, 48, requires_grad=True)
    # The operator, as the kernel calls it with create_graph=True.
    operators._differentiable_backward(torch.randn(5, 48), x, factors, chain_of(spec).program, True, [0, 1])


@pytest.mark.parametrize(
    "act", [train, evaluate, autocast, vmap, order, autotune, compiled, explain, refine, double_backward]
)
def test_whoever_plans_asks_for_the_measured_record(act, monkeypatch):
    record = replace(CPU, name=f"measured for {act.__name__}", flops=1e9)  # a name of its own: plans are cached
    remember(HERE, record)
    assert machine_of(HERE) == record
    machines = []
    search_one = search._find
    monkeypatch.setattr(search, "_find", lambda *args: machines.append(args[3]) or search_one(*args))
    act()
    assert machines
    assert {machine.name for machine in machines} == {record.name}


def test_a_plan_needs_a_machine():
    with pytest.raises(TypeError, match="required keyword-only argument: 'machine'"):
        find_plan(layer().spec, 5)


# Records on disk -----------------------------------------------------------------------------------------------------

GOOD = {**asdict(CPU), "name": "measured", "half_flops": None, "half_op": 0.0, "cache": math.inf}


@pytest.fixture
def record(tmp_path):
    """The place of the record, which conftest puts into a folder of the test's own."""
    machines._machine.cache_clear()
    return tmp_path / "machine-cpu.json"


def test_a_record_is_read(record):
    record.write_text(json.dumps(GOOD))
    assert machine_of(HERE) == Machine(**GOOD)


DAMAGED = {
    "empty": b"",
    "truncated": json.dumps(GOOD).encode()[:100],
    "not UTF-8": b"\xff\xfe\xfa",
    "deep": b"[" * 100_000,
    **{text: text.encode() for text in ("null", "[]", "{}", "3", '"name"', "NaN")},
    "a field less": json.dumps({name: GOOD[name] for name in GOOD if name != "op"}).encode(),
    "a field more": json.dumps({**GOOD, "more": 1}).encode(),
    **{
        f"{name}={value!r:.9}": json.dumps({**GOOD, name: value}).encode()
        for name, value in [
            *(
                ("flops", value)
                for value in (None, 0, -1.0, "1e9", math.inf, math.nan, True, [], 1e-320, 1e300, 10**400)
            ),
            *(("bandwidth", value) for value in (0, None)),
            *(("tile", value) for value in (1.5, -1)),
            *(("cache", value) for value in (-math.inf, 0)),
            ("half_flops", 0),
            ("half_op", -1e-6),
            ("native", math.inf),
            ("name", 3),
        ]
    },
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_record_is_named_and_the_shipped_one_used(kind, record):
    record.write_bytes(DAMAGED[kind])
    with pytest.warns(UserWarning, match="record of this machine is not used: .*machine-cpu.json is damaged: ") as said:
        assert layer()(torch.randn(5, 48)).shape == (5, 48)
    assert len(said) == 1
    assert machine_of(HERE) is CPU
    remember(HERE, CPU)
    assert machine_of(HERE) == CPU


def test_a_folder_in_a_records_place_is_named_and_replaced(record):
    (record / "inner").mkdir(parents=True)
    with pytest.warns(UserWarning, match="machine-cpu.json is not a regular file; plans follow a shipped one"):
        assert machine_of(HERE) is CPU
    remember(HERE, CPU)
    assert machine_of(HERE) == CPU


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_a_record_that_others_may_write_is_named(record):
    remember(HERE, CPU)
    record.chmod(0o602)
    with pytest.warns(UserWarning, match=r"users other than its owner may write to .*machine-cpu.json \(mode 602\)"):
        assert machine_of(HERE) is CPU


def test_a_record_that_cannot_be_reached_is_as_none(tmp_path, monkeypatch):
    def homeless(device):
        raise FileNotFoundError("no home folder is known")

    (tmp_path / "a-file").touch()
    for path in (lambda device: tmp_path / ("x" * 300) / "record", lambda device: tmp_path / "a-file" / "r", homeless):
        monkeypatch.setattr(machines, "_path", path)
        machines._machine.cache_clear()
        assert machine_of(HERE) is CPU
        with pytest.raises(OSError, match=r"too long|exists|Not a directory|no home"):
            remember(HERE, CPU)


def test_a_processor_with_amx_is_planned_for_by_its_own_record(monkeypatch):
    monkeypatch.setattr(machines, "processor", lambda: "x86_64\nflags : fma avx512f amx_bf16")
    machines._machine.cache_clear()
    assert machine_of(HERE) is CPU_AMX
    for spec, fastest in ((LowRank(rank=512).spec(2048, 2048), "autograd"), (layer().spec, "native kernel")):
        found = ways(spec, Key(512, torch.float32, HERE, native=True, mode="training"))
        assert predicted(found).name == fastest  # torch's large products are faster there than the kernel's

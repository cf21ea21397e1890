"""Every plan is made for the machine that runs it: no record is a default, and the measured one is asked for."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import structlin
from structlin.fitting.fit import fit
from structlin.layers.linear import build
from structlin.runtime.kernels import chain_of, operators
from structlin.runtime.machines import machine_of, remember
from structlin.runtime.planner import CPU, find_plan, search
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

"""Modules that are linear maps in other clothes: found by a probe, compressed, stored as such, and merged back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import structlin
from structlin.adapters import Adapter, adapter_of, register
from structlin.adapters import adapter as module_of_adapters
from structlin.adapters import linear as module_of_linear
from structlin.compress.targets import find_targets
from structlin.layers.linear import StructuredLinear


class Transposed(nn.Module):
    """x W + b with W (in, out), as in transformers' Conv1D."""

    def __init__(self, outs: int, ins: int, bias: bool = True) -> None:
        super().__init__()
        self.nf = outs
        self.weight = nn.Parameter(torch.randn(ins, outs))
        self.bias = nn.Parameter(torch.randn(outs)) if bias else None

    def forward(self, x):
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Falcon(nn.Linear):
    """A subclass that says the same in other words."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1e-3 * torch.randn(self.out_features)


class Stateful(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


FORMS = [
    (lambda: Transposed(24, 16), True), (lambda: Transposed(16, 16), True), (lambda: Transposed(24, 16, False), True),
    (lambda: Falcon(16, 24), True), (lambda: Falcon(16, 24, bias=False), True),
    (lambda: Squared(16, 24), False), (lambda: Noisy(16, 24), False), (lambda: Stateful(16, 24), False),
]  # fmt: skip


@pytest.mark.parametrize(("make", "linear"), FORMS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_probe_tells_linear_maps(make, linear, device):
    assert (adapter_of(make().to(device)) is not None) == linear


@pytest.mark.parametrize("make", [make for make, linear in FORMS if linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opening_shares_storage_and_closing_gives_the_form_back(make, dtype):
    module = make().to(dtype).eval()
    adapter = adapter_of(module)
    opened = adapter.open(module)
    x = torch.randn(5, opened.in_features, dtype=dtype)
    torch.testing.assert_close(opened(x), module(x), rtol=1e-2, atol=3e-2 if dtype is torch.bfloat16 else 1e-5)
    assert opened.weight.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()
    back = structlin.adapters.Origin(adapter, module_of_adapters.shell_of(module)).close(opened)
    assert type(back) is type(module)
    assert torch.equal(back.weight, module.weight)
    assert torch.equal(back(x), module(x))
    assert not back.training


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_of_such_forms_is_compressed_stored_and_merged_back(calibrated, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Transposed(64, 48), nn.Tanh(), Falcon(64, 64), nn.Tanh(), Squared(64, 8), nn.LayerNorm(8))
    names = []
    model[0].register_forward_hook(lambda *_: names.append("hook"))
    calibration = [torch.randn(9, 48) for _ in range(4)] if calibrated else None
    skeleton = copy.deepcopy(model)
    report = structlin.compress_model(model, "lowrank", ratio=0.5, calibration=calibration)
    assert [row.structure is not None for row in report.layers] == [True, True, False]
    assert "forward is not x W^T + b" in report.layers[2].reason
    assert isinstance(model[0], StructuredLinear)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    if calibrated:
        assert report.layers[0].output_error < report.layers[0].error
    x = torch.randn(3, 48)
    names.clear()
    y = model(x)
    assert names == ["hook"]
    loaded = structlin.load(skeleton, structlin.save(model, tmp_path / "stored"))
    assert torch.equal(loaded(x), y)
    for each in (loaded, model):
        dense = structlin.to_dense_(each)
        assert [type(dense[0]), type(dense[2])] == [Transposed, Falcon]
        torch.testing.assert_close(dense(x), y)


def test_two_modules_of_one_weight_stay_tied():
    model = nn.ModuleList([Transposed(64, 64), Transposed(64, 64), nn.Tanh()])
    model[1].weight = model[0].weight
    (target,) = find_targets(model)
    assert target.names == ("0", "1")
    structlin.compress_model(model, "lowrank", ratio=0.5, skip_last=False)
    assert model[0].left is model[1].left
    structlin.to_dense_(model)
    assert model[0].weight is model[1].weight
    assert model[0].weight.shape == (64, 64)


def test_an_opened_model_survives_copy_and_pickle():
    model = nn.Sequential(Transposed(64, 64))
    structlin.compress_model(model, "lowrank", ratio=0.5, skip_last=False)
    x = torch.randn(2, 64)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    assert type(structlin.to_dense_(again)[0]) is Transposed


class Scaled(nn.Module):
    """A toy form: two maps packed into one parameter, whose outputs are multiplied."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(2 * outs, ins) / ins**0.5)
        self.depth = 3

    def forward(self, x):
        gate, value = (x @ self.packed.T).chunk(2, -1)
        return gate.sigmoid() * value


class Opened(nn.Module):
    def __init__(self, gate, value) -> None:
        super().__init__()
        self.gate, self.value = gate, value

    def forward(self, x):
        return self.gate(x).sigmoid() * self.value(x)


class ScaledAdapter(Adapter):
    """The promise: a form is reached by one class like this."""

    def recognise(self, module):
        return type(module) is Scaled

    def leaves(self, module):
        return {"gate": ("packed", None), "value": ("packed", None)}

    def open(self, module):
        linears = []
        for half in module.packed.detach().chunk(2):
            linear = nn.Linear(half.shape[1], half.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(half, module.packed.requires_grad)
            linears.append(linear)
        return Opened(*linears)

    def close(self, opened, shell):
        leaves = [x.to_linear() if isinstance(x, StructuredLinear) else x for x in (opened.gate, opened.value)]
        shell.packed = nn.Parameter(torch.cat([leaf.weight.detach() for leaf in leaves]))
        return shell


@pytest.fixture
def toy_form(monkeypatch):
    monkeypatch.setattr(module_of_adapters, "_ADAPTERS", list(module_of_adapters._ADAPTERS))
    register(ScaledAdapter())


@pytest.mark.parametrize("rule", [None, {"0.value": None}])
@pytest.mark.parametrize("options", [{}, {"allocation": "global"}, {"sequential": True}])
@pytest.mark.usefixtures("toy_form")
def test_a_form_defined_here_is_compressed_calibrated_stored_and_merged_back(rule, options, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(48, 64), Scaled(64, 64), nn.Linear(64, 8)).eval()
    dense = copy.deepcopy(model)
    data = [torch.randn(20, 48) for _ in range(6)]
    plan = structlin.plan_compression(model, "lowrank", ratio=0.5, rules=rule or {}, calibration=data, **options)
    assert [entry.name for entry in plan.entries] == ["0.gate", "0.value", "1.gate", "1.value", "2"]
    assert isinstance(model[0], Scaled)
    report = structlin.compress_model(model, plan, calibration=data)
    assert report.coverage.unreached == {}
    assert report.coverage.total == sum(p.numel() for p in dense.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert isinstance(model[0], Opened)
    assert isinstance(model[0].value, nn.Linear if rule else StructuredLinear)
    if rule:  # its storage is its own: the packed parameter is freed
        assert model[0].value.weight.untyped_storage().nbytes() == 4 * 48 * 64
    assert report.qualities[-1].cosine > 0.5
    x = torch.randn(5, 48)
    y = model(x)
    loaded = structlin.load(copy.deepcopy(dense), structlin.save(model, tmp_path / "stored"))
    assert torch.equal(loaded(x), y)
    merged = structlin.to_dense_(loaded)
    assert type(merged[0]) is Scaled
    assert merged[0].depth == 3
    torch.testing.assert_close(merged(x), y, atol=1e-5, rtol=1e-4)
    with pytest.raises(AttributeError):
        loaded[0].gate  # noqa: B018


class Held(nn.Linear):
    """Its scale is out of a key's sight: in a buffer, or in a private attribute."""

    def __init__(self, scale: float, buffer: bool) -> None:
        super().__init__(16, 16)
        if buffer:
            self.register_buffer("scale", torch.tensor(scale))
        else:
            self._scale = scale

    def forward(self, x):
        return super().forward(x) * getattr(self, "scale", getattr(self, "_scale", None))


@pytest.mark.parametrize("buffer", [False, True])
def test_one_module_that_is_linear_does_not_speak_for_another(buffer):
    model = nn.Sequential(Held(1.0, buffer), Held(3.0, buffer))
    assert [adapter_of(module) is not None for module in model] == [True, False]


@pytest.mark.parametrize(("make", "linear"), FORMS)
def test_the_first_probe_may_be_under_the_meta_device(make, linear, monkeypatch):
    monkeypatch.setattr(module_of_linear, "_PROBED", {})
    with torch.device("meta"):  # as transformers loads, in a process that has probed nothing
        assert (adapter_of(make()) is not None) == linear
        assert adapter_of(Held(1.0, buffer=True)) is None  # what the buffer does is not known

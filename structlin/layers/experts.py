"""Fused experts: mixtures whose experts' weights are stacked in one tensor, opened into leaves and merged back."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from structlin.layers.expert_linear import ExpertLinear, StructuredExpertLinear

M = TypeVar("M", bound=nn.Module)

# Axes of the weights, then the leaves of an opened module and the parameters that they are read from. The forms are the
# common one of transformers, the one without a gate, and DBRX's (experts stacked in the rows).
FORMS: tuple[tuple[int, dict[str, str]], ...] = (
    (3, {"gate_up": "gate_up_proj", "down": "down_proj"}),
    (3, {"up": "up_proj", "down": "down_proj"}),
    (2, {"gate": "mlp.w1", "up": "mlp.v1", "down": "mlp.w2"}),
)
PROBED_EXPERTS = 2
PROBE_TOLERANCE = 1e-5  # of the outputs' norm, float32
_PROBED: dict[Any, str | None] = {}
_OWN = {*vars(nn.Module()), "_compiled_call_impl"}  # the attributes of every module


@dataclass(frozen=True)
class Form:
    """How a module holds fused experts.

    Args:
        names: leaf -> names of the module's parameters that it is read from: the weight, then the bias if there is one.
        num_experts: number of experts.
        transposed: leaves whose weights are stored (experts, in, out).
        stacked: forward takes the tokens of all experts, stacked by expert, in place of a routing (Llama 4).
    """

    names: Mapping[str, tuple[str, ...]]
    num_experts: int
    transposed: frozenset[str]
    stacked: bool

    def leaf(self, module: nn.Module, name: str) -> ExpertLinear:
        """Read a leaf: its parameters are the module's, or views of them."""
        weight, *bias = map(module.get_parameter, self.names[name])
        view = weight if weight.ndim == 3 else weight.unflatten(0, (self.num_experts, -1))
        return ExpertLinear(_shared(weight, view.mT if name in self.transposed else view), *bias)

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shape (experts, out, in) of each leaf's weight."""
        return {name: tuple(self.leaf(module, name).weight.shape) for name in self.names}


def _shared(parameter: nn.Parameter, view: Tensor) -> nn.Parameter:
    return parameter if view is parameter else nn.Parameter(view.detach(), requires_grad=parameter.requires_grad)


def form_of(module: nn.Module) -> Form | None:
    """Recognise fused experts by their parameters; None for any other module."""
    for axes, weights in FORMS:
        tensors = [_parameter(module, name) for name in weights.values()]
        held = [tensor for tensor in tensors if tensor is not None and tensor.ndim == axes]
        if len(held) == len(weights):
            break
    else:
        return None
    count = len(held[-1]) if axes == 3 else getattr(module, "num_experts", None)
    if not isinstance(count, int) or (axes == 2 and any(len(tensor) % count for tensor in held)):
        return None
    biases = {leaf: f"{name}_bias" for leaf, name in weights.items()}
    names = {
        leaf: (name,) if _parameter(module, biases[leaf]) is None else (name, biases[leaf])
        for leaf, name in weights.items()
    }
    stacked = len(inspect.signature(module.forward).parameters) == 1
    if axes == 2:
        return Form(names, count, frozenset({"down"}), stacked)
    plain = Form(names, count, frozenset(), stacked)
    turned = replace(plain, transposed=frozenset(names))
    flag = getattr(module, "is_transposed", not _fits(plain, module) and _fits(turned, module))
    return turned if flag else plain


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return module.get_parameter(name)
    except AttributeError:
        return None


def _fits(form: Form, module: nn.Module) -> bool:
    """Return whether the sizes of the leaves and biases agree."""
    shapes = form.shapes(module)
    _, features, inner = shapes["down"]
    wide = 2 * inner if "gate_up" in shapes else inner
    expected = dict.fromkeys(shapes, (form.num_experts, wide, features))
    expected["down"] = (form.num_experts, features, inner)
    biases = {name: module.get_parameter(names[1]).shape for name, names in form.names.items() if len(names) == 2}
    return shapes == expected and all(shape == expected[name][:2] for name, shape in biases.items())


def refusal(module: nn.Module, form: Form) -> str | None:
    """Say why recognised experts must stay as they are, or None.

    Unless the module is on the meta device, it is probed: two experts of its sizes, with random float32 weights on the
    CPU, must give the same outputs opened as by the module's own eager code. One probe serves all modules of a class
    with the same sizes and settings.
    """
    known = {name for names in form.names.values() for name in names}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    others = sorted(name for name, _ in tensors if name not in known)
    arguments = list(inspect.signature(module.forward).parameters)
    if getattr(module, "has_post_expert_norm", False):
        return "experts with a norm after each expert"
    if others:
        return f"experts with {', '.join(others)} beside their projections"
    if getattr(module, "_is_expert_parallel", False):
        return "experts spread over processes"
    if "forward" in vars(module) or len(arguments) not in (1, 3):
        return f"experts whose forward is not that of a known form: it takes {', '.join(arguments)}"
    if not _fits(form, module):
        return f"experts whose sizes do not agree: {form.shapes(module)}"
    weight = module.get_parameter(form.names["down"][0])
    if not weight.is_floating_point() or weight.itemsize < 2:
        return f"experts in {weight.dtype}"
    if weight.is_meta:
        return None
    settings = tuple(sorted((name, repr(value)) for name, value in _settings(module).items() if name != "config"))
    key = type(module), type(module).forward, tuple(form.shapes(module).items()), settings, str(module)
    if key not in _PROBED:
        _PROBED[key] = _probe(module, form)
    return _PROBED[key]


@torch.no_grad()
def _probe(module: nn.Module, form: Form) -> str | None:
    count = min(form.num_experts, PROBED_EXPERTS)
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device="cpu")

    twin = _light_copy(module)
    settings = vars(twin)
    if "num_experts" in settings:
        settings["num_experts"] = count
    if "config" in settings:
        settings["config"] = copy.deepcopy(settings["config"])
        settings["config"]._experts_implementation = "eager"
    for names in form.names.values():
        for name in names:
            rows, *rest = module.get_parameter(name).shape
            value = draw(rows // form.num_experts * count, *rest)
            # Outputs of size 4 reach the clamps of gates.
            value *= 4 / math.sqrt(value.shape[-1]) if name == names[0] else 1
            owner, _, last = name.rpartition(".")
            twin.get_submodule(owner)._parameters[last] = nn.Parameter(value)
    tokens = 4
    x = draw(tokens, form.shapes(module)["down"][1])
    arguments = [x]
    if not form.stacked:
        arguments += [draw(tokens, count).argsort(dim=-1), draw(tokens, count)]
        if "gate" in form.names:
            arguments[0] = x.unsqueeze(0)  # DBRX: batch, tokens, features
    try:
        expected = twin.forward(*arguments)
    except Exception as error:
        return f"experts that do not run on a probe: {type(error).__name__}: {error}"
    found = StructuredExperts.from_experts(twin, replace(form, num_experts=count))(*arguments)
    if expected.shape == found.shape and (found - expected).norm() <= PROBE_TOLERANCE * expected.norm():
        return None
    return "experts that compute something else than act(gate) * up between their projections, or route otherwise"


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside its parameters, children and hooks."""
    return {name: value for name, value in vars(module).items() if name not in _OWN}


def _light_copy(module: M) -> M:
    """Copy a module so that parameters can be put in place of others; tensors and settings are shared."""
    found = copy.copy(module)
    vars(found).update({name: copy.copy(value) for name, value in vars(module).items() if name in _OWN})
    found._modules = {name: child and _light_copy(child) for name, child in module._modules.items()}
    return found


class StructuredExperts(nn.Module):
    """Run a mixture of experts whose projections are leaves, `ExpertLinear` or `StructuredExpertLinear`.

    The leaves are `gate_up` and `down`; `up` and `down` for experts without a gate; `gate`, `up`, `down` for DBRX. A
    packed or interleaved `gate_up` keeps its order, and the gate function of the original splits it. Signature and
    outputs are those of the module that was opened; the experts run one after another whatever
    `config._experts_implementation` says, and sums are accumulated in the wider dtype of tokens and routing weights.

    The numbers of tokens of the experts are read by Python: `torch.compile` breaks its graph here, and `torch.export`
    refuses; merge back (`to_experts`) before an export.
    """

    num_experts: int
    stacked: bool
    act_fn: Callable[[Tensor], Tensor]
    apply_gate: Callable[[StructuredExperts, Tensor], Tensor]

    @classmethod
    def from_experts(cls, module: nn.Module, form: Form | None = None) -> Self:
        """Open a module that `form_of` recognises and `refusal` accepts; the leaves share its parameters.

        Settings (activation, limits of the gate, flags) are taken over under their names.
        """
        form = form or form_of(module)
        assert form is not None
        opened = cls()
        vars(opened).update(_settings(module))
        for name, child in module.named_children():
            if next(child.parameters(), None) is None:
                opened.add_module(name, child)
        if "gate" in form.names:
            opened.act_fn = module.get_submodule("mlp").activation_fn  # type: ignore[assignment]
        opened.num_experts = form.num_experts
        opened.stacked = form.stacked
        opened.apply_gate = getattr(type(module), "_apply_gate", _apply_gate)
        for name in form.names:
            opened.add_module(name, form.leaf(module, name))
        return opened.train(module.training)

    def to_experts(self, shell: nn.Module) -> nn.Module:
        """Build the original form again, structured leaves made dense.

        Args:
            shell: the module that was opened, or a copy of it with parameters on the meta device; it is not changed.
        """
        form = form_of(shell)
        assert form is not None
        module = _light_copy(shell)
        # Not those of the shell: the config must stay the model's own, through which transformers switches modes.
        vars(module).update({name: value for name, value in _settings(self).items() if name in vars(shell)})
        for name, names in form.names.items():
            held = self.get_submodule(name)
            leaf = held.to_linear() if isinstance(held, StructuredExpertLinear) else held
            assert isinstance(leaf, ExpertLinear)
            weight = leaf.weight.mT if name in form.transposed else leaf.weight
            if shell.get_parameter(names[0]).ndim == 2:
                weight = weight.flatten(0, 1)
            for full, value, source in zip(names, (weight, leaf.bias), (leaf.weight, leaf.bias), strict=False):
                owner, _, last = full.rpartition(".")
                assert value is not None
                assert source is not None
                setattr(module.get_submodule(owner), last, _shared(source, value.contiguous()))
        return module.train(self.training)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Compute the weighted sum of each token's experts.

        Args:
            hidden_states: (..., features); for Llama 4 the tokens of all experts, stacked by expert.
            top_k_index: (tokens, k), the experts of each token; numbers from num_experts on are left out.
            top_k_weights: (tokens, k).
        """
        if self.stacked:
            parts = hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1])
            return torch.cat([self._expert(part, expert) for expert, part in enumerate(parts)])
        assert top_k_index is not None
        assert top_k_weights is not None
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        # By expert, then by the place among the k, then by token: the order in which transformers adds up.
        experts, order = top_k_index.T.reshape(-1).sort(stable=True)
        tokens = order % len(rows)
        weights = top_k_weights.T.reshape(-1)[order].unsqueeze(-1)
        total = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, weights.dtype))
        start = 0
        for expert, count in enumerate(experts.bincount(minlength=self.num_experts).tolist()[: self.num_experts]):
            if count:
                part = slice(start, start + count)
                y = self._expert(rows[tokens[part]], expert) * weights[part]
                total.index_add_(0, tokens[part], y.to(total.dtype))
            start += count
        return total.to(rows.dtype).view(hidden_states.shape)

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        leaves: Mapping[str, Any] = self._modules
        if "gate_up" in leaves:
            inner = self.apply_gate(self, leaves["gate_up"](x, expert))
        elif "gate" in leaves:
            inner = self.act_fn(leaves["gate"](x, expert)) * leaves["up"](x, expert)
        else:
            inner = self.act_fn(leaves["up"](x, expert))
        down: Tensor = leaves["down"](inner, expert)
        return down


def _apply_gate(experts: StructuredExperts, gate_up: Tensor) -> Tensor:
    """Split into gate and up, where a module has no `_apply_gate` of its own."""
    gate, up = gate_up.chunk(2, dim=-1)
    return experts.act_fn(gate) * up

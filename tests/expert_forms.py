"""Modules with fused experts: a toy of every form, and those of transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

EXPERTS, FEATURES, INNER, TOKENS, K = 5, 16, 8, 9, 2  # rows of a multiple of 16 bytes, as grouped_mm asks


# Toy modules ---------------------------------------------------------------------------------------------------------


def route(module, x, index, weights, expert):
    """The plain definition of a mixture: every token, every place."""
    rows = [sum(w * expert(row, int(e)) for e, w in zip(index[t], weights[t])) for t, row in enumerate(x)]  # noqa: B905
    return torch.stack(rows)


class Packed(nn.Module):
    """Gate and up projection in one tensor, as transformers has it."""

    def __init__(self, bias: bool = False, transposed: bool = False) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.transposed = transposed
        shapes = {"gate_up_proj": (2 * INNER, FEATURES), "down_proj": (FEATURES, INNER)}
        for name, shape in shapes.items():
            value = torch.randn(EXPERTS, *shape)
            setattr(self, name, nn.Parameter(value.mT.contiguous() if transposed else value))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, shape[0])))

    def linear(self, name, x, e):
        weight, bias = getattr(self, name)[e], getattr(self, f"{name}_bias", None)
        return F.linear(x, weight.T if self.transposed else weight, None if bias is None else bias[e])

    def gated(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        def expert(row, e):
            return self.linear("down_proj", self.gated(self.linear("gate_up_proj", row, e)), e)

        return route(self, hidden_states, top_k_index, top_k_weights, expert)


class Interleaved(Packed):
    """As GPT-OSS: gate and up take turns, and are clamped."""

    def __init__(self) -> None:
        super().__init__(bias=True, transposed=True)
        self.limit = 1.5

    def gated(self, gate_up):
        return self._apply_gate(gate_up)

    def _apply_gate(self, gate_up):
        gate, up = gate_up[..., ::2].clamp(max=self.limit), gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return self.act_fn(gate) * (up + 1)


class Ungated(nn.Module):
    """As Nemotron-H."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.GELU()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, INNER, FEATURES))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, FEATURES, INNER))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        def expert(row, e):
            return self.down_proj[e] @ self.act_fn(self.up_proj[e] @ row)

        return route(self, hidden_states, top_k_index, top_k_weights, expert)


class Stacked(nn.Module):
    """As Llama 4: transposed, and the tokens come stacked by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, FEATURES, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, FEATURES))

    def forward(self, hidden_states):
        gate, up = (hidden_states.view(len(self.down_proj), -1, FEATURES) @ self.gate_up_proj).chunk(2, dim=-1)
        return ((self.act_fn(gate) * up) @ self.down_proj).view(-1, FEATURES)


class TwoDimensional(nn.Module):
    """As DBRX: three tensors in a child, the experts stacked in their rows; batches of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.mlp = nn.Module()
        self.mlp.activation_fn = nn.SiLU()
        for name in ("w1", "v1", "w2"):
            setattr(self.mlp, name, nn.Parameter(torch.randn(EXPERTS * INNER, FEATURES)))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        w1, v1, w2 = (w.view(-1, INNER, FEATURES) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))

        def expert(row, e):
            return (self.mlp.activation_fn(w1[e] @ row) * (v1[e] @ row)) @ w2[e]

        flat = hidden_states.reshape(-1, FEATURES)
        return route(self, flat, top_k_index, top_k_weights, expert).view(hidden_states.shape)


TOYS: dict[str, Callable[[], nn.Module]] = {
    "packed": Packed,
    "biased": lambda: Packed(bias=True),
    "transposed": lambda: Packed(transposed=True),
    "interleaved": Interleaved,
    "ungated": Ungated,
    "stacked": Stacked,
    "2-D": TwoDimensional,
}


# Modules of transformers ---------------------------------------------------------------------------------------------

SIZES = {"hidden_size": FEATURES, "intermediate_size": INNER, "num_local_experts": EXPERTS}
# name -> (class, class of its config, settings)
REAL = {
    "mixtral": ("MixtralExperts", "MixtralConfig", SIZES),
    "qwen3_moe": (
        "Qwen3MoeExperts",
        "Qwen3MoeConfig",
        {"hidden_size": FEATURES, "moe_intermediate_size": INNER, "num_experts": EXPERTS},
    ),
    "deepseek_v3": (
        "DeepseekV3Experts",
        "DeepseekV3Config",
        {"hidden_size": FEATURES, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS},
    ),
    "gpt_oss": ("GptOssExperts", "GptOssConfig", SIZES),
    "llama4": ("Llama4TextExperts", "Llama4TextConfig", SIZES),
    "dbrx": (
        "DbrxExperts",
        "DbrxFFNConfig",
        {"hidden_size": FEATURES, "ffn_hidden_size": INNER, "moe_num_experts": EXPERTS},
    ),
    "nemotron_h": (
        "NemotronHExperts",
        "NemotronHConfig",
        {"hidden_size": FEATURES, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS},
    ),
    "aria": (
        "AriaExperts",
        "AriaTextConfig",
        {"hidden_size": FEATURES, "intermediate_size": INNER, "moe_num_experts": EXPERTS, "num_attention_heads": 2},
    ),
}
SWITCHED = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "aria")  # their forward asks the config


def real(name: str) -> nn.Module:
    pytest.importorskip("transformers")
    cls, config, settings = REAL[name]
    try:
        modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
        made = getattr(modeling, cls)(getattr(configuration, config)(**settings))
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this transformers has another {name}: {error}")
    if hasattr(made, "config"):
        made.config._experts_implementation = "eager"
    return made


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = TOYS[name]() if name in TOYS else real(name)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.to(dtype)


class Squared(Packed):
    def gated(self, gate_up):
        return super().gated(gate_up).square()

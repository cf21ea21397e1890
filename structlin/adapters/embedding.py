"""`nn.Embedding` and subclasses that scale its rows: on request, or as part of a tie with the output layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structlin.adapters.adapter import Adapter, shell_of
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear

_PROBED_ROWS = 16


class Embedding(Adapter):
    """`nn.Embedding`: its table is the weight of a linear map from columns to rows.

    A probe on random rows tells whether a subclass looks rows up and multiplies them by one number (Gemma, Bart).
    """

    on_request = True

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module looks rows up, and perhaps scales them."""
        return isinstance(module, nn.Embedding) and _scale(module) is not None

    def reason(self, module: nn.Module) -> str | None:
        """Refuse tables that lookups write into, and gradients that are sparse or divided by counts."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "max_norm writes into the table at each lookup"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq divides the gradient of a row by its count"
        return "its gradient is sparse" if module.sparse else None

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The table, as the weight of `linear`."""
        return {"linear": ("weight", None)}

    def open(self, module: nn.Module) -> nn.Module:
        """Return a `StructuredEmbedding` of a dense linear map."""
        assert isinstance(module, nn.Embedding)
        scale = _scale(module)
        assert scale is not None
        linear = nn.Linear(module.embedding_dim, module.num_embeddings, bias=False, device="meta")
        linear.weight = module.weight
        opened = StructuredEmbedding(linear, module.padding_idx, scale=scale.number, round_scale=scale.rounded)
        return opened.train(module.training)

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Fill the shell with the table."""
        assert isinstance(opened, StructuredEmbedding)
        linear = opened.linear
        shell.weight = (linear.to_linear() if isinstance(linear, StructuredLinear) else linear).weight
        for name, buffer in _unknown(shell).items():
            shell._buffers[name] = torch.full_like(buffer, opened.scale, device=linear.weight.device)
        return shell


class _Scale(NamedTuple):
    """What multiplies the rows, and whether it is rounded to their dtype first."""

    number: float
    rounded: bool


def _scale(module: nn.Embedding) -> _Scale | None:
    """Return the scale of the rows, None if the module does anything else."""
    if type(module).forward is nn.Embedding.forward and "forward" not in vars(module):
        return _Scale(1.0, False)
    if set(module._parameters) != {"weight"} or module._modules or module.weight.ndim != 2:
        return None
    copy = shell_of(module).eval()
    copy.padding_idx = None
    unknown = _unknown(module)
    for name, buffer in module._buffers.items():
        if name not in unknown:
            copy._buffers[name] = buffer if buffer is None else buffer.cpu()
        elif isinstance(number := getattr(module, f"scalar_{name}", None), (int, float)):
            copy._buffers[name] = torch.full_like(unknown[name], number, device="cpu")  # transformers keeps both
        else:
            return None
    with torch.device("cpu"):  # transformers loads under the meta device
        return _probed_scale(copy)


def _probed_scale(copy: nn.Embedding) -> _Scale | None:
    ids = torch.tensor([[3, 0, 7], [7, _PROBED_ROWS - 1, 1]])
    table = torch.rand(_PROBED_ROWS, copy.embedding_dim, generator=torch.Generator().manual_seed(0)) + 0.5
    plain = [F.embedding(ids, table.to(dtype)) for dtype in (torch.float64, torch.bfloat16)]
    probed = (_probe(copy, ids, table.to(rows.dtype)) for rows in plain)
    found = [rows for rows in probed if rows is not None and rows.shape == plain[0].shape]
    if len(found) < len(plain):
        return None
    number = (found[0] / plain[0]).median().item()
    for rounded in (True, False):  # the two differ in bfloat16
        factors = [torch.tensor(number).to(rows.dtype) if rounded else number for rows in plain]
        pairs = zip(found, plain, factors, (1e-6, 0.0), strict=True)
        if all(torch.allclose(rows, one * factor, rtol=rtol, atol=0) for rows, one, factor, rtol in pairs):
            return _Scale(number, rounded)
    return None


def _unknown(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are on the meta device."""
    return {name: value for name, value in module._buffers.items() if value is not None and value.is_meta}


def _probe(copy: nn.Embedding, ids: Tensor, table: Tensor) -> Tensor | None:
    """Look rows up by the module's own forward; an error means that it is not called like an embedding."""
    copy._parameters["weight"] = nn.Parameter(table)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = copy(ids)
    except Exception:  # whatever it is
        return None
    return found if isinstance(found, Tensor) and found.dtype == table.dtype else None

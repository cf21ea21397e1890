"""`nn.Linear`, and modules that a probe shows to be one in other clothes: subclasses, and transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structlin.adapters.adapter import Adapter, shell_of
from structlin.layers.linear import StructuredLinear


class PlainLinear(Adapter):
    """`nn.Linear` itself: it opens to itself."""

    narrows = True

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module is an `nn.Linear` and of no subclass."""
        return type(module) is nn.Linear

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The module is its only leaf."""
        return {"": ("weight", "bias")}

    def open(self, module: nn.Module) -> nn.Module:
        """Return the module."""
        return module

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Return an `nn.Linear`."""
        return _dense(opened, shell.in_features, shell.out_features)  # type: ignore[arg-type]


class ProbedLinear(Adapter):
    """Modules of other classes with parameters `weight` (out, in) and `bias` whose forward is x W^T + b.

    A probe on random inputs tells: it runs the module's forward with random parameters in float64.
    """

    narrows = True
    transposed = False

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module holds a matrix and perhaps a bias, nothing else, and the probe agrees."""
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        return (
            weight is not None
            and not is_lazy(weight)
            and weight.ndim == 2
            and not module._modules
            and "forward" not in vars(module)
            and {name for name, value in module._parameters.items() if value is not None} <= {"weight", "bias"}
            and (bias is None or bias.shape == weight.shape[1 if self.transposed else 0 : 2 if self.transposed else 1])
            and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            and _is_linear(module, self.transposed)
        )

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The module is its only leaf."""
        return {"": ("weight", "bias" if module._parameters.get("bias") is not None else None)}

    def open(self, module: nn.Module) -> nn.Module:
        """Return an `nn.Linear` on the same storage."""
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        matrix = weight.detach().mT if self.transposed else weight.detach()
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(matrix, weight.requires_grad)
        linear.bias = bias  # type: ignore[assignment]
        return linear.train(module.training)

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Fill the shell with the weight and bias."""
        rows, columns = shell._parameters["weight"].shape  # type: ignore[union-attr]
        linear = _dense(opened, *((rows, columns) if self.transposed else (columns, rows)))
        weight = linear.weight.detach()
        shell.weight = nn.Parameter(weight.mT.contiguous() if self.transposed else weight, linear.weight.requires_grad)
        shell.bias = linear.bias
        return shell


class TransposedLinear(ProbedLinear):
    """Modules with `weight` (in, out) whose forward is x W + b, such as transformers' `Conv1D`."""

    transposed = True


def _dense(opened: nn.Module, in_features: int, out_features: int) -> nn.Linear:
    """Return the map as an `nn.Linear` of these sizes, with zeros for the inputs and outputs that it lost."""
    linear = opened.to_linear() if isinstance(opened, StructuredLinear) else opened
    assert isinstance(linear, nn.Linear)
    rows, columns = out_features - linear.out_features, in_features - linear.in_features
    if rows or columns:
        weight, bias = F.pad(linear.weight.detach(), (0, columns, 0, rows)), linear.bias
        linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
        linear.bias = None if bias is None else nn.Parameter(F.pad(bias.detach(), (0, rows)), bias.requires_grad)
        linear.in_features, linear.out_features = in_features, out_features
    return linear


_EVERYWHERE = frozenset(vars(nn.Module()))  # attributes that every module has
_PROBED: dict[tuple[object, ...], bool] = {}  # a model has many modules of one class and size


def _is_linear(module: nn.Module, transposed: bool) -> bool:
    settings = {k: v for k, v in vars(module).items() if k not in _EVERYWHERE}
    shapes = ((name, p is None or tuple(p.shape)) for name, p in module._parameters.items())
    key = type(module), transposed, *shapes, *settings.items()
    # What a forward does may depend on values that no key holds.
    known = not module._buffers and all(isinstance(v, (bool, int, float, str, type(None))) for v in settings.values())
    if known and key in _PROBED:
        return _PROBED[key]
    with torch.device("cpu"):  # transformers loads under the meta device, which has no values to compare
        found = _probe(module, transposed)
    if known:
        _PROBED[key] = found
    return found


def _probe(module: nn.Module, transposed: bool) -> bool:
    """Run the forward of a copy with random parameters on random inputs; an error means no."""
    generator = torch.Generator().manual_seed(0)
    copy = shell_of(module).eval()
    # Large matrices are drawn in half of the memory.
    large = max(p.numel() for p in module._parameters.values() if p is not None) > 2**24
    dtype = torch.float32 if large else torch.float64

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    for name, value in module._parameters.items():
        if value is not None:
            copy._parameters[name] = nn.Parameter(draw(*value.shape))
    weight, bias = copy._parameters["weight"], copy._parameters.get("bias")
    assert weight is not None
    x = draw(2, 3, weight.shape[0 if transposed else 1])
    expected = x @ (weight if transposed else weight.mT) + (0 if bias is None else bias)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = copy(x)
    except Exception:  # whatever it is, it is not called like a linear map
        return False
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-9}[dtype] * expected.abs().max().item()
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and not found.is_meta  # by a buffer
        and bool(((found - expected).abs() <= tolerance).all())
    )

"""Training from scratch: learning rates for factors, derived from the equation, and a dense guide that fades."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structlin.equation.geometry import applied
from structlin.equation.spec import Spec
from structlin.layers.factored import Factored
from structlin.layers.init import factor_rms
from structlin.layers.linear import StructuredLinear


def param_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0, base_width: int | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for Adam or AdamW, with a learning rate for each factor that suits its shape.

    A step of Adam moves each entry by about `lr`, and so the spectral norm of a dense weight by up to
    lr sqrt(in out), that of a factor by lr_f sqrt(in_f out_f). Each factor f of N gets the rate at which the product
    moves by one N-th of what a dense weight does:

        lr_f = lr sqrt(in out) / (N sqrt(in_f out_f) prod_{g not f} |g|),    |g| = rms_g sqrt(max(in_g, out_g))

    in_f, out_f: what a factor sums over and what it makes when the factors are applied to an input one by one; |g|: the
    spectral norm of its orthogonal blocks at initialisation, of entries rms_g. Weight decay is divided by
    N lr_f / lr, so that the product decays as a dense weight does; vectors (biases, norms) do not decay. All is read
    from the shapes, so that groups made again for a loaded optimizer state are the same.

    Args:
        model: any module; its structured layers are found, all other parameters get `lr`.
        lr: the rate for dense weights.
        weight_decay: of AdamW.
        base_width: the width for which `lr` was tuned: matrices and factors of layers with d inputs then get
            base_width / d of it.
    Returns:
        Groups of `params`, `lr` and `weight_decay`, without parameters that do not require gradients.
    Raises:
        ValueError: if a rate or width is not positive.
    Source: Qiu et al. 2024, Compute better spent: replacing dense layers with structured matrices. For factors drawn
        as there, the formula is theirs, lr (in / in_f) / N; this one holds for any initialisation.
    Example:
        >>> from structlin import LowRankLinear
        >>> groups = param_groups(LowRankLinear(64, 64, rank=4), 1e-3)
        >>> sorted(round(group["lr"], 5) for group in groups)
        [0.001, 0.00132]
    """
    if lr <= 0 or (base_width is not None and base_width < 1):
        raise ValueError(f"lr={lr}, base_width={base_width}; both must be positive")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in model.modules():
        rates = dict(_factor_rates(module.spec)) if isinstance(module, Factored) else {}
        inputs = module.in_features if isinstance(module, (Factored, nn.Linear)) else None
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            vector = name == "bias" or parameter.ndim < 2
            rate, factors = rates.get(name, (1.0, 1))
            width = 1.0 if base_width is None or inputs is None or vector else base_width / inputs
            decay = 0.0 if vector else weight_decay / (rate * factors)
            groups.setdefault((lr * rate * width, decay), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def _factor_rates(spec: Spec) -> Iterator[tuple[str, tuple[float, int]]]:
    """Yield the name of each learned factor with its rate / the dense rate, and the number of factors."""
    count = sum(factor.learned for factor in spec.factors)
    std = 1 / math.sqrt(3 * spec.in_features * len(spec.equations))
    for eq in spec.equations:
        rms = factor_rms(eq, std)
        steps = applied(eq)
        sizes = [(eq.numel(step.summed), eq.numel(step.new)) for step in steps]
        factors = [eq.factors[step.factor] for step in steps]
        norms = [
            math.sqrt(max(size))
            * (rms if f.constant is None else math.sqrt(statistics.fmean(x * x for x in f.constant)))
            for f, size in zip(factors, sizes, strict=True)
        ]
        for factor, size, norm in zip(factors, sizes, norms, strict=True):
            if factor.learned:
                others = math.prod(norms) / norm
                dense = math.sqrt(spec.in_features * spec.out_features)
                yield factor.name, (dense / (count * math.sqrt(math.prod(size)) * others), count)


class Guide(nn.Module):
    """Dense weights that guide structured layers at the start of training, and fade: see `guided`."""

    position: Tensor

    def __init__(self, model: nn.Module, steps: int, *, stochastic: bool = False) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps={steps}; give the number of optimizer steps over which the guide fades, from 1")
        layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
        if not layers:
            raise ValueError(f"{type(model).__name__} holds no structured linear layer to guide")
        self.steps = steps
        self.stochastic = stochastic
        self.weights = nn.ParameterList(nn.Parameter(layer.to_dense().detach().clone()) for layer in layers)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self._done = 0
        self._handles = [
            layer.register_forward_hook(partial(self._blend, k), with_kwargs=True) for k, layer in enumerate(layers)
        ]

    @property
    def share(self) -> float:
        """The share of the dense weights in the outputs: a half cosine from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * min(self._done / self.steps, 1)))

    def step(self) -> None:
        """Count a step of the optimizer; after the last, layers are as if they had never been guided."""
        self._done += 1
        self.position.fill_(self._done)
        if self._done >= self.steps:
            self.remove()

    def remove(self) -> None:
        """Take the guide off the layers."""
        for handle in self._handles:
            handle.remove()

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._done = int(self.position)
        if self._done >= self.steps:
            self.remove()

    def _blend(
        self, k: int, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        share = self.share
        if not layer.training or (self.stochastic and torch.rand(()).item() >= share):
            return output
        bias: Any = layer.bias
        (x,) = args or kwargs.values()
        return torch.lerp(output, F.linear(x, self.weights[k], bias), share)


def guided(model: nn.Module, steps: int, *, stochastic: bool = False) -> Guide:
    """Guide the structured layers of a model by dense weights that fade: out = c W x + (1 - c) structured(x).

    c falls from 1 to 0 over `steps` steps along a half cosine; the dense weights begin as the structured ones. Only
    forward passes in training mode are guided. Model and state_dict stay as they are: the dense weights belong to the
    guide, and are trained by giving its parameters to the optimizer.

    Args:
        model: a structured layer, or a model that holds some.
        steps: optimizer steps until the guide is gone; the source takes half of all steps.
        stochastic: use the dense weight in a forward pass with probability c only, which saves half of its cost.
    Returns:
        The guide, a module: its `step()` follows `optimizer.step()`; its `state_dict` resumes it.
    Raises:
        ValueError: if steps is below 1 or the model holds no structured layer.
    Source: Wei et al. 2024, Building on efficient foundations: effective training of LLMs with structured feedforward
        layers (self-guided training).
    Example:
        >>> from structlin import LowRankLinear
        >>> layer = LowRankLinear(64, 64, rank=4)
        >>> guide = guided(layer, steps=100)
        >>> optimizer = torch.optim.AdamW([*layer.parameters(), *guide.parameters()])
        >>> layer(torch.randn(2, 64)).sum().backward()
        >>> optimizer.step(); guide.step()
        >>> round(guide.share, 4)
        0.9998
    """
    return Guide(model, steps, stochastic=stochastic)

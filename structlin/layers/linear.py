"""StructuredLinear: the `nn.Linear` whose weight is a structured matrix."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from typing_extensions import Self

from structlin.equation.structure import Structure, hyperparameters
from structlin.fitting.fit import Families, Fit, fit
from structlin.fitting.objective import InputGram
from structlin.layers.factored import Factored
from structlin.layers.quantized import forward_quantized, stored
from structlin.layers.weight import LazyWeight
from structlin.runtime import contract, planner
from structlin.runtime.execution import Execution, Option
from structlin.runtime.machines import machine_of
from structlin.runtime.planner import Order, Plan

L = TypeVar("L", bound="type[StructuredLinear]")

_LAYERS: dict[type[Structure], type[StructuredLinear]] = {}


def layer_of(structure_class: type[Structure]) -> Callable[[L], L]:
    """Make a class the layer of a structure (a class decorator); its keyword arguments are the structure's fields."""

    def decorate(cls: L) -> L:
        cls.structure_class = structure_class
        _LAYERS[structure_class] = cls
        return cls

    return decorate


class StructuredLinear(Factored):
    """Apply y = x W^T + b with a structured W, as `nn.Linear` does with a dense one: (..., in) -> (..., out).

    The factors of W are parameters under the names of the structure's equation. Named layers such as `KroneckerLinear`
    take the hyperparameters as keywords; this class takes any structure, also one of yours.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: learn an additive bias.
        structure: a Structure; open fields are filled in.
        device: of the parameters.
        dtype: of the parameters, any float or complex dtype.
    Raises:
        ValueError: if a size is below 1 or the structure does not fit the sizes.
        TypeError: if a size or a field of the structure is of the wrong kind.
    """

    structure_class: ClassVar[type[Structure] | None] = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        structure: Structure,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
        self._look_up = operator.itemgetter(*(factor.name for factor in self.spec.factors), "bias")

    # Construction --------------------------------------------------------------------------------------------------

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        structure: Structure | Families | None = None,
        ratio: float | None = None,
        gram: Tensor | InputGram | None = None,
        output_gram: Tensor | None = None,
        refine: int | None = None,
        **fields: Any,
    ) -> Self:
        """Decompose the weight of an `nn.Linear`; with a Gram of its inputs, so that its outputs change least.

        The bias is copied (None stays None); dtype, device, `requires_grad` and the training flag are kept.

        Args:
            linear: the dense layer; it is not changed.
            structure: for `StructuredLinear` itself, the structure or its class (several: the best is taken); named
                layers know theirs.
            ratio: parameters kept / dense parameters (bias excluded); sizes are searched.
            gram: G = sum x x^T over the layer's inputs, (in, in), of any scale (`collect_statistics`).
            output_gram: H, (out, out), or its diagonal (out,): weights of the outputs, as a Fisher has them.
            refine: steps of refinement after the closed form; None takes the structure's default, see `fit`.
            **fields: the hyperparameters, in place of a ratio.
        Returns:
            The layer whose `to_dense()` is closest to the weight, in the norm of the Grams where given.
        Raises:
            TypeError: if `linear` is not an `nn.Linear`.
            ValueError: if the weight is not finite, or hyperparameters or ratio do not fit it.
        Example:
            >>> from structlin import LowRankLinear
            >>> layer = LowRankLinear.from_linear(nn.Linear(64, 32), ratio=0.5)
            >>> layer.structure
            LowRank(rank=10)
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear takes an nn.Linear, not {type(linear).__name__}")
        chosen = structure or cls.structure_class
        if chosen is None:
            raise ValueError("StructuredLinear.from_linear needs structure=; named layers such as TTLinear know theirs")
        if isinstance(chosen, type) and ratio is None:
            chosen = chosen(**fields)
        elif fields:
            raise ValueError(f"give either ratio or hyperparameters, not both: ratio={ratio}, {fields}")
        fitted = fit(linear.weight, chosen, ratio=ratio, gram=gram, output_gram=output_gram, refine=refine)
        layer = from_fit(fitted, linear)
        assert isinstance(layer, cls)
        return layer

    # The matrix ----------------------------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """Build W, shape (out_features, in_features), differentiable; cost: the memory of the dense matrix."""
        return contract.to_dense(self.spec, self.factors)

    @property
    def weight(self) -> Tensor:
        """W for code that reads `linear.weight`, not a parameter: rebuilt by each operation on it (`LazyWeight`).

        Shape, dtype and device cost nothing. An in-place write goes to a temporary and is lost; assigning is refused.
        """
        return self.to_dense() if is_compiling() else LazyWeight(self.spec, self.factors)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._refuse_weight()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, as every module does; `weight` is refused (assigning an `nn.Parameter` ends here)."""
        if name == "weight":
            self._refuse_weight()
        if "_execution" in self.__dict__:  # not while the layer is being built
            self._execution.forget()
        super().register_parameter(name, param)

    def _refuse_weight(self) -> None:
        raise AttributeError(
            f"{type(self).__name__}.weight is computed from its factors and cannot be assigned; "
            "assign the factors, or call to_linear() for a dense layer"
        )

    def to_linear(self) -> nn.Linear:
        """Merge into an `nn.Linear` with the same outputs, on the same device, in the same dtype."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.factors[0].dtype
        )
        linear.weight = nn.Parameter(self.to_dense().detach().contiguous(), requires_grad=self.is_trained)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    # Choosing how to run ---------------------------------------------------------------------------------------------

    def plan(self, tokens: int, order: Order = "auto") -> Plan:
        """Return the plan for this many rows: print it for order, FLOPs, bytes and predicted time."""
        factor = self.factors[0]
        machine = machine_of(factor.device)
        return planner.find_plan(self.spec, tokens, itemsize=factor.element_size(), machine=machine, order=order)

    def use_plan(self, plan: Plan | Order, *, autotune: bool = False) -> None:
        """Choose how forward contracts: "auto" (by the number of rows), another order, or a Plan of this layer.

        The layer is not frozen any more.

        Args:
            plan: see above.
            autotune: with "auto", time the best few ways on the first input of each number of rows (rounded up to a
                power of two) and remember the fastest, for all layers of this structure in the process.
        Raises:
            ValueError: if the order is unknown, the plan belongs to another equation, or there is nothing to tune.
        """
        if isinstance(plan, Plan):
            if tuple(part.equation for part in plan.parts) != self.spec.equations:
                raise ValueError(f"the plan contracts {plan.parts[0].equation}, this layer is {self.spec}")
        elif plan not in planner.ORDERS:
            raise ValueError(f"order={plan!r} is unknown; use one of {planner.ORDERS}")
        if autotune and plan != "auto":
            raise ValueError('autotune=True chooses between plans; use it with plan="auto"')
        self._execution = Execution(self.spec, plan, autotune)

    def options(self, tokens: int) -> list[Option]:
        """List the ways to run this many rows, with predicted seconds: in training, in eval, and frozen.

        A call that asks for a gradient runs as in training, any other as in eval; after `structlin.freeze_` as frozen.
        """
        return self._execution.options(tokens, self.factors)

    def explain(self, tokens: int) -> str:
        """Say how forward runs for this many rows, in training, in eval and frozen, with the predicted times."""
        chosen = [option for option in self.options(tokens) if option.chosen]
        lines = [f"{o.mode}: {o.way}, {o.seconds * 1e6:.3g} us predicted for {tokens} rows" for o in chosen]
        return "\n".join([*lines, str(self.plan(tokens))])

    # State: what is derived from the factors, and when it ends --------------------------------------------------------

    @property
    def frozen(self) -> bool:
        """Whether the layer may keep what it derives from its factors; see `structlin.freeze_`."""
        return self._execution.frozen is not None

    @frozen.setter
    def frozen(self, value: bool) -> None:
        # The factors of integers are computed here; a call that asks for the gradient of its input reads them as well.
        with torch.inference_mode(False), torch.no_grad():
            self._execution.freeze(self.factors if value else None, stored(self))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._execution.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as every module does; train(True) also undoes `structlin.freeze_`."""
        if mode:
            self._execution.forget()
        return super().train(mode)

    # The forward pass ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b for x of shape (..., in_features); the result is never a view."""
        if not is_compiling():
            shortcut = self._execution.shortcut
            y = shortcut(x, self._parameters) if shortcut else None
            if y is not None:
                return y
        if x.is_nested or x.layout is not torch.strided:  # no plan reads these; torch takes them as nn.Linear does
            return F.linear(x, self.to_dense(), self.bias)
        self._check(x)
        given = None if is_compiling() else self._given()
        if given is None:
            if self.formats:
                return forward_quantized(self, x)
            given = *self.factors, self.bias
        return self._execution(x, given)

    def _given(self) -> tuple[Any, ...] | None:
        """Return factors and bias by one dict look-up (faster than attributes), or None if one is not a parameter.

        Constant factors are buffers (PHM with algebra="hamilton"), parametrised ones are computed: such layers read
        attributes in every forward pass.
        """
        try:
            return self._look_up(self._parameters)
        except KeyError:
            return None


def build(
    structure: Structure,
    in_features: int,
    out_features: int,
    bias: bool = True,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> StructuredLinear:
    """Build the layer of a structure: its named class where there is one, else `StructuredLinear`."""
    cls = _LAYERS.get(type(structure))
    if cls is None:
        return StructuredLinear(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
    fields: dict[str, Any] = hyperparameters(structure)
    return cls(in_features, out_features, bias, **fields, device=device, dtype=dtype)


def from_fit(fitted: Fit, linear: nn.Linear) -> StructuredLinear:
    """Build the layer that holds a fit, with the bias, flags and device of the dense layer it replaces."""
    layer = build(
        fitted.structure, linear.in_features, linear.out_features, linear.bias is not None,
        device="meta", dtype=linear.weight.dtype,
    )  # fmt: skip
    layer.fill(fitted.factors, linear.bias, linear.weight.requires_grad)
    return layer.train(linear.training)

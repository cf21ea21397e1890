"""Quantise a model on top of its compression: the factors of structured layers, and on request what stayed dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structlin.compress.commit import assemble, replacements, swap_modules
from structlin.compress.config import Pattern, describe, matches
from structlin.compress.output import last_target
from structlin.compress.quantization import Quantization, QuantizedLayer
from structlin.compress.statistics import Statistics
from structlin.compress.targets import Target, find_targets, module_names
from structlin.equation.spec import Spec
from structlin.equation.structure import Structure, show
from structlin.equation.unfolding import unfoldings
from structlin.fitting.fit import fit
from structlin.fitting.objective import InputGram, norm
from structlin.fitting.rounding import Rounded, Rounding, round_factors
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.expert_linear import StructuredExpertLinear
from structlin.layers.factored import Factored
from structlin.layers.linear import build
from structlin.layers.quantized import QuantizedFactor
from structlin.runtime.contract import to_dense
from structlin.runtime.quantized import Format, format_for, unfold
from structlin.structures import Dense, Sum

BITS = {"int8": 8, "int4": 4}
GROUP = 128
CORRECTION = 8  # bits of what is added to a quantised dense matrix
Rules = Mapping[Pattern, str | None]
Held = dict[str, QuantizedFactor]


@torch.inference_mode(False)
@torch.no_grad()
def quantize_(
    model: nn.Module,
    to: str,
    *,
    group: int = GROUP,
    statistics: Statistics | None = None,
    dense: bool | Structure = False,
    rules: Rules | None = None,
) -> Quantization:
    """Store the factors of every structured layer as integers with scales, in place; all layers or none.

    int8 has a scale for each row of a factor, int4 one for each `group` entries of a row, and int8 too (or a quarter of
    them) where one entry is far larger than the others of its row; entry = code * scale, with codes from -127 to 127,
    or -7 to 7. Factors are balanced over their bonds first, and rounded one after the other so that each makes up for
    the errors of those before it (`fitting.rounding.round_factors`).
    The layers stay `StructuredLinear`s, and `structlin.to_dense_` merges them. Their factors are frozen: in training
    the bias learns, adapters do, and scales where `structlin.train_scales_` makes them parameters.
    Layers that are quantised already stay as they are.

    Args:
        model: any module with structured layers, on any device but meta.
        to: "int8" or "int4".
        group: entries of a row that share a scale, a whole number from 2.
        statistics: of the layers' inputs, as `collect_statistics` gives them for this model, or for the dense one where
            no hidden units were removed; without them all inputs count alike.
        dense: also quantise the linear maps that stayed dense, but the output layer, as the structure `Dense`. A
            structure, `LowRank(rank=16)` say, is added to each of these: fitted to what rounding left of the weight in
            the norm of the statistics (for low rank in closed form, as QERA), its own factors in int8.
        rules: pattern -> "int8", "int4" or None (stays as it is), as for `compress_model`; the first match wins. A
            dense layer that a rule names is quantised, `dense` or not.
    Returns:
        A report, which has asked-for layers that must stay dense too, with the reason; its `model` is the model,
        another object only where the root itself was dense.
    Raises:
        ValueError: if a setting is unknown, a rule or the whole call matches no layer, statistics lack a layer, or
            factors are not finite; the model is unchanged.
        TypeError: if `to` is a config of torchao, say: see `structlin.integrations.torchao`.
    Source: GPTQ (Frantar et al. 2023) for the order of rounding, QERA (Zhang et al. 2024) for the corrections.
    Example:
        >>> import structlin
        >>> model = nn.Sequential(structlin.LowRankLinear(64, 64, rank=16))
        >>> quantize_(model, "int8").bytes_after / (64 * 16 * 2) < 1.2
        True
    """
    job = _Job(to, group, statistics, dense, dict(rules or {}))
    structured = {
        module: names for module, names in module_names(model).items() if isinstance(module, Factored)
    }  # fmt: skip
    targets = find_targets(model)
    chosen = {module: job.choice(names, module, True) for module, names in structured.items()}
    last = last_target(model, targets)
    wanted = {t: job.choice(t.spellings, t.linear, bool(dense) and t is not last and not t.on_request) for t in targets}
    job.check_rules()
    job.check_statistics(model, chosen, wanted)
    rows: list[QuantizedLayer] = []
    factors: dict[Factored, Held] = {}
    swaps: dict[nn.Module, nn.Module] = {}
    for module, bits in chosen.items():
        found = _explained(structured[module][0], job.structured, module, structured[module], bits, factors)
        rows.append(found)
    left: list[QuantizedLayer] = []
    for target, bits in wanted.items():
        if bits is not None and target.reason is not None:
            size = sum(parameter.nbytes for parameter in target.linear.parameters() if not is_lazy(parameter))
            left.append(QuantizedLayer(target.name, "dense", target.reason, size, size))
        elif bits is not None:
            row, layer = _explained(target.name, job.dense_layer, target, bits)
            rows.append(row)
            swaps |= replacements(target, layer)
    if not rows:
        raise ValueError(
            "the model has no structured layer to quantise; call compress_model first, or pass dense=True for its "
            "dense linear layers"
        )
    for module, held in factors.items():
        for name, factor in held.items():
            module.hold(name, factor)
    return Quantization(swap_modules(model, assemble(swaps, targets)), (*rows, *left))


@dataclass
class _Job:
    """The settings of a call, checked, and what is done to one layer."""

    to: str
    group: int
    statistics: Statistics | None
    dense: bool | Structure
    rules: dict[Pattern, str | None]
    used: set[Pattern] = field(default_factory=set)
    rounded: dict[tuple[int, ...], Held] = field(default_factory=dict)  # by what layers share

    def __post_init__(self) -> None:
        if not isinstance(self.to, str):
            raise TypeError(
                f"to={type(self.to).__name__}; quantize_ takes 'int8' or 'int4'. For a config of torchao use "
                "structlin.integrations.torchao.quantize_: torchao's own reaches nn.Linear only, and no factor"
            )
        for name in (self.to, *filter(None, self.rules.values())):
            if name not in BITS:
                raise ValueError(f"format {name!r} is unknown; use one of {sorted(BITS)}")
        if type(self.group) is not int or self.group < 2:
            raise ValueError(f"group={self.group!r}; use a whole number from 2, such as 64 or 128")
        if not isinstance(self.dense, (bool, Structure)):
            raise TypeError(f"dense={self.dense!r}; use True, or a structure with its sizes such as LowRank(rank=16)")

    def choice(self, names: Sequence[str], module: nn.Module, default: bool) -> int | None:
        """Return the bits that a layer gets, None if it stays as it is."""
        for pattern, value in self.rules.items():
            if matches(pattern, names, module):
                self.used.add(pattern)
                return None if value is None else BITS[value]
        return BITS[self.to] if default else None

    def check_rules(self) -> None:
        """Refuse rules that match nothing."""
        if unused := [describe(pattern) for pattern in self.rules if pattern not in self.used]:
            raise ValueError(
                f"rules {', '.join(unused)} match no layer; patterns are globs on dotted names, or 're:...'"
            )

    def check_statistics(
        self, model: nn.Module, chosen: Mapping[Any, int | None], wanted: Mapping[Target, int | None]
    ) -> None:
        """Refuse statistics that lack a layer or are of another shape."""
        if self.statistics is None:
            return
        names = module_names(model)
        tables = {module.linear for module in model.modules() if isinstance(module, StructuredEmbedding)}
        sizes = {
            self._known(names[module])[0]: (module.in_features, module.out_features)
            for module, bits in chosen.items()
            if bits is not None and not module.stack and module not in tables
        }
        sizes |= {
            t.name: (t.linear.in_features, t.linear.out_features)
            for t, bits in wanted.items()
            if bits is not None and t.reason is None and not t.stacked and not t.on_request
        }
        known = self.statistics.grams
        if narrowed := [name for name, (inside, _) in sizes.items() if name in known and len(known[name]) > inside]:
            raise ValueError(
                f"layers {narrowed[:5]} have fewer inputs than the statistics, as where hidden units were removed: "
                "collect them from this model, or leave them out"
            )
        self.statistics.check(sizes)

    def _known(self, names: Sequence[str]) -> list[str]:
        """Sort names so that those which the statistics know come first; the map of an opened module has its name."""
        spelled = [each for name in names for each in (name, name.removesuffix(".linear"))]
        return sorted(spelled, key=lambda name: self.statistics is None or name not in self.statistics.grams)

    def _gram(self, name: str) -> InputGram | None:
        statistics = self.statistics
        return statistics.shrunken(name) if statistics is not None and name in statistics.grams else None

    def _grams(self, names: Sequence[str], stack: tuple[int, ...]) -> list[InputGram | None]:
        """Return the Gram of each matrix of a layer."""
        name = self._known(names)[0]
        parts = [f"{each}[{k}]" for each in names for k in range(stack[0])] if stack else [name]
        return [self._gram(part) for part in parts][: stack[0] if stack else 1]

    def structured(
        self, module: Factored, names: Sequence[str], bits: int | None, found: dict[Factored, Held]
    ) -> QuantizedLayer:
        """Round the factors of a structured layer into `found`."""
        before = module.nbytes
        reason = _stays(module, bits)
        if reason is not None:
            return QuantizedLayer(names[0], show(module.structure), reason, before, before)
        assert bits is not None
        matrices = module._matrices()
        forms = _forms(module.spec, bits, self.group, matrices)
        roundings = [
            round_factors(module.spec, factors, forms, gram)
            for factors, gram in zip(matrices, self._grams(names, module.stack), strict=True)
        ]
        found[module] = self.rounded.setdefault(module.weight_id, _held(module.spec, roundings, bool(module.stack)))
        after = sum(factor.nbytes for factor in found[module].values())
        return _row(names[0], module.structure, f"int{bits}", before, after, roundings)

    def dense_layer(self, target: Target, bits: int) -> tuple[QuantizedLayer, Factored]:
        """Build the quantised layer that takes the place of a dense one, whose bias `replacements` gives it."""
        linear = target.linear
        weights = [weight.detach() for weight in target.matrices]
        forms = _forms(Dense().spec(linear.in_features, linear.out_features), bits, self.group, [[w] for w in weights])
        grams = self._grams(target.names, (len(weights),) if target.stacked else ())
        found = [
            _dense(weight, forms, self.group, self.dense, gram) for weight, gram in zip(weights, grams, strict=True)
        ]
        structure = found[0][0]
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        options: Any = {"device": "meta", "dtype": linear.weight.dtype}
        layer: Factored = (
            StructuredExpertLinear(linear.num_experts, *sizes, structure=structure, **options)
            if target.stacked
            else build(structure, *sizes, **options)
        )
        roundings = [rounding for _, rounding in found]
        for name, factor in _held(layer.spec, roundings, target.stacked).items():
            layer.hold(name, factor)
        text = f"int{bits}" if structure == Dense() else f"int{bits} + int{CORRECTION}"
        before = sum(weight.nbytes for weight in weights)
        return _row(target.name, structure, text, before, layer.nbytes, roundings), layer.train(linear.training)


def _stays(module: Factored, bits: int | None) -> str | None:
    """Return why a structured layer stays as it is, None if it is to be quantised."""
    if module.formats:
        return f"already {' '.join(sorted({str(form) for form in module.formats.values()}))}"
    if bits is None:
        return "as a rule has it"
    if module.spec.tied:
        return "tied numbers, which are few as they are"
    learned = [factor.name for factor in module.spec.factors if factor.learned]
    if any(name not in module._parameters for name in learned):
        raise ValueError("its factors are parametrised; remove the parametrisation first")
    factors = [module.get_parameter(name) for name in learned]
    if any(type(factor) is not nn.Parameter for factor in factors):
        raise ValueError("its factors are no plain tensors; gather or dequantise them first")
    if factors[0].is_complex():
        return "complex factors"
    if any(factor.is_meta for factor in factors):
        raise ValueError("its factors are on the meta device; load values first")
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise ValueError("its factors hold NaN or infinite values")
    return None


def _dense(
    weight: Tensor, forms: Sequence[Format | None], group: int, extra: bool | Structure, gram: InputGram | None
) -> tuple[Structure, Rounding]:
    """Round a dense weight, and the structure that is added to it, fitted to what rounding lost."""
    spec = Dense().spec(weight.shape[1], weight.shape[0])
    if not bool(weight.isfinite().all()):
        raise ValueError("its weight holds NaN or infinite values")
    base = round_factors(spec, [weight], forms, gram)
    if isinstance(extra, bool):
        return Dense(), base
    lost = weight - _restored(spec, base)
    found = fit(lost, extra, gram=gram)
    added = round_factors(found.spec, found.factors, _forms(found.spec, CORRECTION, group, ()), gram)
    rest = lost - _restored(found.spec, added)
    rows = torch.eye(weight.shape[1]) if gram is None else gram.root
    rows = rows.to(device=weight.device, dtype=torch.float32)
    error = norm(rows @ rest.float().T) / (norm(rows @ weight.float().T) or 1.0)
    return Sum((Dense(), found.structure)), Rounding(base.factors + added.factors, error, base.compensated)


def _forms(spec: Spec, bits: int, group: int, matrices: Sequence[Sequence[Tensor]]) -> list[Format | None]:
    """Choose the format of each factor, one for all matrices of a stack."""
    return [
        format_for(bits, u, group, [unfold(factors[k], u) for factors in matrices]) if factor.learned else None
        for k, (factor, u) in enumerate(zip(spec.factors, unfoldings(spec), strict=True))
    ]


def _restored(spec: Spec, rounding: Rounding) -> Tensor:
    """Build the dense matrix of rounded factors, none of which is constant."""
    held = _held(spec, [rounding], False)
    return to_dense(spec, [held[factor.name]() for factor in spec.factors])


def _held(spec: Spec, roundings: Sequence[Rounding], stacked: bool) -> Held:
    """Put the rounded factors of one matrix, or of a stack, into modules."""
    result: Held = {}
    for factor, unfolding, *parts in zip(
        spec.factors, unfoldings(spec), *(rounding.factors for rounding in roundings), strict=True
    ):
        found = [part for part in parts if isinstance(part, Rounded)]
        if found:
            codes, scale = (torch.stack([getattr(part, name) for part in found]) for name in ("codes", "scale"))
            codes, scale = (codes, scale) if stacked else (codes[0], scale[0])
            result[factor.name] = QuantizedFactor.of(codes, scale, found[0].form, unfolding)
    return result


def _row(
    name: str, structure: Structure, text: str, before: int, after: int, roundings: Sequence[Rounding]
) -> QuantizedLayer:
    error = sum(rounding.error for rounding in roundings) / len(roundings)
    best = all(rounding.compensated for rounding in roundings)
    return QuantizedLayer(name, show(structure), text, before, after, error, best)


def _explained(name: str, call: Any, *args: Any) -> Any:
    """Call, with the layer's name in errors."""
    try:
        return call(*args)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"layer {name!r}: {error}; the model is unchanged") from error

"""LoRA, DoRA and IA3 of peft on structured layers; importing this module makes peft's own calls know them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.ia3 import IA3Model
from peft.tuners.ia3 import layer as ia3
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear
from structlin.structures.arithmetic import add_low_rank, scaled

ALL_LINEAR = "all-linear"
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of adapters; others (PiSSA) change the base weight, too


class Merging(nn.Module, BaseTunerLayer):
    """Merge adapters into a new structured layer, and put the old one back at `unmerge` (abstract)."""

    base_layer: nn.Module

    def check(self, base: StructuredLinear, config: Any) -> None:
        """Refuse a config that a structured layer cannot carry out, on an empty object and before anything is changed.

        Raises:
            ValueError: saying what is possible.
        """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer, which becomes another structured layer with exactly the sum.

        Args:
            safe_merge: refuse factors that are not finite.
            adapter_names: None for the active ones.
        Raises:
            ValueError: if the structure cannot hold the sum, or factors are not finite under `safe_merge`.
        """
        if not isinstance(self.base_layer, StructuredLinear):  # `to_dense_` has merged it
            return super().merge(safe_merge, adapter_names)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self._adapters():
                continue
            if name in getattr(self, "lora_variant", ()) and self.merged_adapters:
                raise ValueError(f"adapter {name!r} is DoRA of the layer before {self.merged_adapters}; merge it alone")
            merged = self._merged(self.base_layer, name)
            if safe_merge and not all(parameter.isfinite().all() for parameter in merged.parameters()):
                raise ValueError(f"adapter {name!r} makes the merged factors infinite or NaN; it seems to be broken")
            self.__dict__.setdefault("_before", []).append(self.base_layer)
            self.base_layer = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the layer from before `merge`."""
        before = self.__dict__.get("_before")
        if not before:
            return super().unmerge()
        factor = self.base_layer.factors[0]  # type: ignore[index]
        self.base_layer = before[0].to(factor.device, factor.dtype)
        before.clear()
        self.merged_adapters.clear()

    @abstractmethod
    def _adapters(self) -> Any:
        """Return the adapters by name."""

    @abstractmethod
    def _merged(self, base: StructuredLinear, name: str) -> StructuredLinear:
        """Return the base layer with an adapter in it."""


class StructuredLoraLinear(Merging, lora.Linear):
    """LoRA on a structured layer: y = base(x) + scaling B A x; with DoRA the rows are scaled to learned norms.

    Merged, low rank keeps its form with more columns; other structures become a sum with a low-rank part. DoRA needs a
    structure whose rows can be scaled, such as low rank, K-matrices, Monarch or BLAST.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The variants of LoRA that are exact here."""
        return {(): None, ("use_dora",): DoraLinearVariant}

    def check(self, base: StructuredLinear, config: Any) -> None:
        """Refuse DoRA where rows cannot be scaled, other variants of LoRA, and starts that change the base weight.

        A structured layer computes its weight, and peft would write into a temporary.
        """
        if config.init_lora_weights not in STARTS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base weight, which structured layers do "
                f"not store; use one of {STARTS}"
            )
        self.resolve_lora_variant(config=config)
        if config.use_dora:
            scaled(base, rows=torch.ones(base.out_features))

    def _adapters(self) -> Any:
        return self.lora_A

    def _merged(self, base: StructuredLinear, name: str) -> StructuredLinear:
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        right, left = lora_a.weight, lora_b.weight * self.scaling[name]
        merged = add_low_rank(base, left, right)
        if self.lora_bias[name]:
            if merged.bias is None:
                raise ValueError(f"adapter {name!r} has a bias, and the layer has none to merge it into")
            merged.bias.data += lora_b.bias * self.scaling[name]
        if name in self.lora_variant:
            magnitude: Any = self.lora_magnitude_vector[name]
            norms = magnitude.get_weight_norm(base.to_dense(), left @ right, scaling=1)
            bias = merged.bias
            merged = scaled(merged, rows=(magnitude.weight / norms).detach())
            if bias is not None:
                merged.bias = bias  # DoRA scales the weight alone
        return merged


class StructuredIA3Linear(Merging, ia3.Linear):
    """IA3 on a structured layer: its outputs (or, in feed-forward layers, its inputs) times a learned vector.

    It merges where the structure's rows (columns) can be scaled, such as low rank, K-matrices, Monarch or BLAST.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, is_feedforward: bool = False, **_: Any
    ) -> None:
        nn.Module.__init__(self)
        # As in IA3Layer.__init__, which refuses types that it does not know.
        self.base_layer = base_layer
        self.ia3_l = nn.ParameterDict()
        self._disable_adapters, self.merged_adapters = False, []
        self.is_feedforward, self.fan_in_fan_out, self.is_target_conv_1d_layer = is_feedforward, False, False
        base: Any = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)

    def _adapters(self) -> Any:
        return self.ia3_l

    def _merged(self, base: StructuredLinear, name: str) -> StructuredLinear:
        scale: Tensor = self.ia3_l[name].flatten()
        return scaled(base, columns=scale) if self.is_feedforward else scaled(base, rows=scale)


def _structured(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, StructuredLinear)


def linear_names(model: nn.Module) -> set[str]:
    """Name what "all-linear" means: dense and structured layers, without the output layer and tables of embeddings."""
    modules = dict(model.named_modules())
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tables = {module.linear for module in modules.values() if isinstance(module, StructuredEmbedding)}
    wrappers = [f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
    return {
        name
        for name, module in modules.items()
        if (isinstance(module, nn.Linear | Conv1D) or _structured(module))
        and module is not output
        and module not in tables
        and not name.startswith(tuple(wrappers))
    }


class Knowing(BaseTuner):
    """A tuner of peft that knows structured layers (abstract)."""

    layer: type[Merging]  # of adapters on a structured layer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; "all-linear" means structured layers too. Any error leaves the modules as they were.

        Raises:
            ValueError: if `target_parameters` names a factor: an adapter of one factor is none of the weight; or if a
                structured layer cannot carry out the config. Nothing was changed: a start may write into dense weights.
        """
        config: Any = self.peft_config[adapter_name]
        for name, module in model.named_modules():
            factors = [f"{name}.{factor}" for factor, _ in module.named_parameters()] if _structured(module) else []
            for target in getattr(config, "target_parameters", None) or ():
                if any(factor == target or factor.endswith(f".{target}") for factor in factors):
                    raise ValueError(f"target_parameters={target!r} is a factor of {name!r}; name it in target_modules")
        if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
            config.target_modules = linear_names(model)
        config = self._prepare_adapter_config(copy.copy(config), self.get_model_config(model))
        for name, module in model.named_modules():
            if name and _structured(module) and self._check_target_module_exists(config, name):
                base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
                empty = self.layer.__new__(self.layer)
                nn.Module.__init__(empty)
                try:
                    empty.check(base, config)
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
        before = {module: dict(module._modules) for module in model.modules()}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:  # peft checks one module after the other
            for module, children in before.items():
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(adapter_name)
                module._modules.clear()
                module._modules.update(children)
            raise

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into all base layers, or into none if a structured layer cannot hold the sum."""
        self._try_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # fmt: skip
        if merge:
            self._try_merge(safe_merge, adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _try_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Merge each structured layer and put it back: peft merges one after the other, and unloads for good."""
        for name, module in self.model.named_modules():
            if isinstance(module, Merging) and _structured(module) and not module.merged:
                try:
                    module.merge(safe_merge, adapter_names)
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
                finally:
                    if module.merged:
                        module.unmerge()

    def _create_new_module(self, config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if _structured(target):
            return self.layer(target, adapter_name, config=config, **kwargs)
        made: nn.Module = super()._create_new_module(  # type: ignore[misc]
            config, adapter_name, target, **kwargs
        )
        return made


class StructuredLoraModel(Knowing, LoraModel):  # type: ignore[misc]  # what is static there
    """LoraModel of peft, which knows structured layers."""

    layer = StructuredLoraLinear


class StructuredIA3Model(Knowing, IA3Model):  # type: ignore[misc]  # likewise
    """IA3Model of peft, which knows structured layers."""

    layer = StructuredIA3Linear

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, StructuredLinear):  # unloaded: peft would assign a weight to it
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = StructuredLoraModel
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.IA3] = StructuredIA3Model

"""Structured layers as a quantisation method of vLLM: folders that `save_pretrained` wrote are served as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from structlin.checkpoint._manifest import Layer
from structlin.checkpoint.table import METHOD, read_table
from structlin.layers.freeze import freeze_
from structlin.layers.linear import build

MERGED = "merge it by `structlin merge`, and serve that folder"
SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the parts of a fused q/k/v; those of other layers are numbers


class VllmConfig(QuantizationConfig):
    """The `quantization_config` of a compressed folder, for vLLM.

    Args:
        document: the table of structured layers, as `StructlinConfig` writes it.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__()
        self.document = document
        self.layers: dict[str, Layer] = {}  # known when the model's sizes are

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        return cls(config)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the table: its numbers may not exceed those of the model's own config.

        Raises:
            CheckpointError: naming the layer, what was found and what was expected.
            ValueError: if layers share their factors.
        """
        limit = max(number for number in hf_config.get_text_config().to_dict().values() if isinstance(number, int))
        document = {key: value for key, value in self.document.items() if key != "quant_method"}
        table = read_table(document, limit, f"{model_name}: quantization_config")
        if table.shared_layers or table.aliases:
            raise ValueError(f"{model_name}: layers {sorted(table.shared_layers)} share their factors; {MERGED}")
        self.layers = dict(table.layers)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer of vLLM, which may hold several of the checkpoint side by side.

        Raises:
            ValueError: if the layer is no linear map, or only a part of a structured layer.
        """
        if isinstance(layer, LinearBase):
            parent, _, last = prefix.rpartition(".")
            names = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(last, [last])]
            if prefix in self.layers:  # stored as one
                names = [prefix]
            found = {name: self.layers.get(name) for name in names}
            return StructuredMethod(found) if any(found.values()) else UnquantizedLinearMethod()
        inside = [name for name in self.layers if name == prefix or name.startswith(f"{prefix}.")]
        if inside:
            raise ValueError(f"{inside[0]!r} is structured, and vLLM runs it as {type(layer).__name__}; {MERGED}")
        return None


class StructuredMethod(LinearMethodBase):
    """One linear layer of vLLM: structured and dense layers of a checkpoint, with their outputs side by side.

    Args:
        parts: the arguments of each structured layer by its name in the model, in the order of the outputs; None for a
            dense one.
    """

    def __init__(self, parts: Mapping[str, Layer | None]) -> None:
        self.parts = dict(parts)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Build the parts, and a parameter for each name of a stored tensor, which hands tensors on to its part.

        Raises:
            ValueError: if the layer is split over devices, or the parts have other sizes.
        """
        (first, *_), sizes = self.parts, list(output_partition_sizes)
        if (input_size_per_partition, sum(sizes)) != (input_size, output_size):
            raise ValueError(f"{first!r} is structured and cannot be split; use tensor_parallel_size=1")
        if len(self.parts) == 1:
            sizes = [output_size]
        wanted = [(input_size, size) for size in sizes]
        given = [(part.in_features, part.out_features) if part else None for part in self.parts.values()]
        if len(given) != len(wanted) or not all(_fits(g, w) for g, w in zip(given, wanted, strict=False)):
            raise ValueError(f"layers {list(self.parts)} are (in, out) {given}, expected {wanted}")
        layer.parts = nn.ModuleList(
            _part(part, *(g or w), params_dtype) for part, g, w in zip(self.parts.values(), given, wanted, strict=True)
        )
        layer.missing = {(k, name) for k, part in enumerate(layer.parts) for name in part.state_dict()}
        # The sentinel of a structured layer has the name of the weight that it replaced.
        for name in {"weight"} | {name for _, name in layer.missing}:
            gate = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            gate.weight_loader = partial(self._load, layer, name)  # type: ignore[attr-defined]
            factor, _, last = name.rpartition(".")
            _holder(layer, factor).register_parameter(last, gate)

    def _load(self, layer: Any, name: str, _gate: Tensor, value: Tensor, shard: str | int | None = None) -> None:
        number = 0 if shard is None else SHARDS[shard] if isinstance(shard, str) else shard
        part, title = layer.parts[number], f"{list(self.parts)[number]}.{name}"
        own = part.state_dict().get(name)
        if own is None:
            if name != "weight":
                raise ValueError(f"the layer has no tensor {title!r}")
            return
        if own.shape != value.shape:
            raise ValueError(f"tensor {title!r} is {tuple(value.shape)}, expected {tuple(own.shape)}")
        own.copy_(value)
        layer.missing.discard((number, name))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the parameters of the loader away, and freeze the parts.

        Raises:
            ValueError: naming a tensor that the checkpoint lacks.
        """
        for number, name in sorted(layer.missing):
            raise ValueError(f"tensor {f'{list(self.parts)[number]}.{name}'!r} is missing in the checkpoint")
        for name in [name for name in layer._parameters if name != "bias"]:
            del layer._parameters[name]
        for name in [name for name in layer._modules if name != "parts"]:
            del layer._modules[name]
        freeze_(layer.parts.eval())

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs = [part(x) for part in layer.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias


def _fits(given: tuple[int, int] | None, wanted: tuple[int, int]) -> bool:
    """Whether a part has the sizes of the config, or fewer inputs or outputs: hidden units of its MLP are gone."""
    if given is None:
        return True
    return any(map(int.__eq__, given, wanted)) and all(map(int.__le__, given, wanted))


def _holder(layer: nn.Module, factor: str) -> nn.Module:
    """Return the module that holds the parameters for one factor: the integers of a quantised one have two names."""
    if factor and factor not in layer._modules:
        layer.add_module(factor, nn.Module())
    return layer.get_submodule(factor)


def _part(part: Layer | None, in_features: int, out_features: int, dtype: torch.dtype) -> nn.Module:
    """Build a layer without bias, which vLLM adds; its tensors are not initialised."""
    device = torch.get_default_device()  # vLLM builds its models under it
    if part is None:
        built: nn.Module = nn.Linear(in_features, out_features, False, device="meta", dtype=dtype)
    else:
        built = build(part.structure, in_features, out_features, False, device="meta", dtype=dtype)
        built.hold_unfilled(part.formats)
    return built.to_empty(device=device).requires_grad_(False)


def register() -> None:
    """Make vLLM know structured layers; vLLM calls this by its entry point in each of its processes."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(VllmConfig)

"""Structured layers as a quantisation method of transformers, so that its own save and load know them."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from structlin.checkpoint import CheckpointError
from structlin.checkpoint._manifest import Checkpoint
from structlin.checkpoint.table import METHOD, name_readers, read_table, replace_layers, replaced_weights, table_of
from structlin.compress.commit import after_swap, to_dense_
from structlin.integrations import _names as names
from structlin.integrations._resize import resize_token_embeddings
from structlin.layers.attention import StructuredMultiheadAttention
from structlin.layers.factored import Factored


class StructlinConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model: the layer table of `structlin.json`, checked when it is used.

    Args:
        format_version: of the table.
        structlin_version: of the writer.
        layers: kind, sizes, hyperparameters and dtype of each structured layer by dotted name.
        shared_layers: further names of layers, each with the first.
        aliases: further names of their tensors, each with the stored one.
        quant_method: always "structlin".
    """

    quant_method: Any

    def __init__(
        self,
        *,
        format_version: int,
        structlin_version: str,
        layers: dict[str, Any],
        shared_layers: dict[str, str],
        aliases: dict[str, str],
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.format_version = format_version
        self.structlin_version = structlin_version
        self.layers = layers
        self.shared_layers = shared_layers
        self.aliases = aliases

    @classmethod
    def of(cls, model: nn.Module) -> StructlinConfig:
        """Write the table of a model's structured layers."""
        return cls(**table_of(model))

    def table(self, limit: int) -> Checkpoint:
        """Read the table, everything checked; sizes up to a limit, the largest axis of the model."""
        document = {key: value for key, value in self.to_dict().items() if key != "quant_method"}
        return read_table(document, limit, "quantization_config")


class StructlinQuantizer(HfQuantizer):
    """Put structured layers into a model before transformers loads it, and say what to store when it saves it."""

    requires_calibration = False
    quantization_config: StructlinConfig

    def __init__(self, quantization_config: StructlinConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Before `get_new_dtype` there, transformers left renamed tensors of a quantised checkpoint in the stored dtype.
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.hook: RemovableHandle | None = None

    # Loading -------------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        before = set(model.state_dict())
        limit = max((size for parameter in model.parameters() for size in parameter.shape), default=1)
        replace_layers(model, names.fitted(self.quantization_config.table(limit), model))
        for module in model.modules():
            # The initialisation of a module may reach into attention that it holds, as in Siglip.
            if any(isinstance(child, StructuredMultiheadAttention) for child in module.children()):
                module._is_hf_initialized = True
        state = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        names.tie(model, table_of(model)["aliases"])
        # The sentinels of `get_state_dict_and_metadata` have the names of what the layers replaced.
        ignored = {f"^{re.escape(name)}$" for name in before - state.keys()}
        known = model._keys_to_ignore_on_load_unexpected  # None, a list or a set, by the version
        model._keys_to_ignore_on_load_unexpected = (list if known is None else type(known))([*(known or ()), *ignored])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if self.shapes.get(name) != tuple(tensor.shape):
                raise CheckpointError(f"tensor {name!r} is {tuple(tensor.shape)}, expected {self.shapes.get(name)}")
        for name, layer in _structured(model):
            for part, tensor in layer.state_dict(keep_vars=True).items():
                # transformers only warns of missing tensors; those offloaded to disk stay on meta.
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(f"layer {name!r}: tensor {f'{name}.{part}'!r} is missing in the checkpoint")
        return prepare(model)

    # Saving --------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return the tensors to store: each name once, and a NaN under the name of each weight that is no more.

        The NaN has one element: without this plug-in transformers finds it to be of the wrong shape and raises, where a
        mere missing weight would be drawn at random with a warning.
        """
        prepare(model)  # layers may have been swapped since
        if not any(True for _ in _structured(model)):
            return None, {}
        table = self.quantization_config
        state = {name: tensor for name, tensor in _state_dict(model).items() if name not in table.aliases}
        return state | {
            name: torch.full(size, torch.nan) for name, size in replaced_weights(model, table.layers).items()
        }, {}

    def is_serializable(self) -> bool:
        return True

    # Training and merging back ---------------------------------------------------------------------------------------

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        stored = model.config.dtype
        to_dense_(model)  # which prepares the model, too
        if dtype is not None and dtype != stored:
            model.to(dtype)
        return model


def prepare(model: nn.Module) -> nn.Module:
    """Make compressed models of transformers ready for `save_pretrained`, in place.

    `compress_model` and `to_dense_` call this once `structlin.hf` is imported; call it after other changes of layers.
    A model without structured layers is made ordinary again.

    Args:
        model: a `PreTrainedModel`, or a module that holds some.
    Returns:
        The model.
    """
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    structured = [module for module in inner if any(True for _ in _structured(module))]
    if structured and (method := next(filter(None, map(_other_method, structured)), None)):
        warnings.warn(
            f"the model is quantised by {method}: save_pretrained stores one method only and would lose the "
            "structured layers; compress a model that is not quantised",
            stacklevel=2,
        )
        return model
    for module in reversed(inner):  # inner models share the config of the outer one, which is to win
        known: Any = getattr(module, "hf_quantizer", None)
        if module in structured:
            config = StructlinConfig.of(module)
            quantizer = known or StructlinQuantizer(config)
            quantizer.quantization_config = config
            _mark(module, quantizer)
        elif isinstance(known, StructlinQuantizer):
            unprepare(module)
    return model


def _other_method(model: Any) -> str | None:
    """Name the quantisation of a model that is not this one, if it has one."""
    quantizer = getattr(model, "hf_quantizer", None)
    config = quantizer.quantization_config if quantizer else getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method in (None, METHOD) else str(getattr(method, "value", method))


def unprepare(model: Any) -> None:
    """Make a model of transformers ordinary again: what `prepare` set is taken away."""
    quantizer = model.hf_quantizer
    quantizer.hook.remove()
    quantizer.hook = None
    quantizer.remove_quantization_config(model)
    vars(model.config).pop("_is_quantized", None)
    model.model_tags.remove(METHOD)
    names.untie(model)


def _mark(model: Any, quantizer: StructlinQuantizer) -> None:
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.config._is_quantized = True  # read where a model without any nn.Linear is asked for its dtype
    # The parameters are plain floats: half(), float() and to(dtype) work, which transformers forbids to quantised ones.
    model.is_quantized = False
    model.quantization_method = METHOD
    model.add_model_tags([METHOD])
    names.tie(model, quantizer.quantization_config.aliases)
    if quantizer.hook is None:
        quantizer.hook = model.register_load_state_dict_pre_hook(_as_in_the_model)


def _structured(model: nn.Module) -> Iterator[tuple[str, Factored]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Factored))


def _as_in_the_model(model: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Turn the tensors of a saved file into those of `state_dict`: a hook of `load_state_dict`, as Trainer calls it."""
    table = model.hf_quantizer.quantization_config
    for name in replaced_weights(model, table.layers):
        state.pop(prefix + name, None)
    for name, first in table.aliases.items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


def _state_dict(model: Any) -> dict[str, Tensor]:
    """Return what the caller of `save_pretrained` passed as state_dict, else the model's own, gathered if sharded.

    For a quantised model transformers puts the quantizer's tensors in place of the caller's. Under FSDP, Trainer
    gathers on all ranks and saves on one: there the caller's are the only full tensors, and gathering would hang.
    """
    frame = inspect.currentframe()
    while frame is not None and not (
        frame.f_code.co_name == "save_pretrained" and frame.f_locals.get("self") is model
    ):  # fmt: skip
        frame = frame.f_back
    given = frame.f_locals.get("state_dict") if frame else None
    if given is not None:
        return dict(given)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    return dict(model.state_dict())


if METHOD not in AUTO_QUANTIZER_MAPPING:  # the module may be imported again
    register_quantization_config(METHOD)(StructlinConfig)
    register_quantizer(METHOD)(StructlinQuantizer)
    after_swap.append(prepare)
    name_readers.append(names.in_the_model)
    PreTrainedModel.resize_token_embeddings = resize_token_embeddings  # type: ignore[method-assign]

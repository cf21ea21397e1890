"""Names of layers and tensors in a model of transformers: base model prefixes and ties."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from structlin.checkpoint import CheckpointError
from structlin.checkpoint._manifest import Checkpoint
from structlin.checkpoint._skeleton import spot

# The base model and its heads ----------------------------------------------------------------------------------------


def fitted(table: Checkpoint, model: Any) -> Checkpoint:
    """Rename the layers of a table for another class around the same base model, as transformers renames tensors.

    The prefix of the base model is added or taken away; layers of another class's head are left out, and those whose
    tensors the class declares to be ignored (a decoder, say). All others have to be there.
    """
    prefix = f"{model.base_model_prefix}."
    if type(model).__name__ in (model.config.architectures or ()) or prefix == ".":
        return table
    inner = any(name.startswith(prefix) for name in table.layers)
    modules = dict(model.named_modules(remove_duplicate=False))
    has_base = model.base_model is not model

    ignored = [*(model._keys_to_ignore_on_load_unexpected or ())]

    def renamed(name: str) -> str | None:
        if not _known(name, modules) and any(re.search(pattern, f"{name}.weight") for pattern in ignored):
            return None
        if not inner:
            return prefix + name if has_base and not _known(name, modules) else name
        if name.startswith(prefix):
            return name if has_base else name.removeprefix(prefix)
        return name if _known(name, modules) else None

    def further(name: str) -> str | None:  # one that the class lacks is left out: the first name has the tensors
        new = renamed(name)
        return new if new and _known(new, modules) else None

    layers = {renamed(name): layer for name, layer in table.layers.items()}
    shared = {further(name): renamed(first) for name, first in table.shared_layers.items()}
    aliases = {_tensor(name, further): _tensor(first, renamed) for name, first in table.aliases.items()}
    for name, first in shared.items():
        if name and not first:
            kind = type(model).__name__
            raise CheckpointError(f"layer {name!r} shares a layer that {kind} has not; load the saved class")
    return replace(
        table,
        layers={name: layer for name, layer in layers.items() if name},
        shared_layers={name: first for name, first in shared.items() if name and first},
        aliases={name: first for name, first in aliases.items() if name and first},
    )


def _known(name: str, modules: Mapping[str, nn.Module]) -> bool:
    try:
        spot(name, modules)
    except CheckpointError:
        return name in modules
    return True


def _tensor(name: str, renamed: Any) -> str | None:
    owner, _, part = name.rpartition(".")
    new = renamed(owner)
    return f"{new}.{part}" if new else None


# Names in files -----------------------------------------------------------------------------------------------------


def in_the_model(skeleton: nn.Module | None, config: Mapping[str, Any]) -> Callable[[str], str]:
    """Return what names a tensor of a saved file as the model does, as `from_pretrained` would.

    Tensors that are converted, not only renamed (experts that stay dense, say), keep the names of the file.

    Args:
        skeleton: whose inner models may have conversions of their own; None goes by the type of the config.
        config: of the folder.
    """
    if isinstance(skeleton, PreTrainedModel):
        conversions = get_model_conversion_mapping(skeleton, add_legacy=False)
    else:
        conversions = get_checkpoint_conversion_mapping(config.get("model_type")) or []
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]

    def named(name: str) -> str:
        new, converted = rename_source_key(name, renamings, converters)
        return name if converted else new

    return named


# Ties ----------------------------------------------------------------------------------------------------------------


def tie(model: Any, aliases: Mapping[str, str]) -> None:
    """Declare the tensors that structured layers share as tied, and no longer the weights that they replaced.

    Args:
        model: a `PreTrainedModel`; it and its inner models keep their own declarations for `untie`.
        aliases: further names of tensors, each with the first one, which is stored.
    """
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            inside = {name.removeprefix(f"{path}.") for name in aliases}
            own: Any = vars(module).setdefault("_dense_tied_weights_keys", module._tied_weights_keys) or {}
            present = {name for name, _ in (*_tensors(module), *module.named_modules(remove_duplicate=False))}
            module._tied_weights_keys = {
                target: source
                for target, source in own.items()
                if _any(target, present) and _any(source, present) and not _any(target, inside)
            }
    # Patterns, since transformers expands only names that end in "weight" or "bias" by themselves.
    model._tied_weights_keys |= {f"{re.escape(name)}$": f"{re.escape(first)}$" for name, first in aliases.items()}
    # Without tie_word_embeddings transformers expands nothing.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True) | dict(aliases)


def untie(model: Any) -> None:
    """Declare the ties of the dense model again."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "_dense_tied_weights_keys" in vars(module):
            module._tied_weights_keys = vars(module).pop("_dense_tied_weights_keys")
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(re.match(pattern, name) for name in names)

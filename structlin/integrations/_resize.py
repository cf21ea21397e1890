"""Resize the vocabulary of compressed models: low-rank tables and heads by their rows, others merged back to dense."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from structlin.compress.commit import assemble, merged, replacements, swap_modules
from structlin.compress.targets import find_targets
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear, build
from structlin.structures import LowRank

_resize_dense = PreTrainedModel.resize_token_embeddings


@wraps(_resize_dense)
def resize_token_embeddings(
    self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    old = _vocabulary(self)
    if not old or (new_num_tokens is None and pad_to_multiple_of is None):
        return _resize_dense(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    def new() -> dict[str, Any]:
        return {name: self.get_submodule(name) for name in old}

    def restore() -> None:
        swap_modules(self, {module: old[name] for name, module in new().items()})

    # transformers knows which modules a model has to resize, tie and count anew, but only dense ones.
    swap_modules(self, merged(self, set(old.values())))
    try:
        _resize_dense(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
    except BaseException:
        restore()
        raise
    if all(module.weight.shape[0] == _layer(old[name]).out_features for name, module in new().items()):
        restore()
    else:
        _factor(self, old, new())
    return self.get_input_embeddings()


def _layer(module: nn.Module) -> Any:
    """Return the structured layer that a module is, or looks rows up in; None for other modules."""
    layer = module.linear if isinstance(module, StructuredEmbedding) else module
    return layer if isinstance(layer, StructuredLinear) else None


def _vocabulary(model: Any) -> dict[str, nn.Module]:
    """Find the structured table and head, and all modules that share their factors, under all of their names.

    Raises:
        ValueError: if their factors cannot be read here.
    """
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # transformers' own answer of models whose embeddings are not tokens
        return {}
    weights = {layer.weight_id for end in ends if isinstance(end, nn.Module) and (layer := _layer(end))}
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {
        name: module
        for name, module in modules.items()
        if (layer := _layer(module)) is not None
        and layer.weight_id in weights
        # The layer of a table is no module of the dense model.
        and not isinstance(modules[name.rpartition(".")[0]], StructuredEmbedding)
    }
    for name, module in found.items():
        if "forward" in vars(module) or any(factor.is_meta for factor in _layer(module).factors):
            raise ValueError(
                f"{name!r} is offloaded or dispatched to devices; resize the embeddings of a model that was loaded "
                "without device_map"
            )
    return found


def _factor(model: nn.Module, old: Mapping[str, nn.Module], new: Mapping[str, nn.Module]) -> None:
    """Put low-rank modules in place of the resized dense ones, and warn of those that stay dense."""
    for name, module in new.items():
        module.train(old[name].training)
    targets = find_targets(model, tied="replace")
    swaps: dict[nn.Module, nn.Module] = {}
    for target in targets:
        known = next((old[name] for name in target.names if name in old), None)
        if known is not None and target.reason is None and (layer := _resized(_layer(known), target.linear)):
            swaps |= replacements(target, layer)
    assembled = assemble(swaps, targets)
    if dense := {name: _layer(old[name]).structure.name for name, module in new.items() if module not in assembled}:
        warnings.warn(
            f"resize_token_embeddings merged {dense} into dense weights: only low rank can be resized, by its rows; "
            "compress them again with a rule for each",
            stacklevel=3,
        )
    swap_modules(model, assembled)


def _resized(old: StructuredLinear, dense: nn.Linear) -> StructuredLinear | None:
    """Give a low-rank layer the rows of a resized weight: known ones as they are, new ones by their projection.

    None for another structure, and where there are fewer rows than ranks.
    """
    rows, structure = len(dense.weight), old.structure  # transformers may leave out_features of a tied head as it was
    if not isinstance(structure, LowRank) or structure.rank > rows:
        return None
    left, right = (factor.detach() for factor in old.factors)
    exact = torch.promote_types(right.dtype, torch.float32)
    added = dense.weight.detach()[len(left) :].to(exact) @ torch.linalg.pinv(right.to(exact))
    layer = build(structure, old.in_features, rows, dense.bias is not None, device="meta", dtype=right.dtype)
    layer.fill((torch.cat([left[:rows], added.to(left.dtype)]), right), dense.bias, dense.weight.requires_grad)
    return layer

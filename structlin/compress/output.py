"""What a model declares without running: its output layer, and the table of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from structlin.compress.targets import Target


def declared_output(model: nn.Module) -> nn.Module | None:
    """Return what `get_output_embeddings` of a transformers model returns."""
    return _declared(model, "get_output_embeddings")


def vocabulary_of(model: nn.Module) -> int:
    """Return the number of rows of the table that a model declares (`get_input_embeddings`), or has alone; else 0."""
    declared = (_declared(module, "get_input_embeddings") for module in model.modules())
    table = next((found for found in declared if found is not None), None)
    sizes = {getattr(each, "num_embeddings", 0) for each in (model.modules() if table is None else [table])} - {0}
    return int(sizes.pop()) if len(sizes) == 1 else 0


def _declared(model: nn.Module, getter: str) -> nn.Module | None:
    found = getattr(model, getter, None)
    try:
        return found() if callable(found) else None
    except NotImplementedError:  # transformers' own answer of models whose embeddings are not tokens
        return None


def last_target(model: nn.Module, targets: Sequence[Target]) -> Target | None:
    """Return the output layer as far as a model tells without running.

    That is what `get_output_embeddings` of a transformers model returns. Else it is the last linear map, unless modules
    with parameters come after it (a norm, say): then it is an inner one. In a list beside two maps or more that are not
    in it, it may be one too: SAM registers the way in and the way out of a head before the layers between them.
    """
    declared = declared_output(model)
    for target in targets:
        if declared is not None and any(user.module is declared for user in target.users):
            return target
    maps = [target for target in targets if not target.on_request]
    if not maps or maps[-1].name == "":
        return None
    if _beside_others(model, maps):
        return None
    owners = [module for module in model.modules() if module._parameters]
    within = {part for user in maps[-1].users for part in user.module.modules()}
    return maps[-1] if owners[-1] in within else None


def _beside_others(model: nn.Module, maps: Sequence[Target]) -> bool:
    """Whether the last map is in an `nn.ModuleList`, and the module with the list holds two maps or more of its own."""
    linear = {user.module for target in maps for user in target.users}
    parts = maps[-1].name.split(".")
    for k in range(1, len(parts)):
        holder, inner = (model.get_submodule(".".join(parts[:end])) for end in (k - 1, k))
        if isinstance(inner, nn.ModuleList) and len(linear & set(holder.children())) > 1:
            return True
    return False

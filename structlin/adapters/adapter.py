"""What an adapter is, and the list of all of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class Adapter(ABC):
    """One form of module that holds linear maps.

    An adapter opens a module: it returns a module with the same signature and outputs whose linear maps are leaves,
    `nn.Linear` modules (or `ExpertLinear`, a stack of them) that share the storage of the module's parameters. All else
    works on leaves: a leaf is watched, fitted, replaced by a structured layer and stored under its name. An opened
    module takes the place of the original in the model; `close` merges it back.

    Adapters hold no state. Register yours with `register`; nothing else has to know the form.
    """

    on_request = False  # whether a module becomes a target only where a rule names it
    narrows = False  # whether its map may lose inputs or outputs; `close` then fills up with zeros

    @abstractmethod
    def recognise(self, module: nn.Module) -> bool:
        """Whether the module has this form."""

    def reason(self, module: nn.Module) -> str | None:
        """Return why a recognised module cannot be opened, None if it can."""
        return None

    @abstractmethod
    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """Return the names of the parameters that hold each leaf's weight and bias.

        Args:
            module: a module of this form.
        Returns:
            Path of the leaf in the opened module ("" for the opened module itself) -> names of the parameters, relative
            to `module`. Several leaves may share a packed parameter.
        """

    @abstractmethod
    def open(self, module: nn.Module) -> nn.Module:
        """Return the opened module; it shares the storage of the parameters, which may be on the meta device."""

    @abstractmethod
    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Return a dense module of the original form with the weights of an opened one.

        Args:
            opened: an opened module; its leaves are dense or structured.
            shell: of the original module (`shell_of`), free to be filled.
        """


@dataclass(frozen=True)
class Origin:
    """Where an opened module came from: its adapter, and the original module without its memory."""

    adapter: Adapter
    shell: nn.Module

    def close(self, opened: nn.Module) -> nn.Module:
        """Merge an opened module back into its original form, in the opened module's mode."""
        return self.adapter.close(opened, shell_of(self.shell)).train(opened.training)


def shell_of(module: M) -> M:
    """Copy a module without its memory: parameters on the meta device, buffers and attributes shared, no hooks."""
    shell = copy.copy(module)
    state = shell.__dict__
    state["_parameters"] = {
        name: None if value is None else nn.Parameter(value.detach().to("meta"), value.requires_grad)
        for name, value in module._parameters.items()
    }
    state["_buffers"] = dict(module._buffers)
    state["_modules"] = {name: child and shell_of(child) for name, child in module._modules.items()}
    for name in _HOOKS:
        state[name] = OrderedDict()
    return shell


_ADAPTERS: list[Adapter] = []


def register(adapter: Adapter) -> Adapter:
    """Add an adapter; it is asked after those that are registered already."""
    _ADAPTERS.append(adapter)
    return adapter


def adapter_of(module: nn.Module) -> Adapter | None:
    """Return the first registered adapter that recognises a module."""
    return next((adapter for adapter in _ADAPTERS if adapter.recognise(module)), None)

"""Fused experts: the projections of all experts of a mixture, stacked in a few parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from structlin.adapters.adapter import Adapter
from structlin.layers.experts import Form, StructuredExperts, form_of, refusal


class Experts(Adapter):
    """Mixtures recognised by their parameters, whatever their class; see `structlin.layers.experts`."""

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module holds its experts' projections in one of the known forms."""
        return form_of(module) is not None

    def reason(self, module: nn.Module) -> str | None:
        """Refuse what computes more than the form says, as flags or a probe show."""
        return refusal(module, _form(module))

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The projections: `gate_up` and `down`, `up` and `down`, or all three apart."""
        return {leaf: (weight, next(iter(bias), None)) for leaf, (weight, *bias) in _form(module).names.items()}

    def open(self, module: nn.Module) -> nn.Module:
        """Return `StructuredExperts` of dense leaves."""
        return StructuredExperts.from_experts(module)

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Stack, transpose and pack the leaves as the shell does."""
        assert isinstance(opened, StructuredExperts)
        return opened.to_experts(shell)


def _form(module: nn.Module) -> Form:
    form = form_of(module)
    assert form is not None
    return form

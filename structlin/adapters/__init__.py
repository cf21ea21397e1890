"""Adapters: the forms in which models hold linear maps, and how each is opened, replaced and merged back."""

from structlin.adapters.adapter import Adapter, Origin, adapter_of, register
from structlin.adapters.attention import MultiheadAttention
from structlin.adapters.conv import Conv
from structlin.adapters.embedding import Embedding
from structlin.adapters.experts import Experts
from structlin.adapters.linear import PlainLinear, ProbedLinear, TransposedLinear
from structlin.adapters.recurrent import Recurrent

# The first that recognises a module opens it.
for form in (
    PlainLinear(), ProbedLinear(), TransposedLinear(), Conv(), Recurrent(), Experts(), MultiheadAttention(),
    Embedding(),
):  # fmt: skip
    register(form)

__all__ = ["Adapter", "Origin", "adapter_of", "register"]

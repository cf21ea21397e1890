"""Faster ways to contract, each optional and tested against `structlin.runtime.contract`."""

from structlin.runtime.kernels.chain import Chain, chain_of
from structlin.runtime.kernels.native import Known, available, build, origin, shortcut
from structlin.runtime.kernels.quantized import QuantizedChain, quantized_chain_of

__all__ = [
    "Chain",
    "Known",
    "QuantizedChain",
    "available",
    "build",
    "chain_of",
    "origin",
    "quantized_chain_of",
    "shortcut",
]

"""Faster ways to contract, each optional and tested against `structlin.contract`."""

from structlin.kernels.chain import Chain, chain_of
from structlin.kernels.native import available, build

__all__ = ["Chain", "available", "build", "chain_of"]

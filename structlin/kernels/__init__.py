"""Faster ways to contract, each optional and tested against `structlin.contract`."""

from structlin.kernels.chain import Chain, chain_of
from structlin.kernels.native import Known, available, build, shortcut

__all__ = ["Chain", "Known", "available", "build", "chain_of", "shortcut"]

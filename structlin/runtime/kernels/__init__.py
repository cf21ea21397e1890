"""Faster ways to contract, each optional and tested against `structlin.runtime.contract`."""

from structlin.runtime.kernels.chain import Chain, chain_of
from structlin.runtime.kernels.native import Known, available, build, origin, shortcut

__all__ = ["Chain", "Known", "available", "build", "chain_of", "origin", "shortcut"]

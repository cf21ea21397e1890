"""Save and load models with structured layers: safetensors and versioned JSON, no pickle, atomic."""

from structlin.checkpoint.api import Summary, load, save, verify
from structlin.checkpoint.tensors import CheckpointError

__all__ = ["CheckpointError", "Summary", "load", "save", "verify"]

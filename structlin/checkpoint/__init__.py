"""Save and load models with structured layers: safetensors and versioned JSON, no pickle, atomic."""

from structlin.checkpoint._directory import CheckpointError
from structlin.checkpoint.api import Summary, load, save, verify

__all__ = ["CheckpointError", "Summary", "load", "save", "verify"]

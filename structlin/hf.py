"""The transformers plug-in: importing it makes `save_pretrained` and `from_pretrained` know structured layers."""

from structlin.integrations.transformers import StructlinConfig, StructlinQuantizer, prepare

__all__ = ["StructlinConfig", "StructlinQuantizer", "prepare"]

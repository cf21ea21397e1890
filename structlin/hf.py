"""The transformers plug-in: importing it makes `save_pretrained` and `from_pretrained` know structured layers."""

from structlin.integrations.heal_trainer import HealTrainer
from structlin.integrations.model_card import model_card, push_to_hub, save_pretrained
from structlin.integrations.transformers import StructlinConfig, StructlinQuantizer, prepare

__all__ = [
    "HealTrainer",
    "StructlinConfig",
    "StructlinQuantizer",
    "model_card",
    "prepare",
    "push_to_hub",
    "save_pretrained",
]

"""Healing: train a compressed model towards the model it was made from."""

from structlin.heal.api import heal
from structlin.heal.losses import distillation_loss
from structlin.heal.options import HealOptions, HealReport, HealStep

__all__ = ["HealOptions", "HealReport", "HealStep", "distillation_loss", "heal"]

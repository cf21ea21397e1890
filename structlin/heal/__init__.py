"""Healing: train a compressed model towards the model it was made from."""

from structlin.heal.api import heal
from structlin.heal.report import HealReport, HealStep

__all__ = ["HealReport", "HealStep", "heal"]

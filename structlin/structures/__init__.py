"""All structures; importing this package registers them."""

from structlin.structures.butterfly import Butterfly, ButterflyLinear
from structlin.structures.kmatrix import Kaleidoscope, KMatrix
from structlin.structures.kronecker import Kronecker, KroneckerLinear
from structlin.structures.lowrank import LowRank, LowRankLinear
from structlin.structures.monarch import Monarch, MonarchLinear
from structlin.structures.phm import PHM, PHMLinear
from structlin.structures.shapeshifter import Shapeshifter, ShapeshifterLinear
from structlin.structures.tt import TensorTrain, TTLinear

__all__ = [
    "PHM",
    "Butterfly",
    "ButterflyLinear",
    "KMatrix",
    "Kaleidoscope",
    "Kronecker",
    "KroneckerLinear",
    "LowRank",
    "LowRankLinear",
    "Monarch",
    "MonarchLinear",
    "PHMLinear",
    "Shapeshifter",
    "ShapeshifterLinear",
    "TTLinear",
    "TensorTrain",
]

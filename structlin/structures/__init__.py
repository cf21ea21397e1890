"""All structures; importing this package registers them."""

from structlin.structures.blast import Blast, BlastLinear
from structlin.structures.butterfly import Butterfly, ButterflyLinear
from structlin.structures.kaleidoscope import Kaleidoscope, KMatrix
from structlin.structures.kronecker import Kronecker, KroneckerLinear
from structlin.structures.lowrank import LowRank, LowRankLinear
from structlin.structures.monarch import Monarch, MonarchLinear
from structlin.structures.phm import PHM, PHMLinear
from structlin.structures.shapeshifter import Shapeshifter, ShapeshifterLinear
from structlin.structures.sum import LowRankBlast, LowRankKaleidoscope, Sum, SumLinear
from structlin.structures.tt import TensorTrain, TTLinear

__all__ = [
    "PHM",
    "Blast",
    "BlastLinear",
    "Butterfly",
    "ButterflyLinear",
    "KMatrix",
    "Kaleidoscope",
    "Kronecker",
    "KroneckerLinear",
    "LowRank",
    "LowRankBlast",
    "LowRankKaleidoscope",
    "LowRankLinear",
    "Monarch",
    "MonarchLinear",
    "PHMLinear",
    "Shapeshifter",
    "ShapeshifterLinear",
    "Sum",
    "SumLinear",
    "TTLinear",
    "TensorTrain",
]

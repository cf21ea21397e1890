"""All structures, and the names that a file with a structure of yours needs; importing this registers ours."""

# Every layer takes in_features, out_features, bias, device and dtype as `StructuredLinear` does, and the fields of its
# structure as keywords; the docstrings of the layers list the fields only.

from structlin.equation import modes
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Family, Structure, register, registered, structure_class
from structlin.fitting import linalg
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.structures.blast import Blast, BlastLinear
from structlin.structures.butterfly import Butterfly, ButterflyLinear
from structlin.structures.circulant import Circulant, CirculantLinear
from structlin.structures.conv import ConvKernel, of_kernel, over_kernel
from structlin.structures.conv_layers import CPConv1d, CPConv2d, TTConv1d, TTConv2d, TuckerConv1d, TuckerConv2d
from structlin.structures.cp import CP, CPLinear
from structlin.structures.dense import Dense, DenseLinear
from structlin.structures.diagonal import Diagonal, DiagonalLinear
from structlin.structures.glt import GLT, GLTLinear
from structlin.structures.kaleidoscope import Kaleidoscope, KaleidoscopeLinear, KMatrix
from structlin.structures.kronchain import KroneckerChain, KroneckerChainLinear
from structlin.structures.kronecker import Kronecker, KroneckerLinear
from structlin.structures.lowrank import LowRank, LowRankLinear
from structlin.structures.monarch import Monarch, MonarchLinear
from structlin.structures.phm import PHM, PHMLinear
from structlin.structures.shapeshifter import Shapeshifter, ShapeshifterLinear
from structlin.structures.sparse import Sparse, SparseLinear
from structlin.structures.sum import Sum, SumFamily, SumLinear, families, family, sum_of
from structlin.structures.toeplitz import Toeplitz, ToeplitzLinear
from structlin.structures.tt import TensorTrain, TTEmbedding, TTLinear
from structlin.structures.tucker import Tucker, TuckerLinear

__all__ = [
    "CP",
    "GLT",
    "PHM",
    "Blast",
    "BlastLinear",
    "Butterfly",
    "ButterflyLinear",
    "CPConv1d",
    "CPConv2d",
    "CPLinear",
    "Circulant",
    "CirculantLinear",
    "ConvKernel",
    "Dense",
    "DenseLinear",
    "Diagonal",
    "DiagonalLinear",
    "Family",
    "GLTLinear",
    "KMatrix",
    "Kaleidoscope",
    "KaleidoscopeLinear",
    "Kronecker",
    "KroneckerChain",
    "KroneckerChainLinear",
    "KroneckerLinear",
    "LowRank",
    "LowRankLinear",
    "Monarch",
    "MonarchLinear",
    "PHMLinear",
    "Shapeshifter",
    "ShapeshifterLinear",
    "Sparse",
    "SparseLinear",
    "Spec",
    "Structure",
    "StructuredLinear",
    "Sum",
    "SumFamily",
    "SumLinear",
    "TTConv1d",
    "TTConv2d",
    "TTEmbedding",
    "TTLinear",
    "TensorTrain",
    "Toeplitz",
    "ToeplitzLinear",
    "Tucker",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerLinear",
    "equation",
    "families",
    "family",
    "layer_of",
    "linalg",
    "modes",
    "of_kernel",
    "over_kernel",
    "register",
    "registered",
    "structure_class",
    "sum_of",
]

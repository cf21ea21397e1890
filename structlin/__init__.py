"""Structured linear layers for PyTorch."""

from importlib.metadata import version

from structlin import exact, structures, tensor_train
from structlin.checkpoint import CheckpointError, load, save, verify
from structlin.compress import (
    Compression,
    CompressionPlan,
    Evaluator,
    Quantization,
    Report,
    Statistics,
    collect_statistics,
    compress_model,
    plan_compression,
    quantize_,
    statistics_by_layer,
    to_dense_,
)
from structlin.heal import HealOptions, HealReport, distillation_loss, heal
from structlin.layers.conv import StructuredConv
from structlin.layers.delight import DeLighTBlock, GroupLinear
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.freeze import freeze_, unfreeze_
from structlin.layers.linear import StructuredLinear
from structlin.layers.patterns import PatternLinear
from structlin.layers.permutation import LearnedPermutation
from structlin.layers.quantized import QuantizedFactor, train_scales_
from structlin.layers.recurrent import StructuredGRU, StructuredLSTM
from structlin.layers.toeplitz_like import ToeplitzLikeLinear
from structlin.layers.training import param_groups
from structlin.runtime import kernels
from structlin.runtime.measure import measure_machine
from structlin.structures import (
    BlastLinear,
    ButterflyLinear,
    CirculantLinear,
    CPConv1d,
    CPConv2d,
    CPLinear,
    DenseLinear,
    DiagonalLinear,
    GLTLinear,
    KaleidoscopeLinear,
    KMatrix,
    KroneckerChainLinear,
    KroneckerLinear,
    LowRankLinear,
    MonarchLinear,
    PHMLinear,
    ShapeshifterLinear,
    SparseLinear,
    SumLinear,
    ToeplitzLinear,
    TTConv1d,
    TTConv2d,
    TTEmbedding,
    TTLinear,
    TuckerConv1d,
    TuckerConv2d,
    TuckerLinear,
)

__version__ = version("structlin")

__all__ = [
    "BlastLinear",
    "ButterflyLinear",
    "CPConv1d",
    "CPConv2d",
    "CPLinear",
    "CheckpointError",
    "CirculantLinear",
    "Compression",
    "CompressionPlan",
    "DeLighTBlock",
    "DenseLinear",
    "DiagonalLinear",
    "Evaluator",
    "GLTLinear",
    "GroupLinear",
    "HealOptions",
    "HealReport",
    "KMatrix",
    "KaleidoscopeLinear",
    "KroneckerChainLinear",
    "KroneckerLinear",
    "LearnedPermutation",
    "LowRankLinear",
    "MonarchLinear",
    "PHMLinear",
    "PatternLinear",
    "Quantization",
    "QuantizedFactor",
    "Report",
    "ShapeshifterLinear",
    "SparseLinear",
    "Statistics",
    "StructuredConv",
    "StructuredEmbedding",
    "StructuredGRU",
    "StructuredLSTM",
    "StructuredLinear",
    "SumLinear",
    "TTConv1d",
    "TTConv2d",
    "TTEmbedding",
    "TTLinear",
    "ToeplitzLikeLinear",
    "ToeplitzLinear",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerLinear",
    "collect_statistics",
    "compress_model",
    "distillation_loss",
    "exact",
    "freeze_",
    "heal",
    "kernels",
    "load",
    "measure_machine",
    "param_groups",
    "plan_compression",
    "quantize_",
    "save",
    "statistics_by_layer",
    "structures",
    "tensor_train",
    "to_dense_",
    "train_scales_",
    "unfreeze_",
    "verify",
]

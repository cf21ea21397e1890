"""Tensors and matrices in the tensor-train format, and their algebra without ever forming them."""

from structlin.tensor_train.algebra import total
from structlin.tensor_train.cross import cross
from structlin.tensor_train.matrix import TTMatrix
from structlin.tensor_train.tensor import TT

__all__ = ["TT", "TTMatrix", "cross", "total"]

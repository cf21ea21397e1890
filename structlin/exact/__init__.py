"""Well-known linear maps written exactly as layers: transforms, permutations, convolutions as K-matrices."""

from structlin.exact.circuits import circuit
from structlin.exact.maps import acdc, circulant, convolution, fastfood, low_rank, toeplitz
from structlin.exact.permutations import permutation
from structlin.exact.products import orthogonal, square
from structlin.exact.recover import recover
from structlin.exact.transforms import dct, dft, dst, hadamard, idft

__all__ = [
    "acdc",
    "circuit",
    "circulant",
    "convolution",
    "dct",
    "dft",
    "dst",
    "fastfood",
    "hadamard",
    "idft",
    "low_rank",
    "orthogonal",
    "permutation",
    "recover",
    "square",
    "toeplitz",
]

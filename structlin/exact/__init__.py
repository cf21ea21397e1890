"""Well-known linear maps written exactly as layers: transforms, permutations, convolutions as K-matrices."""

from structlin.exact.maps import acdc, circulant, convolution, fastfood, low_rank, toeplitz
from structlin.exact.permutations import permutation
from structlin.exact.transforms import dct, dft, dst, hadamard, idft

__all__ = [
    "acdc",
    "circulant",
    "convolution",
    "dct",
    "dft",
    "dst",
    "fastfood",
    "hadamard",
    "idft",
    "low_rank",
    "permutation",
    "toeplitz",
]

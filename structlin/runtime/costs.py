"""Hold every fitted constant of the cost models, with its unit, its meaning and its source; without torch.

Unless a comment says otherwise, the source is timings with torch 2.13 and MKL on one AVX-512 core (AMD EPYC). The
predictions only rank the ways to run a layer: the tables of `benchmarks/speed.py` (benchmarks/results/speed_*.md) show
the choices that they lead to beside measured times.
"""

from __future__ import annotations

from typing import Any

# Machines: the fields of `planner.Machine` ---------------------------------------------------------------------------

# One AVX-512 core (AMD EPYC). `structlin.measure_machine` replaces such a record by one of the user's machine.
CPU: dict[str, Any] = {
    "name": "cpu, 1 thread", "flops": 96e9, "bandwidth": 60e9, "op": 3e-6, "half_flops": 205e9, "half_op": 12e-6,
    "far_bandwidth": 22e9, "cache": 24 << 20, "core_cache": 512 << 10, "copy_bandwidth": 7e9,
    "transpose_bandwidth": 17e9,
}  # fmt: skip

# One core with AMX (Intel Xeon), where MKL and bfloat16 are at home: what `measure_machine` found, rounded.
CPU_AMX: dict[str, Any] = CPU | {
    "name": "cpu with AMX, 1 thread", "flops": 155e9, "bandwidth": 18e9, "half_flops": 1050e9, "half_op": 2.5e-6,
    "far_bandwidth": 22e9, "copy_bandwidth": 8e9, "transpose_bandwidth": 8.5e9, "native": 1.03, "native_few": 0.75,
    "per_row": 20.0,
}  # fmt: skip

# From the data sheet of NVIDIA (TF32 off), nothing of it measured here; the cost of an operation is an estimate.
H200: dict[str, Any] = {
    "name": "NVIDIA H200 (data sheet)", "flops": 67e12, "bandwidth": 4.8e12, "op": 6e-6, "half_flops": 989e12,
    "copy_bandwidth": 2.4e12, "tile": 64,
}  # fmt: skip

# The native kernel on the core of CPU: one operation for all stages, tiles of tokens stay in cache.
NATIVE: dict[str, Any] = {"name": "native cpu kernel, 1 thread", "flops": 140e9, "bandwidth": 40e9, "op": 3e-6}

# Up to this many tokens the kernel runs one token at a time. The program hands this number to the kernel (program.h).
NATIVE_ROWS = 3
NATIVE_FEW: dict[str, Any] = {
    "name": "native cpu kernel, few tokens", "flops": 48e9, "bandwidth": 65e9, "op": 2.5e-6
}  # fmt: skip

# Matrix products and copies on a CPU (planner/machine.py) ------------------------------------------------------------

LINE = 64  # B of a cache line: copies that keep runs of a line together cost what reading does

# Two-byte dtypes (AVX-512 BF16, oneDNN): 1 to 3 rows, and 1 to 16 columns, take the same time; stacks are a bit slower.
HALF_ROWS, HALF_COLUMNS, HALF_STACK = 3, 16, 1.15

# Slowdown of thin products against their FLOPs, fitted to products timed with torch 2.13 and MKL.
TINY, TINY_STACK = 400, 44.0  # a stack of products with fewer multiplications each goes through a scalar loop
VECTOR_STACK = 32.0  # a stack of products with a single column each goes through a slow kernel
ROWS, PER_ROW, FEW_ROWS = 8, 4.4, 2.0  # from 8 rows on, PER_ROW / rows are lost; below, the rate is a third
PER_SUM = 2.5  # 2.5 / length of the sum are lost
COLUMNS, PER_COLUMN, MOST_COLUMN = 16, 4.5, 1.0  # from 16 columns on, 4.5 / columns are lost, at most as much again
NARROW, NARROW_EXTRA = 32, 0.28  # below 16 columns a product costs as much as one with 32, and a little more

# Tokens per chunk of a plan (planner/plan.py) ------------------------------------------------------------------------

CHUNK = 128  # tokens: below this the cost per operation shows, even where a chunk then exceeds the core's own cache
CHUNK_STEP = 16  # tokens: chunks are multiples of this

# One token in the native kernel, ns (kernels/layouts.py) -------------------------------------------------------------

SHARED_FLOP = 0.007  # a FLOP in vectors along outer indices that share a block of the factor
VECTOR = 0.4  # a vector of a factor's row in any other stage; each sum across the lanes costs two
TURNED = 0.4  # an entry of a factor that is gathered into order first
MOVED = 1.0  # an entry of the input or output that changes its place
SHARED_RUN = 8  # shared outer indices from which on vectors along them pay
LANES = 16  # floats of a vector
NEAR, FAR = 1 << 14, 4  # entries that are gathered quickly; of more, each takes 4 times as long

# A backward pass of the native kernel (kernels/chain.py); fitted to 330 steps of 9 structures on an Intel core

BACKWARD_ROWS = 16  # tokens are padded to whole vectors
BACKWARD_FLOPS = 4.2  # FLOPs that take as long / those forward: the activations again, two gradients, their sums
BACKWARD_MOVED = 10.0  # bytes that take as long / those of input and output
BACKWARD_FACTORS = 4.6  # bytes that take as long / those of the factors: transposed, and their gradients
BACKWARD_SECONDS = 46e-6  # s: the nodes of autograd

# Choosing how a layer runs (execution.py) ----------------------------------------------------------------------------

PLAN_SLOWER = 1.15  # time of a plan with bias and fresh memory / of its products and copies; 1 in two-byte dtypes
PLAN_SECONDS = 8e-6  # s: the Python around each product of a plan
GRAPH_SECONDS = 100e-6  # s: the same in training, with nodes of autograd and two products more
DENSE_SECONDS = 2e-6  # s: the Python around a product with a dense matrix
DENSE_GAIN = 0.9  # a dense matrix is kept where its predicted time is below this share of every other way's
HOPELESS = 20  # a way whose predicted time is so many times the least is not worth timing: predictions are no worse
WRITING = 2e-9  # s for each entry of a factor that is written out from its values
PATTERN_FLOPS = 8e9  # of FFTs, products of spectra and small blocks, per s
TRANSFORM_FLOPS = 160  # that take as long as what each FFT costs beside its own: of small blocks there are many
PATTERN_SECONDS = 60e-6  # s: the operations around them
SMALL = 4 << 20  # B of activations that are not worth recomputing in the backward pass

# Looking rows up (contract/lookup.py) ---------------------------------------------------------------------------------

LOOKUP_BYTES = 256 << 10  # B of intermediates that are not worth a chunk of tokens less

# Recomputing and chunks (recompute.py) -------------------------------------------------------------------------------

FEWEST = 16  # tokens of a chunk in the backward pass, at least
DENSE_CHUNK = 128  # tokens of a chunk where the dense matrix takes memory as well
MOST_BLOCKS = 16  # blocks of rows of the dense matrix in the backward pass, at most

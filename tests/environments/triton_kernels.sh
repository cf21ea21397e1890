#!/usr/bin/env bash
# Run the Triton kernels in Triton's interpreter, which needs no GPU; print the outcome as Markdown.
#
#     bash tests/environments/triton_kernels.sh [VENV] > benchmarks/results/triton_kernels.md
#
# VENV keeps the environment (default: a temporary one, deleted at the end). Some minutes on two cores.
fill() {
    pip install --quiet -c constraints.txt torch
    pip install --quiet -c constraints.txt -e . pytest numpy
    pip install --quiet triton==3.9.0
}
. "$(dirname "$0")/_environment.sh" "${1-}"
export TRITON_INTERPRET=1
outcome triton_kernels "torch|triton"

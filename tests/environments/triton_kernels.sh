#!/usr/bin/env bash
# Run the Triton kernels in Triton's interpreter, which needs no GPU; print the outcome as Markdown.
#
#     bash tests/environments/triton_kernels.sh [VENV] > benchmarks/results/triton_kernels.md
#
# VENV keeps the environment (default: a temporary one, deleted at the end). Some minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -gt 0 ]; then
    venv=$1
else
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
fi
[ -x "$venv/bin/pytest" ] || {
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet -c constraints.txt torch
    "$venv/bin/pip" install --quiet -c constraints.txt -e . pytest numpy
    "$venv/bin/pip" install --quiet triton==3.9.0
} >&2

echo "\`bash tests/environments/triton_kernels.sh\`, $(date +%F), commit $(git rev-parse --short HEAD):"
"$venv/bin/pip" list 2> /dev/null | awk '$1 ~ /^(torch|triton)$/ {print "- " $1 " " $2}'
echo
PYTHONPATH=$PWD:$PWD/tests TRITON_INTERPRET=1 STRUCTLIN_KERNELS=off "$venv/bin/pytest" -o addopts="" \
    -o filterwarnings=default -q --show-capture=no --disable-warnings -rA tests/environments/triton_kernels.py 2>&1 |
    sed -nE 's/^(PASSED|FAILED) [^:]*::(test_)?(.*)/- \3: \L\1/p'

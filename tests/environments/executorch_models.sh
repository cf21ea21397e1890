#!/usr/bin/env bash
# Export every structure, and whole models, to ExecuTorch, and compare; print the outcome as Markdown.
#
#     bash tests/environments/executorch_models.sh [VENV] > benchmarks/results/executorch.md
#
# VENV keeps the environment (default: a temporary one, deleted at the end). Some minutes on two cores.
fill() {
    pip install --quiet torch==2.13.0
    pip install --quiet torch==2.13.0 executorch==1.5.1 pytest -e ".[hf]"
}
. "$(dirname "$0")/_environment.sh" "${1-}"
outcome executorch_models "torch|transformers|executorch"

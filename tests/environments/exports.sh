#!/usr/bin/env bash
# Export every structure, and whole models, to other runtimes, and compare; print the outcome as Markdown.
#
#     bash tests/environments/exports.sh [VENV] > benchmarks/results/exports.md
#
# VENV keeps the environment (default: a temporary one, deleted at the end). AOTInductor needs a C++ compiler. Half an
# hour on two cores, most of it AOTInductor's.
fill() {
    pip install --quiet -c constraints.txt torch
    pip install --quiet -c constraints.txt -e ".[test]" onnx onnxscript onnxruntime openvino
}
. "$(dirname "$0")/_environment.sh" "${1-}"
outcome exports "torch|transformers|onnx|onnxscript|onnxruntime|openvino"

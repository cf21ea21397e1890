#!/usr/bin/env bash
# Run the short suite with the oldest and the newest versions that pyproject.toml claims; print a Markdown table.
#
#     bash tests/environments/versions.sh [FOLDER] > benchmarks/results/versions.md
#
# FOLDER keeps the environments and the logs (default: a temporary one, deleted at the end). The interpreters are
# python3.10 to python3.13 on $PATH. Builds of torch for CUDA take about 6 GB each; 5 to 15 minutes an environment.
# ENVIRONMENTS="4 5" runs some of them only.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD

if [ $# -gt 0 ]; then
    mkdir -p "$1"
    folder=$(realpath "$1")
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi

suite=(
    tests/equation tests/structures/test_laws.py tests/layers/test_layer.py tests/layers/test_freeze.py
    tests/checkpoint tests/compress/test_compress.py tests/heal tests/runtime/test_kernels.py
)
environments=( # interpreter | what is installed
    "python3.10 | torch==2.6.0 transformers==5.0.0 accelerate numpy==1.26.4"
    "python3.11 | torch==2.13.0 transformers accelerate numpy"
    "python3.12 | torch transformers accelerate numpy"
    "python3.13 | torch transformers accelerate numpy"
    "python3.11 | torch==2.13.0"
)

echo "\`bash tests/environments/versions.sh\`, $(date +%F): ${suite[*]}, and tests/integrations/test_transformers.py"
echo "where transformers is installed; warnings are not errors here."
echo
echo "| Python | torch | transformers | NumPy | tests | commit |"
echo "| --- | --- | --- | --- | --- | --- |"
number=0
for entry in "${environments[@]}"; do
    number=$((number + 1))
    [[ " ${ENVIRONMENTS-1 2 3 4 5} " == *" $number "* ]] || continue
    interpreter=$(xargs <<< "${entry%%|*}")
    packages=${entry#*|}
    venv=$folder/$number log=$folder/$number.txt
    {
        [ -d "$venv" ] || "$interpreter" -m venv "$venv"
        # torch first and alone, so that nothing else decides its version.
        "$venv/bin/pip" install --quiet $(grep -o 'torch[^ ]*' <<< "$packages" | head -1)
        "$venv/bin/pip" install --quiet "$root" "pytest>=8" "hypothesis>=6" $packages
        "$venv/bin/pip" uninstall --quiet --yes structlin # the tests run against this tree
    } > "$log" 2>&1
    tests=("${suite[@]}")
    [[ $packages == *transformers* ]] && tests+=(tests/integrations/test_transformers.py)
    PYTHONPATH=$root "$venv/bin/python" -m pytest -o addopts="" -o filterwarnings=default --strict-markers -q -m "not slow" "${tests[@]}" >> "$log" 2>&1 || true
    PYTHONPATH=$root "$venv/bin/python" - "$(tail -1 "$log")" "$(git rev-parse --short HEAD)" <<'PY'
import importlib.metadata
import platform
import sys

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"

versions = [platform.python_version(), *map(version, ("torch", "transformers", "numpy"))]
print("|", *(f"{text} |" for text in (*versions, sys.argv[1].strip("= "), sys.argv[2])))
PY
done

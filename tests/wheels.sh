#!/usr/bin/env bash
# Build both wheels, install them in a new environment, and test and time the kernel there without any compiler.
#
#     bash tests/wheels.sh [FOLDER]
#
# FOLDER keeps the environment and the wheels (default: a temporary one, deleted at the end). Building needs a C++
# compiler; what follows sees none. Laws: the kernel's tests. Speed: benchmarks/wheels.py, beside a kernel that is built
# here, stored in benchmarks/results/. About ten minutes on two cores. Set SPEED= (empty) to leave the speed out.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    work=$(realpath "$1")
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
unset PYTHONPATH STRUCTLIN_KERNELS
python=$work/venv/bin/python

echo "== environment"
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$work/venv"
"$python" -m pip install --quiet -c "$root/constraints.txt" torch

echo "== wheels"
rm -rf "$work/wheels" "$root/build" "$root/kernels/build" # their leftovers would be packed
STRUCTLIN_KERNELS_REQUIRED=1 "$python" -m pip wheel --quiet --no-deps -w "$work/wheels" "$root" "$root/kernels"
ls "$work/wheels"
"$python" -m pip uninstall --quiet --yes structlin structlin-kernels
"$python" -m pip install --quiet -c "$root/constraints.txt" "$(echo "$work"/wheels/structlin-*.whl)[kernels]" \
    "$work"/wheels/structlin_kernels-*.whl pytest numpy
cd /
(cd "$work" && STRUCTLIN_CACHE=$work/built "$python" -c "import structlin; structlin.kernels.build()")

echo "== without a compiler"
mkdir -p "$work/bin" "$work/empty"
for tool in git false; do ln -sf "$(type -P $tool)" "$work/bin/$tool"; done
hidden() { env PATH="$work/venv/bin:$work/bin" CXX=/nonexistent CC=/nonexistent STRUCTLIN_CACHE="$work/empty" "$@"; }
hidden "$python" -c "
import pathlib, shutil, structlin
assert pathlib.Path('$work') in pathlib.Path(structlin.__file__).parents
assert not any(map(shutil.which, ('c++', 'g++', 'gcc', 'cc', 'clang', 'clang++')))
assert structlin.kernels.available()
print(structlin.kernels.origin())
try:
    structlin.kernels.build()
except RuntimeError as error:
    print(error)
else:
    raise SystemExit('there is a compiler')
"

echo "== laws"
(cd "$root" && hidden pytest -p no:cacheprovider -m "not slow" --disable-warnings tests/runtime/test_kernels.py \
    tests/runtime/test_kernels_calls.py tests/runtime/test_kernels_compile.py tests/runtime/test_kernels_wheel.py \
    tests/runtime/test_kernels_quantized.py)

if [ -n "${SPEED-yes}" ]; then
    echo "== speed"
    (cd "$root" && hidden "$python" benchmarks/wheels.py --built "$work/built")
fi

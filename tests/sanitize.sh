#!/bin/sh
# Runs random calls of the native kernel under Address-, UndefinedBehaviour- and ThreadSanitizer (gcc, Linux).
#
#     tests/sanitize.sh [CALLS of each, 2000] [--seed N] [--large] ...    more options: tests/fuzz/kernel_calls.py
#     SANITIZERS="address thread" tests/sanitize.sh 50000                 some of them
#     SANITIZE_FOLDER=folder tests/sanitize.sh                            keeps the three builds there for the next run
#
# Fails on any report or wrong result, and if a sanitizer misses the faults that it must see (`faults` in guards.h).
# Python and torch are not instrumented: only the kernel is checked, and what it hands to the C library.
set -eu

calls=2000
case ${1-} in [0-9]*) calls=$1; shift ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
work=${SANITIZE_FOLDER-}
if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT INT TERM
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" STRUCTLIN_KERNELS=on CXX="${CXX:-g++}"
# Two threads of OpenMP, so that the kernel's parallel loops have parts. Under ThreadSanitizer, which does not see the
# barriers of libgomp, they run in plain threads (`parallel_for` in guards.h). torch's own loops still use libgomp,
# so the memcpy, free, ... that its libraries call are left out (`called_from_lib`); the kernel's frames never are.
export OMP_NUM_THREADS=2
cat > "$work/suppressions" <<END
called_from_lib:libtorch_cpu.so
called_from_lib:libtorch_python.so
called_from_lib:libc10.so
called_from_lib:libgomp
END
# Python frees nothing at its end: no search for leaks. exitcode tells a report from a failure of Python (1).
common="halt_on_error=1:exitcode=66"
export ASAN_OPTIONS="$common:detect_leaks=0" UBSAN_OPTIONS="$common:print_stacktrace=1"
export TSAN_OPTIONS="$common:suppressions=$work/suppressions:ignore_noninstrumented_modules=1"

# Each sanitizer has a cache of its own, filled by a compiler without the sanitizer's library, which is for the process
# that loads the kernel.
for sanitizer in ${SANITIZERS-address undefined thread}; do
    case $sanitizer in
        address) library=libasan.so expected="use-after-poison" flags= ;;
        undefined) library=libubsan.so expected="signed integer overflow" flags=-fno-sanitize-recover=undefined ;;
        thread) library=libtsan.so expected="data race" flags= ;;
    esac
    export STRUCTLIN_CACHE="$work/$sanitizer"
    export CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=$sanitizer $flags -DSTRUCTLIN_FAULTS"
    python -c "import structlin; structlin.kernels.build()"
    library=$($CXX -print-file-name=$library)
    run() { LD_PRELOAD=$library python "$root/tests/fuzz/kernel_calls.py" "$@" 2> "$work/errors"; }
    if STRUCTLIN_FAULTS=1 run 400 > /dev/null || ! grep -q "$expected" "$work/errors"; then
        cat "$work/errors"
        echo "$sanitizer: FAILED, the deliberate faults were not reported as \"$expected\""
        exit 1
    fi
    echo "$sanitizer: the deliberate faults are reported as \"$expected\""
    status=0
    run "$calls" "$@" || status=$?
    reports=$(grep -cE "ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer" "$work/errors" || true)
    echo "$sanitizer: $calls calls asked for, $reports reports, exit status $status"
    if [ "$status" != 0 ] || [ "$reports" != 0 ]; then
        cat "$work/errors"
        exit 1
    fi
done

# Sourced by the scripts beside it, with their argument: the virtual environment, none for a temporary one. It goes to
# the root of the project, fills an environment that is new by the script's function `fill`, and defines `outcome`.
set -euo pipefail
if [ -n "${1-}" ]; then
    venv=$(realpath -m "$1")
else
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$venv/bin:$PATH"
[ -x "$venv/bin/pytest" ] || {
    python3 -m venv "$venv"
    fill
} >&2

# outcome NAME PACKAGES: run NAME.py, and print the versions of the packages (separated by |) and each test as Markdown.
outcome() {
    echo "\`bash tests/environments/$1.sh\`, $(date +%F), commit $(git rev-parse --short HEAD):"
    pip list 2> /dev/null | awk -v names="^($2)$" '$1 ~ names {print "- " $1 " " $2}'
    echo
    PYTHONPATH=$PWD:$PWD/tests STRUCTLIN_KERNELS=off pytest -o addopts="" -o filterwarnings=default -q \
        --show-capture=no --disable-warnings -rA "tests/environments/$1.py" 2>&1 |
        sed -nE 's/^(PASSED|FAILED|ERROR) [^:]*::(test_)?(.*)/- \3: \L\1/p'
}

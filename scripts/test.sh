#!/usr/bin/env bash
# Install with the test extra and run all checks: ruff, mypy, the documentation, pytest. Arguments are passed to pytest.
#
#   bash scripts/test.sh --oldest    # only fast tests, in .venv-oldest, with the lowest versions that setup.cfg allows
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # because several processes share the cores
check() {
    echo "ruff" && ruff format --check . && ruff check . && echo "mypy" && mypy && echo "layers" && lint-imports --no-cache &&
        echo "docs" && sphinx-build -q -W --keep-going docs build/docs
}
test_all() {
    echo "pytest" && python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
}
if [ "${1:-}" = --oldest ]; then
    shift
    ABR_VENV=${ABR_VENV:-.venv-oldest}
    oldest=$(mktemp)
    trap 'rm -f "$oldest"' EXIT
    oldest_versions > "$oldest"
    install_project "[test]" "$oldest"
    test_all -m "not slow" "$@"
    exit
fi
install_project "[test]"
check & checks=$!  # runs on the other core while DeepSpeed is built
install_deepspeed
wait "$checks"
test_all "$@"

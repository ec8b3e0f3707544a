#!/usr/bin/env bash
# Install with the test extra and run all checks: ruff, mypy, the documentation, pytest. Arguments are passed to pytest.
#
#   bash scripts/test.sh --oldest    # no tests that start processes, in .venv-oldest, with the lowest versions that setup.cfg allows
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
    test_all -m "not launches" "$@"
    exit
fi
install_project "[test]"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
(check > "$log" 2>&1 && status=0 || status=$?; cat "$log"; exit "$status") & checks=$!  # beside the tests, told at once
install_deepspeed
test_all "$@" && tested=0 || tested=$?
wait "$checks" || { echo "The checks before the tests have failed: see above, or" && cat "$log"; exit 1; }
exit "$tested"

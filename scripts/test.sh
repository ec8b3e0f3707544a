#!/usr/bin/env bash
# Install with the test extra and check everything: ruff, mypy, pytest. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_project "[test]"
export HF_HUB_OFFLINE=1
check() { echo "ruff" && ruff format --check . && ruff check . && echo "mypy" && mypy; }
check & checks=$!  # while DeepSpeed is built, on the other core
install_deepspeed
wait "$checks"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # several processes share the cores
echo "pytest" && python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

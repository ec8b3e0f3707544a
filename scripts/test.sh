#!/usr/bin/env bash
# Install with the test extra and check everything: ruff, mypy, pytest. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_project "[test]"
install_deepspeed
export HF_HUB_OFFLINE=1
echo "ruff" && ruff format --check . && ruff check .
echo "mypy" && mypy
echo "pytest" && python -m pytest "$@"

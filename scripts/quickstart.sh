#!/usr/bin/env bash
# Install into .venv, fine-tune the demo model on the demo text, and list the broken rows of that text.
# Needs only a package index. Flags are passed on to abr train: bash scripts/quickstart.sh --max_steps 20
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_project ""
export HF_HUB_OFFLINE=1
abr train --skip_rows robust --num_train_epochs 1 --learning_rate 2e-3 \
    --do_train --do_eval --output_dir runs/demo --overwrite_output_dir "$@"
abr rows runs/demo --limit 3

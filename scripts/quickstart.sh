#!/usr/bin/env bash
# Install into .venv and fine-tune the embedded LLaMA on the embedded text: hard batches repeated, broken ones skipped.
# Needs no network but a package index. Flags are handed on: bash scripts/quickstart.sh --repeat_scheduler baseline
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_project ""
export HF_HUB_OFFLINE=1
abr train --dataset_name demo --block_size 128 \
    --repeat_scheduler abr --loss_threshold 0.9 --skip_outliers robust --max_passes 400 \
    --per_device_train_batch_size 4 --learning_rate 2e-3 --use_cpu \
    --do_train --do_eval --do_predict --eval_on_start --output_dir runs/quickstart --overwrite_output_dir "$@"

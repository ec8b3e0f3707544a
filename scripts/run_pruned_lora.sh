#!/usr/bin/env bash
# Prune half of a model's weights, fine-tune a LoRA adapter on the frozen sparse model, and merge it with the zeros kept.
#
#   bash scripts/run_pruned_lora.sh demo demo runs/pruned --max_passes 100 --use_cpu
#   bash scripts/run_pruned_lora.sh huggyllama/llama-7b wikitext runs/pruned-wikitext --bf16
#   bash scripts/run_pruned_lora.sh huggyllama/llama-7b c4 runs/pruned-c4 --bf16
#
# The directory then contains pruned/, lora/ and merged/. Finished steps are not repeated. PATTERN (unstructured, 2:4,
# 16x16) and SPARSITY (0.5) set how to prune; PRUNED gives a model that is already pruned. Flags after the directory are
# passed to `abr train`. The last lines show perplexity and share of zeros of the pruned model, of the pruned model with
# the adapter, and of the merged model.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: bash $0 MODEL DATASET DIRECTORY [flags of abr train]" >&2; exit 2; }
model=$1 dataset=$2 out=$3
shift 3
abr() { python -m abr_trainer "$@"; }  # uses the python in PATH
pruned=${PRUNED:-$out/pruned}
length=${TOKEN_LENGTH:-$([ "$dataset" = demo ] && echo 128 || echo 1024)}
measured=(--dataset_name "$dataset" --token_length "$length")
[ "$dataset" = c4 ] && streamed=(--max_eval_samples 256) || streamed=()
[[ " $* " == *" --use_cpu "* ]] && measured+=(--use_cpu)
original=(--config_name "$model" --tokenizer_name "$model")
[ "$model" = demo ] && original=()

mkdir -p "$out"
if [ -z "${PRUNED:-}" ] && [ ! -e "$pruned/config.json" ]; then
    abr prune --model_name_or_path "$model" ${SPARSITY:+--sparsity "$SPARSITY"} \
        --pattern "${PATTERN:-unstructured}" --output_dir "$pruned"
fi
if [ ! -e "$out/lora/all_results.json" ]; then
    abr train --model_name_or_path "$pruned" "${original[@]}" --dataset_name "$dataset" \
        --block_size "$length" --max_passes 1000 --do_train --do_eval --output_dir "$out/lora" --overwrite_output_dir \
        "${streamed[@]}" "$@"
fi
[ -e "$out/merged/config.json" ] || abr export --model_name_or_path "$pruned" "${original[@]}" \
    --adapter_name_or_path "$out/lora" "${measured[@]}" --output_dir "$out/merged"

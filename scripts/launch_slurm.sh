#!/usr/bin/env bash
# Run `abr train` on several nodes with Slurm, with one torchrun per node. The first node is the rendezvous. All arguments
# are passed to `abr train`:
#     sbatch --nodes 2 --gpus-per-node 8 scripts/launch_slurm.sh run.yaml --max_passes 20000
# To use accelerate instead, for FSDP or DeepSpeed, set a configuration:
#     ACCELERATE_CONFIG=configs/accelerate/fsdp2_lora.yaml sbatch --nodes 2 --gpus-per-node 8 scripts/launch_slurm.sh ...
#SBATCH --job-name=abr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# 300 seconds before its time limit, the run saves a checkpoint after the batch under way, and the job goes back into the
# queue. When it starts again, it continues. One batch, one evaluation and one checkpoint must take less than that, and
# less than 30 seconds under ACCELERATE_CONFIG, because that launcher ends its processes then.
set -euo pipefail

: "${SLURM_JOB_NODELIST:?start $0 with sbatch, so that Slurm allocates nodes}"
[ "$#" -gt 0 ] || { echo "error: no arguments for abr train, e.g. sbatch $0 run.yaml" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -d "${ABR_VENV:-.venv}" ]; then source "${ABR_VENV:-.venv}/bin/activate"; fi
python -c 'import abr_trainer' 2> /dev/null ||
    { echo "error: abr_trainer is not installed in the environment of $(command -v python): set ABR_VENV" >&2; exit 2; }

export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
arguments=("$@")
[[ " $*" == *" --enable_jit_checkpoint"* ]] || arguments+=(--enable_jit_checkpoint)
if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then
    arguments+=(--resume_from_checkpoint auto)
    [[ " $*" == *" --resume_from_checkpoint"* ]] || arguments+=(--overwrite_output_dir)  # else it would begin elsewhere
fi
nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-1}

if [ -n "${ACCELERATE_CONFIG:-}" ]; then
    launcher=(accelerate launch --config_file "$ACCELERATE_CONFIG" --num_machines "$nodes"
        --num_processes "$((nodes * gpus))" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"
        --rdzv_backend c10d)
    rank=(--machine_rank '$SLURM_NODEID')
else
    launcher=(torchrun --nnodes "$nodes" --nproc_per_node "$gpus" --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID"
        --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --signals_to_handle SIGINT,SIGHUP,SIGQUIT)  # it would end the ranks
    rank=()
fi
command=$(printf '%q ' "${launcher[@]}")
echo "$nodes nodes with $gpus processes each, rendezvous at $MASTER_ADDR:$MASTER_PORT"

stop() {
    stopped=yes interrupted=yes
    scancel --signal=TERM "$SLURM_JOB_ID"  # all processes on the nodes, but not this script
}
stopped=
trap stop USR1
trap interrupted=yes TERM  # of Slurm, for a job that is pre-empted or cancelled: wait until the ranks have saved
# The rank of a node is only known on the node. The launcher ignores the signal, and the ranks of `abr train` do not.
srun --kill-on-bad-exit=1 bash -c \
    "trap '' TERM; exec $command ${rank[*]-} -m abr_trainer train $(printf '%q ' "${arguments[@]}")" &
step=$!
interrupted=yes
while [ -n "$interrupted" ]; do  # a signal ends `wait`, and then the status is not that of the run
    interrupted='' status=0
    wait "$step" || status=$?
done
if [ -n "$stopped" ] && [ "$status" != 0 ]; then
    echo "The run was stopped before its end. Job $SLURM_JOB_ID goes back into the queue."
    scontrol requeue "$SLURM_JOB_ID" || echo "error: it cannot. Submit it again with --resume_from_checkpoint true" >&2
fi
exit "$status"

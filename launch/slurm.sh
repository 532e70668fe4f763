#!/usr/bin/env bash
# Run ear_jax on a SLURM cluster, one process a node, from the repository's folder:
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/lite_hybrid.py:imagenet256 --workdir=SHARED/imagenet256
#
# All nodes must see the workdir. Before the time limit, and on preemption, the run gets SIGTERM, saves, and exits 75:
# the job is then queued again and resumes where it stopped. Any other status ends the job.
#
#SBATCH --job-name=ear_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -uo pipefail

readonly PREEMPTED=75

if [ "$#" -eq 0 ]; then
    echo "usage: sbatch [options] launch/slurm.sh --config=FILE[:VARIANT] --workdir=DIR [...]" >&2
    exit 64
fi
cd "${SLURM_SUBMIT_DIR:-.}" || exit 74
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" > /dev/null; then
    echo "$python does not run here; make the environment first (make demo) or set PYTHON." >&2
    exit 64
fi

# Through a proxy the processes do not find each other.
unset http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY

echo "$(date -Is) job ${SLURM_JOB_ID:-?} (start ${SLURM_RESTART_COUNT:-0}) on ${SLURM_JOB_NODELIST:-this machine}"

# --wait, not --kill-on-bad-exit: processes that leave with 75 must not be killed by the first of them.
srun --wait=120 --label "$python" -u -m ear_jax.main "$@" &
step=$!
# The signal may also reach this shell; the step decides when it ends.
trap 'kill -TERM "$step" 2> /dev/null' TERM
status=0
while :; do
    wait "$step"
    status=$?
    kill -0 "$step" 2> /dev/null || break
done

echo "$(date -Is) the run ended with status $status"
if [ "$status" -eq "$PREEMPTED" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    echo "saved and asked to stop: queueing the job again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

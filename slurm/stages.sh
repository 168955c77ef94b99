#!/usr/bin/env bash
# The method as a chain of jobs, each on its own number of nodes; a job starts when the one before it is done.
#   NODES="1 4 2 1" slurm/stages.sh --config configs/NAME.yaml [section.key=value ...]
# NODES: of project, generate, finetune and evaluate. SBATCH_OPTIONS: of every job, as "--partition=gpu --time=8:00:00".
set -euo pipefail
cd "$(dirname "$0")/.."
read -r -a nodes <<< "${NODES:-1 2 2 1}"
read -r -a options <<< "${SBATCH_OPTIONS:-}"
[ "${#nodes[@]}" = 4 ] || { echo "error: NODES must be four numbers, not '${NODES}'" >&2; exit 2; }
python=${SPD_VENV:-$PWD/.venv}/bin/python
"$python" launchers/spd.py --show-config "$@" > /dev/null  # a wrong config ends here
after=()
for index in 0 1 2 3; do
  first=(calibrate generate finetune evaluate) last=(project generate finetune evaluate)
  job=$(sbatch --parsable --job-name="spd-${last[index]}" --nodes="${nodes[index]}" "${options[@]}" "${after[@]}" \
    slurm/spd.sbatch --from "${first[index]}" --until "${last[index]}" "$@")
  echo "$job  spd-${last[index]}  on ${nodes[index]} nodes"
  after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done

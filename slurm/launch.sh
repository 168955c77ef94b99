# Sourced by the batch scripts, in the repository's root: launches the ranks, passes requests to stop on to them, and
# requeues a job that was stopped. Needs bash 4.4. A script whose job is not a run sets SPD_PROGRAM (experiment), and
# SPD_TASK if it is one of many tasks in a folder.
#   SPD_LAUNCHER     srun (default): one task a rank, exact exit codes; deepspeed or torchrun: one task a node
#   SPD_MAX_REQUEUES how often a job may be started again in all (default 20)
#   SPD_MAX_RETRIES  how often after a failure that is not the user's: a node, the network (default 2)
#   SPD_VENV         the virtual environment (default .venv)
set -uo pipefail
[ -f launchers/spd.py ] || { echo "error: $PWD is not the repository's root; sbatch from there" >&2; exit 2; }
PATH="${SPD_VENV:-$PWD/.venv}/bin:$PATH"
NODES=$SLURM_JOB_NUM_NODES
RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
TASK=${SLURM_ARRAY_TASK_ID:-}
JOB=${TASK:+${SLURM_ARRAY_JOB_ID}_}${TASK:-$SLURM_JOB_ID}
STEP=

prepare() {  # what every rank needs, from the words of the config
  local config cache
  PROGRAM=launchers/${SPD_PROGRAM:-spd}.py
  config=$(python "$PROGRAM" --show-config "$@") || exit $?
  RUN_DIR=$(sed -nE "s/^(run_dir|folder): //p" <<< "$config")
  mkdir -p "$RUN_DIR/slurm" || exit 3
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # below the ephemeral ports; each task of an array has a job id, too
  SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null)}
  [ -n "$SLURM_JOB_END_TIME" ] || unset SLURM_JOB_END_TIME  # no limit
  # Compiled kernels: a shared file system is slow for them, and a build that is killed there blocks the next job.
  cache=${SLURM_TMPDIR:-/tmp}/spd-$(id -un)-$SLURM_JOB_ID
  export MASTER_ADDR MASTER_PORT ${SLURM_JOB_END_TIME+SLURM_JOB_END_TIME}
  export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/extensions
  export TOKENIZERS_PARALLELISM=false CACHE=$cache
}

step() {  # TASKS_PER_NODE command...: on all nodes. A launcher knows no USR1 and would die of it; ranks take it back
  local tasks=$1 cpus=$((${SLURM_CPUS_PER_TASK:-1} * RANKS_PER_NODE / $1)); shift
  exec srun ${SERVERS:+--overlap} --nodes="$NODES" --ntasks=$((NODES * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' rank "$@"
}

serve() {  # command port seconds: one on each node, until all are healthy; they end with the job. Sets SERVER_URLS
  local host deadline=$((SECONDS + $3))
  SERVER_URLS=
  srun --overlap --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c "$1" &
  SERVERS=$!
  for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    until python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "http://$host:$2/health" 2>/dev/null; do
      kill -0 "$SERVERS" 2>/dev/null || { echo "error: a server ended before it was healthy: $1" >&2; exit 3; }
      [ "$SECONDS" -lt "$deadline" ] || {
        echo "error: the server on $host was not healthy after $3 s (SPD_SERVER_SECONDS): $1" >&2; kill "$SERVERS"; exit 3; }
      sleep 2
    done
    SERVER_URLS+=${SERVER_URLS:+,}http://$host:$2/v1
  done
  echo "$(date +%T) job $JOB: healthy servers at $SERVER_URLS"
}

start() {  # the words of the program: all ranks
  case ${SPD_LAUNCHER:-srun} in
    srun) step "$RANKS_PER_NODE" python -u "$PROGRAM" "$@" ;;
    deepspeed)
      local hostfile=$RUN_DIR/slurm/hostfile.$SLURM_JOB_ID
      scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$RANKS_PER_NODE/" > "$hostfile"
      step 1 bash -c 'exec deepspeed --hostfile "$0" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" \
        --master_port "$MASTER_PORT" "$@"' "$hostfile" "$PROGRAM" "$@" ;;
    torchrun)
      step 1 torchrun --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --rdzv-backend c10d \
        --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$JOB" "$PROGRAM" "$@" ;;
    *) echo "error: SPD_LAUNCHER=$SPD_LAUNCHER is not srun, deepspeed or torchrun" >&2; return 2 ;;
  esac
}

ask_to_stop() { touch "$STOP_FILE"; [ -z "$STEP" ] || kill -USR1 "$STEP" 2>/dev/null; }

on_signal() {  # again and again: what comes while Python starts is lost
  echo "$(date +%T) job $JOB: asked to stop by $1"
  ask_to_stop
  (while sleep 5 && kill -0 "$STEP" 2>/dev/null; do ask_to_stop; done) &
}

state() { sed -n 's/^ *"state": "\(.*\)",/\1/p' "$STATUS_FILE" 2>/dev/null; }

launch() {  # [stage words] [config words]: run to the end, and leave with the code that SLURM should see
  local code suffix=${SPD_TASK:+.task-$(printf %05d "$SPD_TASK")}
  prepare "$@"
  STOP_FILE=$RUN_DIR/PREEMPT$suffix STATUS_FILE=$RUN_DIR/status$suffix.json FAILURES=$RUN_DIR/slurm/failures.$JOB
  echo "$(date +%T) job $JOB: start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, in $RUN_DIR"
  trap 'on_signal USR1' USR1
  trap 'on_signal TERM' TERM
  rm -f "$STATUS_FILE"  # of an earlier attempt
  start "$@" & STEP=$!
  while :; do  # a signal ends a wait before its time
    wait "$STEP"; code=$?
    kill -0 "$STEP" 2>/dev/null || break
  done
  if [ "$code" -gt 128 ]; then  # the step may have ended in the middle of that
    wait "$STEP"; local again=$?; [ "$again" = 127 ] || code=$again
  fi
  trap '' USR1 TERM
  [ -z "${SERVERS:-}" ] || { kill "$SERVERS"; wait "$SERVERS"; } 2>/dev/null
  finish "$code"
}

finish() {  # launchers and killed steps lose exit codes: the run's own word counts
  local code=$1
  case $(state) in
    stopped) code=75 ;;
    complete) code=0 ;;
    *) [ "$code" != 0 ] || { echo "error: the launcher reported success, the run did not"; code=1; } ;;
  esac
  srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 rm -rf "$CACHE" 2>/dev/null
  case $code in
    0 | 2 | 3) ;;  # done, or wrong: another attempt would end in the same way
    75) requeue "stopped on request" ;;
    *) echo "$(date +%T) $code" >> "$FAILURES"  # a node, the network, a bug: the next attempt may be luckier
       if [ "$(wc -l < "$FAILURES")" -le "${SPD_MAX_RETRIES:-2}" ]; then requeue "failed with exit code $code"; fi ;;
  esac
  exit "$code"
}

requeue() {
  local starts=$((${SLURM_RESTART_COUNT:-0} + 1))
  scontrol -o show job "$JOB" | grep -q " JobState=RUNNING " || return  # cancelled, or SLURM requeues it itself
  if [ "$starts" -gt "${SPD_MAX_REQUEUES:-20}" ]; then
    echo "job $JOB: $1, and started $starts times already: not requeued (SPD_MAX_REQUEUES); submit it again to go on"
    return
  fi
  echo "$(date +%T) job $JOB: $1, requeued"
  scontrol requeue "$JOB" && sleep 60  # SLURM ends this script
}

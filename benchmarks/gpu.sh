#!/usr/bin/env bash
# All that is measured on a GPU, unattended, in as many calls as it takes: each goes on where the one before stopped.
#
#   benchmarks/gpu.sh [SECONDS]        be done within so many seconds; 540 if not given
#
# In the order in which it is wanted: memory against its goals and against the plan, the tests that want a GPU, time of steps. Results go into
# benchmarks/results/<device>.json after every case, so nothing is lost if the call is ended. Nothing is downloaded, and nothing but Python with
# torch, diffusers, transformers, accelerate, peft, lycoris-lora and pydantic is needed; a case that needs more is left out, and the file says why.
#
#   RESULTS=folder    where the results are read and written
#   DEVICE=cpu SIZE=tiny FIRST=1 benchmarks/gpu.sh    a trial of everything on any machine; FIRST takes so many cases of each part
#   PARTS="memory tests speed"    which parts, in this order
#   ONLY="flux"       cases with these words in their names
set -u
cd "$(dirname "$0")/.." || exit 1

UNTIL=$(($(date +%s) + ${1:-540}))
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
SIZE=${SIZE:-real}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU here; DEVICE=cpu SIZE=tiny tries everything without one" >&2
  exit 2
fi

common=(--device "$DEVICE" --results "$RESULTS" --until "$UNTIL")
chosen=(--size "$SIZE" ${FIRST:+--first "$FIRST"} ${ONLY:+--only $ONLY})
status=0

# A crash of CUDA ends the process that it happens in: the case that was under way is tried once more, and left out then.
repeated() {
  local code=1 tries=0
  while [ $code -ne 0 ] && [ $code -ne 3 ] && [ $tries -lt 20 ]; do
    left=$((UNTIL - $(date +%s)))
    [ $left -gt 5 ] || return 3
    timeout --signal=TERM "$left" "$@"
    code=$?
    tries=$((tries + 1))
    [ $code -eq 124 ] && return 3
    [ $code -eq 2 ] && return 2
  done
  return $code
}

for part in ${PARTS:-memory tests speed}; do
  case $part in
    memory) repeated "$PYTHON" benchmarks/vram.py "${common[@]}" "${chosen[@]}" ${STEPS:+--steps "$STEPS"} ;;
    tests) repeated "$PYTHON" benchmarks/gpu_tests.py "${common[@]}" ;;
    speed) repeated "$PYTHON" benchmarks/speed.py "${common[@]}" "${chosen[@]}" ${ROUNDS:+--rounds "$ROUNDS"} ${STEPS:+--steps "$STEPS"} ;;
    *) echo "no such part: $part" >&2; exit 2 ;;
  esac
  code=$?
  [ $code -ne 0 ] && status=$code
done

"$PYTHON" benchmarks/page.py "$RESULTS"/*.json | sed -n '/^## /,$p'
[ $status -eq 3 ] && echo "cases are left: the same command goes on with them" >&2
exit $status

#!/bin/bash
# Train the pretrained judges, all at once, and compare every rule on each, batch by batch, then
# by tasks.
#
#   calibration/pretrained_judge/frontiers.sh TEXT OUT [BATCHES [JUDGES]]
#
# TEXT is what prepare.py wrote. OUT gets the models, their artifacts, frontier-pretrained-NAME.json
# and tasks-pretrained-NAME.json, written anew after each batch size and each task, so that a run
# that is cut off loses one at most. Started again, it goes on. Judges are spread over the GPUs that
# CUDA_VISIBLE_DEVICES names, or all there are.
set -euo pipefail
text=$1 out=$2 batches=${3:-"16 4 64"} judges=${4:-"seed0 seed1 sigmoid"}
here=$(dirname "$0")
python=${PYTHON:-python}
train=${TRAIN:---minutes 5}
statistics=${STATISTICS:-directed,stand_ins,novices}
calibrate=${CALIBRATE:-}
measure=${MEASURE:---sequences 256 --tune-sequences 64}
tasks=${TASKS:---policies S=2,S=4,rule=margin:tau=0.0007,rule=spare:tau=0.002,rule=spare:tau=0.006,rule=spare:tau=0.012,rule=spare:tau=0.02}
gpus=${CUDA_VISIBLE_DEVICES-$("$python" -c \
  'import torch; print(",".join(map(str, range(torch.cuda.device_count()))))')}

judge() {
  local model=$out/pretrained-$1 artifact=$out/pretrained-$1.sere.safetensors made=$out/$1
  local frontier=$out/frontier-pretrained-$1.json scored=$out/tasks-pretrained-$1.json
  local -a kind rules=()
  case $1 in
    seed*) kind=(--gate softmax --seed "${1#seed}") ;;
    sigmoid*)
      kind=(--gate sigmoid --seed "0${1#sigmoid}")
      # The others read scores of a softmax: their papers say nothing about a sigmoid or a bias.
      rules=(--rules sere,topk,ace,exfold,mone,margin,spare)
      ;;
    *) echo "judge $1: must be seedN, sigmoid or sigmoidN" && return 1 ;;
  esac
  # shellcheck disable=SC2086  # options
  [ -f "$model/metrics.json" ] ||
    "$python" "$here/upcycle.py" --text "$text" --out "$made" "${kind[@]}" $train
  [ -d "$model" ] || mv "$made"/judge-* "$model"
  # shellcheck disable=SC2086
  [ -f "$artifact" ] || "$python" -m sere_ray calibrate "$model" --data "$text/calibration.jsonl" \
    --dtype float32 --statistics "$statistics" $calibrate --out "$artifact"
  for batch in $batches; do
    ! grep -qs "\"batch\": $batch," "$frontier" || continue
    # shellcheck disable=SC2086
    "$python" -m sere_ray evaluate "$model" --similarity "$artifact" --data "$text/heldout.jsonl" \
      --tune-data "$text/calibration.jsonl" --batches "$batch" --ranks 1 --dtype float32 \
      --best-only --append ${rules[@]+"${rules[@]}"} $measure --out "$frontier"
  done
  # shellcheck disable=SC2086
  "$python" -m sere_ray tasks "$model" --similarity "$artifact" --data "$text/heldout.jsonl" \
    --dtype float32 --append $tasks --out "$scored"
}

mkdir -p "$out"
IFS=, read -ra of_gpus <<<"$gpus"
count=0
declare -A jobs_of
for name in $judges; do
  visible=${of_gpus[*]:+${of_gpus[$((count % ${#of_gpus[@]}))]}}
  CUDA_VISIBLE_DEVICES=$visible judge "$name" >>"$out/$name.log" 2>&1 &
  jobs_of[$name]=$!
  count=$((count + 1))
done
failed=0
for name in $judges; do
  wait "${jobs_of[$name]}" || { failed=1 && echo "judge $name failed: see $out/$name.log"; }
done
tail -n 3 "$out"/*.log
exit $failed

#!/bin/bash
# Train judge models on one GPU, all seeds at once, and compare every rule on each, batch by batch.
#
#   calibration/judge_model/frontiers.sh TEXT OUT [BATCHES [SEEDS]]
#
# TEXT is what text.py wrote. OUT gets the models, their artifacts and frontier-judge-seedN.json,
# which is written anew after each batch size, so that a run that is cut off loses one batch at most.
# Started again, it goes on: a model that is there is not trained again, nor a batch measured again.
set -euo pipefail
text=$1 out=$2 batches=${3:-"16 4 64"} seeds=${4:-"0 1"}
here=$(dirname "$0")
python=${PYTHON:-python}
train=${TRAIN:---minutes 3.3}
measure=${MEASURE:---sequences 512 --tune-sequences 64}

judge() {
  local model=$out/judge-seed$1 artifact=$out/judge-seed$1.sere.safetensors
  local frontier=$out/frontier-judge-seed$1.json
  # shellcheck disable=SC2086  # options
  [ -f "$model/metrics.json" ] ||
    "$python" "$here/train.py" --text "$text" --out "$out/seed$1" --seed "$1" $train
  [ -d "$model" ] || mv "$out/seed$1/judge-seed$1" "$model"
  [ -f "$artifact" ] || "$python" -m sere_ray calibrate "$model" --data "$text/calibration.jsonl" \
    --dtype float32 --statistics stand_ins,novices --out "$artifact"
  for batch in $batches; do
    ! grep -qs "\"batch\": $batch," "$frontier" || continue
    # shellcheck disable=SC2086
    "$python" -m sere_ray evaluate "$model" --similarity "$artifact" --data "$text/heldout.jsonl" \
      --tune-data "$text/calibration.jsonl" --batches "$batch" --ranks 1 --dtype float32 \
      --best-only --append $measure --out "$frontier"
  done
}

mkdir -p "$out"
for seed in $seeds; do
  judge "$seed" >"$out/seed$seed.log" 2>&1 &
done
failed=0
for job in $(jobs -p); do
  wait "$job" || failed=1
done
tail -n 2 "$out"/seed*.log
exit $failed

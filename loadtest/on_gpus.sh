#!/usr/bin/env bash
# Load tests of Qwen3-30B-A3B's shapes (random weights) on this host's GPUs, through HTTP with direct streaming.
#
#   loadtest/on_gpus.sh OUT 1        # one GPU: off, S=2, S=1 at 4 to 128 streams, cross-check, mode auto, open loop
#   loadtest/on_gpus.sh OUT 2        # two GPUs, data and expert parallel
#   SECONDS_PER_BLOCK=30 ROUNDS=6 USD_PER_GPU_HOUR=2.5 loadtest/on_gpus.sh OUT 1
#
# From a checkout whose environment is active. Result files, named after the card (h200, ...), are written after each load.
# About 2.5 minutes to start an engine cold; with the defaults two minutes a load. Whatever it started ends with it.
set -euo pipefail
[ $# = 2 ] && { [ "$2" = 1 ] || [ "$2" = 2 ]; } || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd); gpus=$2
cd "$(dirname "$0")/.."
sere="python3 -m sere_ray"
work=$(mktemp -d)
port=$(python3 -c 'from sere_ray.util.ports import free_port; print(free_port())')
url=http://127.0.0.1:$port
SERE_API_KEY=$(python3 -c 'import secrets; print(secrets.token_hex(16))'); export SERE_API_KEY OPENAI_API_KEY=$SERE_API_KEY
SERE_ADMIN_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(16))'); export SERE_ADMIN_TOKEN

python3 loadtest/random_model.py "$work" --model qwen3-30b-a3b --streams 128 --ranks "$gpus" --port "$port" --target-tpot-ms 12
setsid $sere serve --config "$work/deployment.yaml" --proxy direct > "$out/serve.log" 2>&1 &
server=$!
trap 'kill -TERM $server 2>/dev/null; wait $server 2>/dev/null; rm -rf "$work"' EXIT
until grep -q '^serving ' "$out/serve.log"; do
  kill -0 $server 2>/dev/null || { tail -n 30 "$out/serve.log"; exit 1; }
  sleep 1
done

# The workload samples: random weights that always take their likeliest token soon say the same in every stream, and then
# choose the same experts.
load="--url $url --workload loadtest/workloads/answers.jsonl --slo ttft=500,tpot=20 --gpus $gpus"
load="$load --usd-per-gpu-hour ${USD_PER_GPU_HOUR:-3} --processes 4 --rounds ${ROUNDS:-2} --seconds ${SECONDS_PER_BLOCK:-10}"
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | awk 'NR == 1 {print tolower($2)}')
name=loadtest-$card; streams=16,64,32,128,4  # what matters most comes first
[ "$gpus" = 1 ] || { name=loadtest-${card}x2; streams=16,8,4,32,64,128; }
status=0  # a load that fails, as with a generator that cannot keep up, does not cost the ones after it
$sere loadtest ab $load --warmup 4 --streams "$streams" --out "$out/$name.json" --html "$out/$name.html" || status=$?
if [ "$gpus" = 1 ]; then
  python3 loadtest/cross_check.py --url "$url" --tokenizer "$work/model" --streams 16 --requests 480 --seconds 10 --rounds 2 \
    --out "$out/loadtest-cross-check-$card.json" || status=$?
  # The warm-up is as long as `auto` takes to its strongest level, and more. Its decisions are in the audit log.
  $sere loadtest ab $load --warmup 10 --streams 32 --policies off,auto --out "$out/$name-auto.json" || status=$?
  curl -sS -H "Authorization: Bearer $SERE_ADMIN_TOKEN" "$url/sere/audit" > "$out/audit.json" || status=$?
  $sere loadtest ab $load --warmup 6 --rates 4,10,16,22,28 --out "$out/$name-rates.json" || status=$?
fi
$sere stats --url "$url"
exit $status

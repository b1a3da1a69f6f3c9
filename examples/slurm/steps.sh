#!/bin/bash
# What each node of influence.sbatch runs; without Slurm, on one machine with two processes:
#
#     MODEL=... DATA=... QUERIES=... OUT=... PROCESSES=2 bash steps.sh
#
# LAYERS and PROJECTION are those of `influence-fast build`, METHOD that of `search` (cosine, trak, ...).
set -euo pipefail
NODES=${NODES:-1} NODE=${NODE:-0} HEAD=${HEAD:-127.0.0.1} PORT=${PORT:-29500} K=${K:-10} METHOD=${METHOD:-cosine}
PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$PROCESSES" -gt 0 ] || PROCESSES=1
WORLD=$((NODES * PROCESSES))
given=()
[ -z "${LAYERS:-}" ] || given+=(--layers "$LAYERS")
[ -z "${PROJECTION:-}" ] || given+=(--projection "$PROJECTION")

# Every process of every node, which find each other at the first node.
together() {
  torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$PROCESSES" \
    --master-addr "$HEAD" --master-port "$PORT" "$@"
}

together -m influence_fast build --model "$MODEL" --data "$DATA" --out "$OUT/train" "${given[@]}"
together -m influence_fast build --model "$MODEL" --data "$QUERIES" --out "$OUT/queries" "${given[@]}"
together -m influence_fast score --train "$OUT/train" --queries "$OUT/queries" --out "$OUT/scores.csv"

# Each process indexes its share of the rows, and all of them search together.
export OUT ROWS
ROWS=$(python -c "import os, influence_fast as inf; print(len(inf.GradientStore.open(os.environ['OUT'] + '/train')))")
together --no-python bash -c 'influence-fast index "$OUT/train" --factory Flat --out "$OUT/index-$RANK" \
  --rows "$((ROWS * RANK / WORLD_SIZE)):$((ROWS * (RANK + 1) / WORLD_SIZE))"'
indexes=()
for ((rank = 0; rank < WORLD; rank++)); do indexes+=("$OUT/index-$rank"); done
# The first process, which is on the first node, prints what all of them found.
answer=/dev/null
[ "$NODE" -ne 0 ] || answer=$OUT/nearest.json
together -m influence_fast search "${indexes[@]}" --queries "$OUT/queries" -k "$K" --method "$METHOD" --json >"$answer"

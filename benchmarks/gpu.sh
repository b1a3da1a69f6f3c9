#!/usr/bin/env bash
# Everything to do on a machine with a GPU, in one command of under nine minutes:
#
#     OUT=results bash benchmarks/gpu.sh
#
# Needs python3 with torch, and nvcc. Without a network put the wheels of what is missing into wheels/ beside this
# checkout (or name a folder in $WHEELS): pip download --only-binary :all: -d wheels pybind11 faiss-cpu pytest hypothesis
# click rich tqdm jinja2 matplotlib scikit-learn scipy datasets peft transformers safetensors. Steps go on after a
# failure; the exit status says whether any failed. JSON and logs go to $OUT (benchmarks/results by default).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-benchmarks/results}
WHEELS=${WHEELS:-wheels}
mkdir -p "$OUT"
failed=()

step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    if ! timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
        failed+=("$name")
        tail -n 25 "$OUT/$name.log"
    fi
}

[ -d "$WHEELS" ] && step wheels 60 python3 -m pip install --no-index --find-links "$WHEELS" --no-deps "$WHEELS"/*.whl

arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sed -n 1p | tr -d .)
export INFLUENCE_FAST_CUDA=1 INFLUENCE_FAST_CUDA_ARCHS=${arch:-90}
step build 150 python3 setup.py -q build_ext --inplace
step doctor 60 python3 -m influence_fast doctor --json
step tests 150 python3 -m pytest -m gpu -x
if command -v compute-sanitizer >/dev/null; then
    small=(python3 -m pytest -m gpu -x -k "project_outer and float32 and 63")
    step memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 "${small[@]}"
    step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 "${small[@]}"
fi
for dtype in bfloat16 float32; do
    step "bench-$dtype" 100 python3 -m benchmarks.run --no-compile --device cuda --dtype "$dtype" --repeats 11 --out "$OUT"
done
step bench-compiled 60 python3 -m benchmarks.run --op project_outer --case 1b --device cuda --dtype bfloat16 --out "$OUT"

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all steps passed; results in $OUT"

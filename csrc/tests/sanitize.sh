#!/usr/bin/env bash
# The kernels and the Python module under the sanitizers: the self-checks of kernels_test.cpp with AddressSanitizer and
# UndefinedBehaviorSanitizer, then with ThreadSanitizer, and the tests of the operations on an extension that was built with the
# first two. ThreadSanitizer runs without Python: torch's OpenMP runtime waits in ways that it cannot see. One line a run.
# Usage: csrc/tests/sanitize.sh [PYTHON]; about 100 s on two cores. INFLUENCE_FAST_ISA picks the instruction set of the tests.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 TSAN_OPTIONS=halt_on_error=1

flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=fast -fno-math-errno -fno-trapping-math -pthread -w)
avx2=(-mavx2 -mfma -mf16c)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl)
avx512bf16=("${avx512[@]}" -mavx512bf16 -mavx512vnni)

# checks NAME SANITIZERS: kernels_test.cpp as it is in run.sh, instrumented.
checks() {
    local out=$build/$1 jobs=() macros=() isa source
    mkdir "$out"
    if [[ $(uname -m) == x86_64 ]]; then
        for isa in avx2 avx512 avx512bf16; do
            local -n isa_flags=$isa
            if g++ "${isa_flags[@]}" -x c++ -fsyntax-only /dev/null 2>/dev/null; then
                macros+=("-DINFLUENCE_FAST_${isa^^}=1")
                g++ "${flags[@]}" "-fsanitize=$2" "${isa_flags[@]}" -c "csrc/cpu/isa/$isa.cpp" -o "$out/$isa.o" & jobs+=($!)
            fi
        done
    fi
    for source in cpu/isa/baseline.cpp cpu/parallel.cpp cpu/exact_search.cpp cpu/dispatch.cpp tests/kernels_test.cpp; do
        g++ "${flags[@]}" "-fsanitize=$2" "${macros[@]}" -c "csrc/$source" -o "$out/$(basename "$source" .cpp).o" & jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    g++ "-fsanitize=$2" -pthread "$out"/*.o -o "$out/kernels_test" -ldl
    echo "kernels, $1: $("$out/kernels_test")"
}

checks "address and undefined behaviour" address,undefined
checks "threads" thread

INFLUENCE_FAST_CUDA=0 INFLUENCE_FAST_SANITIZE=address,undefined "$python" setup.py -q build_ext \
    --build-lib "$build/lib" --build-temp "$build/temp" --force
# The runtime comes first; the module's folder before any other build of it.
result=$(LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" OMP_NUM_THREADS=2 \
    PYTHONPATH="$build/lib:$PWD" "$python" -m pytest -q -p no:cacheprovider tests/ops/test_addresses.py tests/ops/test_cpu.py \
    tests/ops/test_rank.py tests/search/test_exact.py "${@:2}") || { echo "$result"; exit 1; }
echo "operations, address and undefined behaviour: $(tail -n 1 <<<"$result")"

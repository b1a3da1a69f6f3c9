#!/usr/bin/env bash
# The kernels and the Python module under the sanitizers: the self-checks of kernels_test.cpp and c_test.c on several threads with
# ThreadSanitizer, and the tests of the operations on an extension with AddressSanitizer and UndefinedBehaviorSanitizer.
# ThreadSanitizer runs without Python: torch's OpenMP runtime waits in ways that it cannot see. One line a run.
# Usage: csrc/tests/sanitize.sh [PYTHON]. INFLUENCE_FAST_ISA picks the instruction set of the tests of the operations.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 TSAN_OPTIONS=halt_on_error=1

flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=fast -fno-math-errno -fno-trapping-math -pthread -w)

# Threads are the same in every instruction set, so one of them does.
units=(baseline parallel exact_search dispatch operations interface index kernels_test)
declare -A folder=([baseline]=cpu/isa [interface]=c [index]=c [kernels_test]=tests)
# Compiled beside the tests with ThreadSanitizer. Instruction sets differ in the width of vectors alone.
INFLUENCE_FAST_CUDA=0 INFLUENCE_FAST_ISAS=${INFLUENCE_FAST_ISA:-avx2} INFLUENCE_FAST_SANITIZE=address,undefined \
    "$python" setup.py -q build_ext \
    --build-lib "$build/lib" --build-temp "$build/temp" --force & extension=$!
jobs=()
for unit in "${units[@]}"; do
    g++ "${flags[@]}" -fsanitize=thread -c "csrc/${folder[$unit]:-cpu}/$unit.cpp" -o "$build/$unit.o" & jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
mkdir "$build/tests"
mv "$build/kernels_test.o" "$build/tests"
gcc -std=c99 -O1 -g -fsanitize=thread -Icsrc -c csrc/tests/c_test.c -o "$build/tests/c_test.o"
for test in kernels_test c_test; do
    g++ -fsanitize=thread -pthread "$build"/*.o "$build/tests/$test.o" -o "$build/$test" -ldl
    echo "$test, threads: $("$build/$test")"
done

wait "$extension"
# The runtime comes first, and the module before the folders that pytest adds, where another build of it may be.
repository=$PWD
cd "$build/lib"
result=$(LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" OMP_NUM_THREADS=2 \
    PYTHONPATH="$build/lib:$repository" "$python" -m pytest --disable-warnings -p no:cacheprovider -p influence_fast_cpu \
    -c "$repository/pyproject.toml" --rootdir "$repository" "$repository/tests/ops/test_addresses.py" \
    "$repository/tests/ops/test_cpu.py" "$repository/tests/ops/test_rank.py" "$repository/tests/search/test_exact.py" \
    "${@:2}") || { echo "$result"; exit 1; }
echo "operations, address and undefined behaviour: $(tail -n 1 <<<"$result")"

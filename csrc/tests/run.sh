#!/usr/bin/env bash
# Builds kernels_test.cpp with each of the given C++ compilers (g++ and clang++ where none are given) and runs it, then for arm64
# with aarch64-linux-gnu-g++ under qemu where both are installed. One line a run; the exit code is not 0 where a check fails.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

flags=(-std=c++17 -O3 -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -pthread)
flags+=(-Wall -Wextra -Werror -Wno-psabi)
avx2=(-mavx2 -mfma -mf16c)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl)
avx512bf16=("${avx512[@]}" -mavx512bf16 -mavx512vnni)

# compile COMPILER OBJECT SOURCE FLAGS...
compile() { "$1" "${flags[@]}" "${@:4}" -c "$3" -o "$2"; }

# test_with NAME RUNNER COMPILER FLAGS...
test_with() {
    local name=$1 runner=$2 compiler=$3 extra=("${@:4}") out jobs=() units=() macros=() isa source
    out=$(mktemp -d -p "$build")
    if ! "$compiler" --version | grep -q clang; then extra+=(-Wno-maybe-uninitialized); fi
    if [[ $("$compiler" -dumpmachine) == x86_64* ]]; then
        for isa in avx2 avx512 avx512bf16; do
            local -n isa_flags=$isa
            if "$compiler" "${isa_flags[@]}" -x c++ -fsyntax-only /dev/null 2>/dev/null; then
                macros+=("-DINFLUENCE_FAST_${isa^^}=1")
                compile "$compiler" "$out/$isa.o" "cpu/isa/$isa.cpp" "${extra[@]}" "${isa_flags[@]}" & jobs+=($!)
            fi
        done
    fi
    for source in cpu/isa/baseline.cpp cpu/parallel.cpp cpu/exact_search.cpp cpu/dispatch.cpp tests/kernels_test.cpp; do
        compile "$compiler" "$out/$(basename "$source" .cpp).o" "$source" "${extra[@]}" "${macros[@]}" & jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    # The linker warns of dlopen in a static program; it is not called there.
    "$compiler" "${extra[@]}" -pthread "$out"/*.o -o "$out/kernels_test" -ldl 2>"$out/linker.txt" || { cat "$out/linker.txt"; return 1; }
    local result status=0
    result=$($runner "$out/kernels_test") || status=$?
    echo "$name: $result"
    return $status
}

compilers=("$@")
if [[ ${#compilers[@]} == 0 ]]; then compilers=(g++ clang++); fi
for compiler in "${compilers[@]}"; do test_with "$compiler" "" "$compiler"; done

cross=aarch64-linux-gnu-g++
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
if [[ -n $qemu ]] && command -v $cross >/dev/null && [[ $(uname -m) != aarch64 ]]; then
    for march in armv8-a armv8.2-a+dotprod armv8.6-a+i8mm; do test_with "$cross $march" "$qemu" $cross -static "-march=$march"; done
fi

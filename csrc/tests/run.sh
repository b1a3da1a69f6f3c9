#!/usr/bin/env bash
# Builds csrc/CMakeLists.txt with each of the given C++ compilers, and the C compiler beside it (g++ and clang++ where none are given),
# and runs the tests of the kernels and of the C interface, then for arm64 with aarch64-linux-gnu-g++ under qemu where both are
# installed (the C interface once: no instruction set makes a difference to it). One line a test; the exit code is not 0 where a check fails.
# INFLUENCE_FAST_C_LIBRARY names where the first compiler's libinfluence_fast.so is left.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
kept=${INFLUENCE_FAST_C_LIBRARY:-}
tests=(kernels_test c_test)

# test_with NAME RUNNER COMPILER CMAKE_OPTIONS...
test_with() {
    local name=$1 runner=$2 compiler=$3 out test result
    out=$(mktemp -d -p "$build")
    local c=$compiler
    case $compiler in
        *clang++*) c=${compiler/clang++/clang} ;;
        *g++*) c=${compiler/g++/gcc} ;;
    esac
    { cmake -G Ninja -S . -B "$out" -DINFLUENCE_FAST_TESTS=ON -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_C_COMPILER="$c" "${@:4}" &&
        cmake --build "$out" --target "${tests[@]}" ${kept:+shared}; } >"$out/build.txt" 2>&1 || { cat "$out/build.txt"; return 1; }
    for test in "${tests[@]}"; do
        result=$($runner "$out/$test") || { echo "$name: $result"; return 1; }
        echo "$name: $result"
    done
    if [[ -n $kept ]]; then
        cp -L "$out/libinfluence_fast.so" "$kept"
        kept=
    fi
}

compilers=("$@")
if [[ ${#compilers[@]} == 0 ]]; then compilers=(g++ clang++); fi
for compiler in "${compilers[@]}"; do test_with "$compiler" "" "$compiler" -DCMAKE_CXX_FLAGS=-Werror; done

cross=aarch64-linux-gnu-g++
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
if [[ -n $qemu ]] && command -v $cross >/dev/null && [[ $(uname -m) != aarch64 ]]; then
    for march in armv8-a armv8.2-a+dotprod armv8.6-a+i8mm; do
        # The linker warns of dlopen in a static program; it is not called there.
        test_with "$cross $march" "$qemu" $cross -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DBUILD_SHARED_LIBS=OFF \
            -DCMAKE_CXX_FLAGS="-Werror -march=$march" -DCMAKE_EXE_LINKER_FLAGS=-static
        tests=(kernels_test)
    done
fi

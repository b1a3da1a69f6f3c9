#define ISA avx512bf16
#include "../kernels/table.inc"

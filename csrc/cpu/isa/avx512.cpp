#define ISA avx512
#include "../kernels/table.inc"

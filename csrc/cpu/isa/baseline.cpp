#define ISA baseline
#include "../kernels/table.inc"

// Which instruction sets this machine can run.
#pragma once

#include <vector>

#include "kernels.h"

namespace influence_fast {

// Slowest first: the last one is what to use. Units whose flags the compiler lacks are not among them.
const std::vector<const Kernels*>& supported_kernels();

}  // namespace influence_fast

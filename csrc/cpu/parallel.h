// Threads, and the memory their tasks work in. The threads are those of torch's OpenMP runtime where it is loaded, else a
// pool of our own. Nothing here is a template or inline: kernels built for different
// instruction sets share one copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace influence_fast {

// Calls task(context, i) for every i in [0, tasks), on at most `threads` threads (the caller is one of them). Which thread
// runs which task is not fixed, so a task's result must depend on i alone. The first exception is rethrown. A call from
// within a task, or while another thread uses the pool, runs on the caller alone.
using Task = void (*)(void* context, int64_t i);
void parallel_for(int threads, int64_t tasks, Task task, void* context);

// 64-byte aligned floats for one call, not initialised.
class Buffer {
 public:
  explicit Buffer(size_t count);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data;
};

// The same, kept by the thread from call to call, for what is of cache size. Each use has a place of its own, whose content is
// lost when it is asked for again.
enum class Scratch : int {
  widened,       // rows of 16-bit inputs as float32
  packed_x,      // panels of tokens
  packed_dy,     // likewise
  entries,       // of a random matrix: a panel, or signs and rotations
  gradient,      // a block of rows of G
  accumulators,  // sums of SJLT rows
  transposed,    // tokens as lanes
  pattern_sums,  // of Rademacher sign patterns
  places,        // how many there are
};
float* scratch(Scratch place, size_t count);

// For memory that is about to be written whole, perhaps for the first time: where a page of 4 KB costs as much as filling it,
// takes pages of 2 MB, now, before anything is in cache. Its content is lost.
void take_large_pages(void* memory, size_t bytes, int threads);

}  // namespace influence_fast

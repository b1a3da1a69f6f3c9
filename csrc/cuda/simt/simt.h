// A small SIMT machine on the host: runs the kernels of csrc/cuda, compiled by an ordinary C++ compiler, on no card.
//
// Every CUDA thread is a fiber; one OS thread runs them all, block after block, and changes fiber only where CUDA
// threads meet: __syncthreads, __syncwarp, shuffles, votes and the matrix instructions. Which fiber goes next, and
// which block, is drawn from a seed, so that code which leans on an order fails in some runs. On top of that the
// machine reports, as a C++ exception that names the kernel:
//   - shared memory used out of bounds, or more of it than the launch asked for, and misaligned vectors anywhere;
//   - two threads that touch the same place in shared memory, at least one of them writing, with no barrier between them:
//     which kernel, block, place and threads;
//   - __syncthreads or a warp operation that not all threads reach, or that they reach at different places.
// Shared memory starts as 0xFF bytes, a NaN in every float format; asynchronous copies land when they are waited for.
// A barrier can be left out from outside, so that a test sees what the machine says to a kernel that lacks it.
// Not seen: races in global memory between blocks, and what a real card does with memory beyond a tensor.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10, kGranule = 2;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State { ready, at_block_barrier, at_warp_operation, done };

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

struct Thread {
  dim3 index;
  unsigned id = 0;
  State state = State::ready;
  bool started = false;
  const char* file = nullptr;  // of the barrier that it waits at
  int site = 0;
  uint64_t warp_epoch = 0;
  std::vector<std::vector<Copy>> copies;
  jmp_buf context;
  ucontext_t entry;
  void* stack = nullptr;
};

struct Warp {
  unsigned arrived = 0;
  int site = 0;
  void (*operation)(void* const*) = nullptr;
  void* lanes[kWarp];
};

// Who touched two bytes of shared memory last. Epochs count the barriers of the block and of a warp.
struct Shadow {
  uint64_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0, other_warp_epoch = 0;
  int writer = -1, reader = -1, other = -1;  // the last to read, and the last before it that is another thread
  int foreign = -1;                          // a reader of another warp than the last one's
};

struct Machine {
  std::string kernel;
  dim3 grid, block_index, block_size;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> ready;
  std::vector<uint8_t> shared_storage;
  std::vector<Shadow> shadow;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  uint64_t epoch = 1, random = 1;
  Thread* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  std::string error;
  std::set<std::string> barriers;  // "kernel file:line" of those that were waited at
  std::string left_out;            // one of them that threads pass by

  uint32_t draw(uint32_t below) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return static_cast<uint32_t>((random >> 33) % below);
  }
};

inline Machine machine;

[[noreturn]] inline void fault(const std::string& what) {
  throw Fault(machine.kernel + ", block (" + std::to_string(machine.block_index.x) + ", " +
              std::to_string(machine.block_index.y) + ", " + std::to_string(machine.block_index.z) + "), thread " +
              std::to_string(machine.current ? machine.current->id : 0) + ": " + what);
}

[[noreturn]] inline void to_scheduler() { _longjmp(machine.scheduler, 1); }

inline void wait(State state) {
  Thread& me = *machine.current;
  me.state = state;
  if (!_setjmp(me.context)) to_scheduler();
}

inline void fiber() {
  for (;;) {
    try {
      machine.body();
    } catch (const std::exception& e) {
      machine.error = e.what();
    }
    wait(State::done);
  }
}

__attribute__((noinline)) inline void resume(Thread& thread) {
  machine.current = &thread;
  if (_setjmp(machine.scheduler)) return;
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  setcontext(&thread.entry);
}

inline void drop_fibers() {
  for (Thread& t : machine.threads)
    if (t.stack) munmap(t.stack, kStack);
  machine.threads.clear();
}

inline void make_fibers(unsigned count) {
  if (machine.threads.size() == count) return;
  drop_fibers();
  machine.threads = std::vector<Thread>(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = machine.threads[i];
    t.id = i;
    t.index = dim3(i, 0, 0);
    t.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (t.stack == MAP_FAILED) t.stack = nullptr, fault("no memory for the stacks of its threads");
    getcontext(&t.entry);
    t.entry.uc_stack.ss_sp = t.stack;
    t.entry.uc_stack.ss_size = kStack;
    t.entry.uc_link = nullptr;
    makecontext(&t.entry, fiber, 0);
  }
}

inline std::string barrier_name(const char* file, int line) {
  const char* name = std::strrchr(file, '/');
  return machine.kernel + " " + (name ? name + 1 : file) + ":" + std::to_string(line);
}

// Runs the threads of one block to their end.
inline void run_block() {
  Machine& m = machine;
  std::memset(m.shared, 0xFF, m.shared_bytes);
  ++m.epoch;
  m.ready.clear();
  for (Thread& t : m.threads) {
    t.state = State::ready;
    t.warp_epoch = 0;
    t.copies.assign(1, {});
    m.ready.push_back(t.id);
  }
  for (Warp& w : m.warps) w.arrived = 0;
  size_t at_barrier = 0, done = 0;
  while (done < m.threads.size()) {
    if (m.ready.empty()) {
      if (at_barrier < m.threads.size()) {
        fault(at_barrier ? "__syncthreads was not reached by all threads"
                         : "a warp operation was not reached by all lanes");
      }
      const Thread& first = m.threads[0];
      m.barriers.insert(barrier_name(first.file, first.site));
      for (Thread& t : m.threads) {
        if (t.site != first.site || t.file != first.file) fault("threads wait at different __syncthreads");
        t.state = State::ready;
        m.ready.push_back(t.id);
      }
      at_barrier = 0;
      ++m.epoch;
    }
    const uint32_t pick = m.draw(static_cast<uint32_t>(m.ready.size()));
    const unsigned id = m.ready[pick];
    m.ready[pick] = m.ready.back();
    m.ready.pop_back();
    resume(m.threads[id]);
    if (!m.error.empty()) throw Fault(m.error);
    at_barrier += m.threads[id].state == State::at_block_barrier;
    done += m.threads[id].state == State::done;
  }
}

inline void seed(uint64_t value) { machine.random = value * 0x9E3779B97F4A7C15u + 1; }

inline void run(const char* name, dim3 grid, unsigned block, size_t shared, std::function<void()> body) {
  Machine& m = machine;
  m.kernel = name;
  m.current = nullptr;
  m.grid = grid;
  m.block_size = dim3(block);
  if (block == 0 || block > 1024 || block % kWarp) fault("bad block size " + std::to_string(block));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    fault("bad grid");
  if (shared > (99u << 10)) fault("asks for " + std::to_string(shared) + " bytes of shared memory");
  make_fibers(block);
  m.warps.assign(block / kWarp, {});
  m.shared_storage.assign(shared + 16, 0);
  m.shared = m.shared_storage.data() + (16 - reinterpret_cast<uintptr_t>(m.shared_storage.data()) % 16) % 16;
  m.shared_bytes = shared;
  m.shadow.assign(shared / kGranule + 1, {});
  m.body = std::move(body);
  m.error.clear();
  std::vector<uint64_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[m.draw(static_cast<uint32_t>(i))]);
  try {
    for (uint64_t i : order) {
      m.block_index = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                           static_cast<unsigned>(i / grid.x / grid.y));
      run_block();
    }
  } catch (...) {
    drop_fibers();  // their stacks hold a kernel that will not be continued
    throw;
  }
}

inline void block_barrier(const char* file, int site) {
  if (!machine.left_out.empty() && barrier_name(file, site) == machine.left_out) return;
  machine.current->file = file;
  machine.current->site = site;
  wait(State::at_block_barrier);
}

// All lanes of a warp hand in their arguments; the last to arrive carries the operation out for all of them.
inline void warp_operation(int site, void* arguments, void (*operation)(void* const*)) {
  Thread& me = *machine.current;
  Warp& warp = machine.warps[me.id / kWarp];
  if (warp.arrived == 0) warp.site = site, warp.operation = operation;
  if (warp.site != site || warp.operation != operation) fault("lanes of a warp wait in different warp operations");
  warp.lanes[me.id % kWarp] = arguments;
  if (++warp.arrived < kWarp) {
    wait(State::at_warp_operation);
    return;
  }
  warp.arrived = 0;
  operation(warp.lanes);
  const unsigned first = me.id / kWarp * kWarp;
  for (unsigned id = first; id < first + kWarp; ++id) {
    if (id == me.id) continue;
    machine.threads[id].state = State::ready;
    machine.ready.push_back(id);
  }
}

inline void warp_barrier(int site) {
  warp_operation(site, machine.current, [](void* const* lanes) {
    for (int i = 0; i < kWarp; ++i) ++static_cast<Thread*>(lanes[i])->warp_epoch;
  });
}

inline size_t check_shared(const void* address, size_t bytes, size_t alignment) {
  const size_t offset = static_cast<size_t>(static_cast<const uint8_t*>(address) - machine.shared);
  if (offset > machine.shared_bytes || offset + bytes > machine.shared_bytes) fault("shared memory out of bounds");
  if (offset % alignment) fault("misaligned access to shared memory");
  return offset;
}

[[noreturn]] inline void race(const char* mine, size_t granule, int other, const char* others) {
  fault(std::string("race: ") + mine + " byte " + std::to_string(granule * kGranule) + " of shared memory, which thread " +
        std::to_string(other) + " " + others + " with no barrier in between");
}

// Whether `other`, which came to a place in this epoch of the block, may have done so at the same time as `me`.
inline bool meets(const Thread& me, int other, uint64_t warp_epoch) {
  const int id = static_cast<int>(me.id);
  return other >= 0 && other != id && (other / kWarp != id / kWarp || warp_epoch == me.warp_epoch);
}

inline void note_read(const void* address, size_t bytes) {
  const Thread& me = *machine.current;
  const size_t offset = check_shared(address, bytes, bytes);
  const int id = static_cast<int>(me.id);
  for (size_t g = offset / kGranule; g < (offset + bytes + kGranule - 1) / kGranule; ++g) {
    Shadow& s = machine.shadow[g];
    if (s.write_epoch == machine.epoch && meets(me, s.writer, s.write_warp_epoch)) race("reads", g, s.writer, "writes");
    if (s.read_epoch != machine.epoch) {
      s.reader = s.other = s.foreign = -1;
    } else if (s.reader != id) {
      if (s.reader / kWarp != id / kWarp) s.foreign = s.reader;
      s.other = s.reader;
      s.other_warp_epoch = s.read_warp_epoch;
    }
    s.reader = id;
    s.read_epoch = machine.epoch;
    s.read_warp_epoch = me.warp_epoch;
  }
}

inline void note_write(const void* address, size_t bytes) {
  const Thread& me = *machine.current;
  const size_t offset = check_shared(address, bytes, bytes);
  for (size_t g = offset / kGranule; g < (offset + bytes + kGranule - 1) / kGranule; ++g) {
    Shadow& s = machine.shadow[g];
    if (s.write_epoch == machine.epoch && meets(me, s.writer, s.write_warp_epoch)) race("writes", g, s.writer, "writes");
    if (s.read_epoch == machine.epoch) {
      if (meets(me, s.reader, s.read_warp_epoch)) race("writes", g, s.reader, "reads");
      if (meets(me, s.other, s.other_warp_epoch)) race("writes", g, s.other, "reads");
      // Readers of two warps: the writer is of another than one of them.
      if (s.foreign >= 0) race("writes", g, s.foreign, "reads");
    }
    s.writer = static_cast<int>(me.id);
    s.write_epoch = machine.epoch;
    s.write_warp_epoch = me.warp_epoch;
  }
}

}  // namespace simt

#define threadIdx (simt::machine.current->index)
#define blockIdx (simt::machine.block_index)
#define blockDim (simt::machine.block_size)
#define gridDim (simt::machine.grid)
#define __syncthreads() simt::block_barrier(__FILE__, __LINE__)
#define __syncwarp() simt::warp_barrier(__LINE__)

// Shared memory: the same face as on the device, every access checked.
template <typename T>
struct Shared {
  T* data;
  int64_t count;
  T load(int64_t i) const {
    check(i, 1);
    simt::note_read(data + i, sizeof(T));
    return data[i];
  }
  void store(int64_t i, T value) const {
    check(i, 1);
    simt::note_write(data + i, sizeof(T));
    data[i] = value;
  }
  template <typename V>
  V load_vector(int64_t i) const {
    check(i, sizeof(V) / sizeof(T));
    simt::note_read(data + i, sizeof(V));
    V value;
    std::memcpy(&value, data + i, sizeof(V));
    return value;
  }
  template <typename V>
  void store_vector(int64_t i, const V& value) const {
    check(i, sizeof(V) / sizeof(T));
    simt::note_write(data + i, sizeof(V));
    std::memcpy(data + i, &value, sizeof(V));
  }
  void check(int64_t i, size_t n) const {
    if (i < 0 || i + static_cast<int64_t>(n) > count)
      simt::fault("shared array of " + std::to_string(count) + " used at " + std::to_string(i));
  }
};

struct SharedArena {
  size_t used = 0;
  template <typename T>
  Shared<T> take(int64_t count) {
    T* data = reinterpret_cast<T*>(simt::machine.shared + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
    if (used > simt::machine.shared_bytes) simt::fault("uses more shared memory than its launch asks for");
    return {data, count};
  }
};

inline uint16_t half_bits(float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  const uint32_t sign = u >> 16 & 0x8000u;
  u &= 0x7FFFFFFFu;
  if (u >= 0x7F800000u) return static_cast<uint16_t>(sign | (u > 0x7F800000u ? 0x7FFFu : 0x7C00u));
  float rounded;
  std::memcpy(&rounded, &u, 4);
  if (u < 0x38800000u) return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(rounded * 0x1p24f)));
  u += 0xFFFu + (u >> 13 & 1);
  return static_cast<uint16_t>(sign | (u >= 0x47800000u ? 0x7C00u : (u - 0x38000000u) >> 13));
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float half_value(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7FFFu) << 13;  // exponents are 112 apart
  const float scaled = __uint_as_float(magnitude) * 0x1p112f;
  const float value = (bits & 0x7C00u) == 0x7C00u ? __uint_as_float(magnitude | 0x7F800000u) : scaled;
  return bits & 0x8000u ? -value : value;
}

inline uint32_t bf16_pair(float low, float high) {
  const auto rounded = [](float value) {
    const uint32_t bits = __float_as_uint(value);
    return std::isnan(value) ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
inline int __ffs(uint32_t word) { return __builtin_ffs(static_cast<int>(word)); }

inline uint32_t warp_shuffle(uint32_t value, int source, int site = __builtin_LINE()) {
  struct Lane {
    uint32_t value, result;
    int source;
  } lane{value, 0, source & 31};
  simt::warp_operation(site, &lane, [](void* const* lanes) {
    for (int i = 0; i < simt::kWarp; ++i) {
      Lane& to = *static_cast<Lane*>(lanes[i]);
      to.result = static_cast<Lane*>(lanes[to.source])->value;
    }
  });
  return lane.result;
}

inline uint32_t warp_ballot(bool vote, int site = __builtin_LINE()) {
  struct Lane {
    bool vote;
    uint32_t result;
  } lane{vote, 0};
  simt::warp_operation(site, &lane, [](void* const* lanes) {
    uint32_t all = 0;
    for (int i = 0; i < simt::kWarp; ++i) all |= static_cast<uint32_t>(static_cast<Lane*>(lanes[i])->vote) << i;
    for (int i = 0; i < simt::kWarp; ++i) static_cast<Lane*>(lanes[i])->result = all;
  });
  return lane.result;
}

// d (16 x 8, float) += a (16 x 16) b (16 x 8), fragments as PTX lays them out for mma.sync.m16n8k16.
template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int site = __builtin_LINE()) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } lane{d, a, b};
  simt::warp_operation(site, &lane, [](void* const* lanes) {
    using Row = float __attribute__((vector_size(32)));
    float left[16][16];
    Row right[16];
    const auto unpack = [](uint32_t pair, int high) {
      const uint16_t bits = static_cast<uint16_t>(pair >> (16 * high));
      return T::half ? half_value(bits) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
    };
    for (int i = 0; i < simt::kWarp; ++i) {
      const Lane& l = *static_cast<Lane*>(lanes[i]);
      const int group = i / 4, pair = i % 4 * 2;
      for (int h = 0; h < 2; ++h) {
        for (int r = 0; r < 4; ++r) left[group + r % 2 * 8][pair + h + r / 2 * 8] = unpack(l.a[r], h);
        for (int r = 0; r < 2; ++r) right[pair + h + r * 8][group] = unpack(l.b[r], h);
      }
    }
    for (int row = 0; row < 16; ++row) {
      Row sum = {};
      for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k];
      for (int quarter = 0; quarter < 4; ++quarter)
        for (int r = 0; r < 2; ++r)
          static_cast<Lane*>(lanes[row % 8 * 4 + quarter])->d[row / 8 * 2 + r] += sum[quarter * 2 + r];
    }
  });
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8 m + r points at row r of matrix m; lane 4 r + c gets numbers 2 c and
// 2 c + 1 of row r of each, or of column r.
template <bool Transposed, typename T>
void load_matrices_as(uint32_t (&out)[4], const Shared<T>& shared, int64_t i, int site) {
  static_assert(sizeof(T) == 2);
  struct Lane {
    uint16_t row[8];
    uint32_t* out;
  } lane;
  lane.out = out;
  const uint4 row = shared.template load_vector<uint4>(i);
  std::memcpy(lane.row, &row, 16);
  simt::warp_operation(site, &lane, [](void* const* lanes) {
    for (int l = 0; l < simt::kWarp; ++l)
      for (int m = 0; m < 4; ++m) {
        const int row = l / 4, column = l % 4 * 2;
        const auto number = [&](int r, int c) {
          const int line = Transposed ? c : r, place = Transposed ? r : c;
          return static_cast<uint32_t>(static_cast<Lane*>(lanes[8 * m + line])->row[place]);
        };
        static_cast<Lane*>(lanes[l])->out[m] = number(row, column) | number(row, column + 1) << 16;
      }
  });
}
template <typename T>
void load_matrices(uint32_t (&out)[4], const Shared<T>& shared, int64_t i, int site = __builtin_LINE()) {
  load_matrices_as<false>(out, shared, i, site);
}
template <typename T>
void load_matrices_transposed(uint32_t (&out)[4], const Shared<T>& shared, int64_t i, int site = __builtin_LINE()) {
  load_matrices_as<true>(out, shared, i, site);
}

// 16 bytes to shared memory behind the thread's back; zeros where `valid` is false.
template <typename T>
void copy_async(const Shared<T>& shared, int64_t i, const T* from, bool valid) {
  shared.check(i, 16 / sizeof(T));
  simt::note_write(shared.data + i, 16);
  std::memset(static_cast<void*>(shared.data + i), 0xFF, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16) simt::fault("misaligned asynchronous copy");
  simt::machine.current->copies.back().push_back({shared.data + i, valid ? from : nullptr, 16});
}
inline void atomic_min(int64_t* to, int64_t value) { *to = std::min(*to, value); }
template <typename V, typename T>
V load_vector(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(V)) simt::fault("misaligned access to global memory");
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <typename V, typename T>
void store_vector(T* to, const V& value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(V)) simt::fault("misaligned access to global memory");
  std::memcpy(to, &value, sizeof(V));
}
inline void prefetch(const void*) {}
inline void copy_async_commit() { simt::machine.current->copies.emplace_back(); }
template <int Pending>
void copy_async_wait() {
  auto& groups = simt::machine.current->copies;
  while (static_cast<int>(groups.size()) > Pending + 1) {
    for (const simt::Copy& copy : groups.front()) {
      simt::note_write(copy.to, copy.bytes);
      if (copy.from)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared, uint64_t,
            const Arguments&... arguments) {
  simt::run(name, grid, block, shared, [&] { kernel(arguments...); });
}

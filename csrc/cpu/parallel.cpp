#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#ifdef __linux__
#include <link.h>
#include <sys/mman.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace influence_fast {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long a thread without work stays awake for the next call, before it sleeps.
constexpr auto kSpin = std::chrono::microseconds(30);

template <typename Ready>
bool spin_until(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

struct Job {
  Job(Task task, void* context, int64_t tasks) : task(task), context(context), tasks(tasks) {}
  Task task;
  void* context;
  int64_t tasks;
  int helpers = 0;  // how many pool threads may join
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;
};

thread_local bool inside = false;

void work(Job& job) {
  inside = true;
  try {
    for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) job.task(job.context, i);
  } catch (...) {
    if (!job.failed.exchange(true)) job.error = std::current_exception();
    job.next.store(job.tasks, std::memory_order_relaxed);
  }
  inside = false;
}

class Pool {
 public:
  bool try_run(int threads, Job& job) {
    std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
    if (!only.owns_lock()) return false;
    job.helpers = threads - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < job.helpers) {
        const int id = static_cast<int>(workers_.size());
        workers_.emplace_back([this, id] { serve(id); });
      }
      job_ = &job;
      open_.store(true, std::memory_order_seq_cst);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load(std::memory_order_seq_cst) > 0) wake_.notify_all();
    work(job);
    // Nobody may join from here on; those who did must have left before the job goes out of scope.
    open_.store(false, std::memory_order_seq_cst);
    while (joined_.load(std::memory_order_seq_cst) != 0) {
      if (!spin_until([this] { return joined_.load(std::memory_order_seq_cst) == 0; })) std::this_thread::yield();
    }
    return true;
  }

 private:
  void serve(int id) {
    uint64_t seen = 0;
    for (;;) {
      const auto fresh = [this, &seen] { return generation_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(fresh)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, fresh);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
      }
      seen = generation_.load(std::memory_order_acquire);
      joined_.fetch_add(1, std::memory_order_seq_cst);
      if (open_.load(std::memory_order_seq_cst)) {
        Job* job = job_;
        if (id < job->helpers) work(*job);
      }
      joined_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> open_{false};
  std::atomic<int> joined_{0}, sleeping_{0};
};

// The pool is never destroyed: its threads may outlive static destructors. A forked child has none of the threads, so it
// starts a pool of its own.
Pool* pool = nullptr;
std::mutex* pool_mutex = new std::mutex;

bool forked = false;

void after_fork() {
  forked = true;
  pool = nullptr;
  pool_mutex = new std::mutex;
  inside = false;
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork);

Pool& the_pool() {
  std::lock_guard<std::mutex> lock(*pool_mutex);
  if (pool == nullptr) pool = new Pool;
  return *pool;
}

// Threads of an OpenMP runtime that is already in the process (torch's): they stay awake for a while after each of torch's
// operations, and a second set of threads would fight them for the cores. Looked up by name, nothing is linked.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

#ifdef __linux__
int find_team(dl_phdr_info* info, size_t, void* found) {
  if (info->dlpi_name == nullptr) return 0;
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* name = slash == nullptr ? info->dlpi_name : slash + 1;
  if (std::strncmp(name, "libgomp", 7) != 0 && std::strncmp(name, "libiomp5", 8) != 0) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return 0;
  *static_cast<Team*>(found) = reinterpret_cast<Team>(dlsym(library, "GOMP_parallel"));
  return *static_cast<Team*>(found) != nullptr;
}
#endif

Team torch_team() {
  static const Team team = [] {
    Team found = nullptr;
#ifdef __linux__
    dl_iterate_phdr(find_team, &found);
#endif
    return found;
  }();
  // A forked child has the runtime's records of its threads, but not the threads.
  return forked ? nullptr : team;
}

float* allocate(size_t count) {
  void* memory = nullptr;
  if (count > (SIZE_MAX - 64) / sizeof(float)) throw std::bad_alloc();
  // A cache line beyond the end, so that kernels may read whole vectors.
  if (posix_memalign(&memory, 64, (count * sizeof(float) + 64 + 63) / 64 * 64) != 0) throw std::bad_alloc();
  return static_cast<float*>(memory);
}

constexpr int kPlaces = static_cast<int>(Scratch::places);

struct OfThread {
  float* data[kPlaces] = {};
  size_t count[kPlaces] = {};
  ~OfThread() {
    for (float* memory : data) std::free(memory);
  }
};
thread_local OfThread own;

}  // namespace

void parallel_for(int threads, int64_t tasks, Task task, void* context) {
  if (tasks <= 0) return;
  if (threads > tasks) threads = static_cast<int>(tasks);
  Job job{task, context, tasks};
  if (threads <= 1 || inside) {
    const bool nested = inside;
    work(job);
    inside = nested;
  } else if (const Team team = torch_team()) {
    team([](void* shared) { work(*static_cast<Job*>(shared)); }, &job, static_cast<unsigned>(threads), 0);
  } else if (!the_pool().try_run(threads, job)) {
    work(job);
  }
  if (job.error) std::rethrow_exception(job.error);
}

Buffer::Buffer(size_t count) : data(allocate(count)) {}
Buffer::~Buffer() { std::free(data); }

void take_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes, [[maybe_unused]] int threads) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kLarge * kLarge;
  if (begin >= end || madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) != 0) return;
  parallel_for(
      threads, static_cast<int64_t>((end - begin) / kLarge),
      [](void* first, int64_t i) { *(*static_cast<volatile char**>(first) + i * kLarge) = 0; }, &begin);
#endif
}

float* scratch(Scratch place, size_t count) {
  const int slot = static_cast<int>(place);
  if (own.count[slot] < count) {
    std::free(own.data[slot]);
    own.data[slot] = nullptr;
    own.count[slot] = 0;
    own.data[slot] = allocate(count);
    own.count[slot] = count;
  }
  return own.data[slot];
}

}  // namespace influence_fast

// One parallel region for a whole call.
//
// The symbols of OpenMP are compiled in but not linked: they bind to the runtime that torch has loaded, so
// both share one pool of threads.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastclip::cpu {

// Small work stays on the calling thread. In cache and on 2 threads a region pays from about 1 MiB on; less
// than that, it costs up to 2 us. The bound is lower so that lists which no cache holds are shared out early.
constexpr int64_t kMinParallelBytes = 256 * 1024;

// After a fork the pool's threads are gone, and a region would wait for them for ever.
inline std::atomic<bool> g_forked{false};

inline int threads_for(int64_t nbytes, int64_t num_chunks, int requested) {
#if defined(_OPENMP)
  if (nbytes < kMinParallelBytes || g_forked.load(std::memory_order_relaxed)) return 1;
  return static_cast<int>(std::clamp<int64_t>(requested, 1, std::max<int64_t>(num_chunks, 1)));
#else
  (void)nbytes, (void)num_chunks, (void)requested;
  return 1;
#endif
}

// Runs first(thread, num_threads) on all threads, then between() on one, then second(thread, num_threads) on
// all, inside one parallel region; on the calling thread if num_threads is 1. None of them may throw.
template <class First, class Between, class Second>
void run_stages(int num_threads, First first, Between between, Second second) {
#if defined(_OPENMP)
  if (num_threads > 1) {
#pragma omp parallel num_threads(num_threads)
    {
      const int thread = omp_get_thread_num(), team = omp_get_num_threads();
      first(thread, team);
#pragma omp barrier
#pragma omp single
      between();
      second(thread, team);
    }
    return;
  }
#endif
  first(0, 1);
  between();
  second(0, 1);
}

template <class Work>
void run_parallel(int num_threads, Work work) {
  run_stages(num_threads, work, [] {}, [](int, int) {});
}

}  // namespace fastclip::cpu

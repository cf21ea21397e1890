// What a build under a sanitizer adds (tests/sanitize.sh); nothing of it is in a normal build.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "tensors.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace {

// AddressSanitizer knows the borders of whole allocations only. Poisoned floats between the parts of scratch memory
// show it reads and writes that leave a part for its neighbour.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t GUARD = 16;
inline void poison(float* from, int64_t floats) { ASAN_POISON_MEMORY_REGION(from, floats * sizeof(float)); }
inline void unpoison(float* from, int64_t floats) { ASAN_UNPOISON_MEMORY_REGION(from, floats * sizeof(float)); }
#else
constexpr int64_t GUARD = 0;
inline void poison(float*, int64_t) {}
inline void unpoison(float*, int64_t) {}
#endif

// ThreadSanitizer does not see the barriers of OpenMP, whose library is not instrumented: every result of a parallel
// loop would look like a race. It sees when plain threads begin and end.
#ifdef __SANITIZE_THREAD__
template <class F> void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& run) {
  const int64_t most = (end - begin + grain - 1) / grain, count = std::min<int64_t>(lib::get_num_threads(), most);
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < count; ++k)
    threads.emplace_back([=, &run] {
      run(begin + (end - begin) * k / count, begin + (end - begin) * (k + 1) / count);
    });
  for (std::thread& thread : threads) thread.join();
}
#else
using lib::parallel_for;
#endif

// Three faults, of which each sanitizer has to report its own: a write behind a part of scratch memory, the overflow of
// an integer, a race. They happen if $STRUCTLIN_FAULTS is set.
#ifdef STRUCTLIN_FAULTS
inline void faults(float* end) {
  static const bool wanted = std::getenv("STRUCTLIN_FAULTS");
  static volatile int calls = INT32_MAX;
  if (!wanted) return;
  calls = calls + 1;
  *end = 0.0f;
}
#else
inline void faults(float*) {}
#endif

}  // namespace

// Threads of one kernel call: a team that runs the same function side by side, and its barrier.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace pathrnn {

// Vanishing h and δ turn denormal, which costs up to 5x; flushed to zero for the life of this object, on this thread.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush-to-zero, denormals-are-zero
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

class Barrier {
 public:
  explicit Barrier(int size = 1) : size_(size) {}
  void resize(int size) { size_ = size; }  // before the first wait only

  void wait() {
    if (size_ == 1) return;
    const unsigned generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; generation_.load(std::memory_order_acquire) == generation; ++spin) {
      if (spin < 4000) {
        pause();
      } else {
        std::this_thread::yield();  // more threads than cores: let the one that is awaited run
      }
    }
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
};

// What a thread knows of its team. Functions that take a Team are called by all of its threads and split the work.
struct Team {
  int rank = 0;
  int size = 1;
  Barrier* barrier = nullptr;

  void wait() const {
    if (size > 1) barrier->wait();
  }
  // This thread's share [first, last) of n items.
  void share(int64_t n, int64_t& first, int64_t& last) const {
    first = n * rank / size;
    last = n * (rank + 1) / size;
  }
};

// Runs f(Team) on up to `wanted` threads at once, flushing denormals. f must not throw.
template <typename F>
void run_team(int wanted, const F& f) {
  Barrier barrier;
#ifdef _OPENMP
  if (wanted > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(wanted)
    {
      // The runtime may grant fewer threads than were wanted; the size is known only in here.
#pragma omp single
      barrier.resize(omp_get_num_threads());
      FlushDenormals flush;
      f(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
    }
    return;
  }
#endif
  FlushDenormals flush;
  f(Team{0, 1, &barrier});
}

}  // namespace pathrnn

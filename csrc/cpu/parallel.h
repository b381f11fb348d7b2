// Threads of one kernel call: a team that runs the same function side by side, and its barrier.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

#ifdef PATHRNN_STD_THREADS  // tests/sanitize: ThreadSanitizer knows std::thread, but not OpenMP's runtime
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace pathrnn {

// Vanishing h and δ turn denormal, which costs up to 5x: results are flushed to zero for the life of this object, on
// this thread, and operands too unless `operands` is false. `underflowed` says whether anything
// was since then or since `forget`.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  explicit FlushDenormals(bool operands = true) : saved_(_mm_getcsr()) {
    _mm_setcsr((saved_ & ~0x7fu) | 0x8000 | (operands ? 0x40 : 0));  // also where torch.set_flush_denormal has set it
  }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  // A result underflowed, or an operand was denormal.
  static bool underflowed() { return _mm_getcsr() & 0x12; }
  static void forget() { _mm_setcsr(_mm_getcsr() & ~0x3fu); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  explicit FlushDenormals(bool = true) {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
    asm volatile("msr fpsr, %0" ::"r"(uint64_t{0}));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
  static bool underflowed() {
    uint64_t status;
    asm volatile("mrs %0, fpsr" : "=r"(status));
    return status & ((1u << 3) | (1u << 7));
  }
  static void forget() { asm volatile("msr fpsr, %0" ::"r"(uint64_t{0})); }

 private:
  uint64_t saved_;
#else
  explicit FlushDenormals(bool = true) {}
  static bool underflowed() { return false; }
  static void forget() {}
#endif
};

// What a barrier throws to those who would wait for a thread that has failed.
struct TeamFailed {};

class Barrier {
 public:
  explicit Barrier(int size = 1) : size_(size) {}
  void resize(int size) { size_ = size; }  // before the first wait only

  // Throws TeamFailed once a thread has called `fail` instead.
  void wait() {
    if (size_ == 1) return;
    const unsigned generation = generation_.load(std::memory_order_relaxed);
    if (generation & kFailed) give_up();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store((generation + 1) & ~kFailed, std::memory_order_release);
      return;
    }
    unsigned now;
    for (int spin = 0; (now = generation_.load(std::memory_order_acquire)) == generation; ++spin) {
      if (spin < 4000) {
        pause();
      } else {
        std::this_thread::yield();  // more threads than cores: let the one that is awaited run
      }
    }
    if (now & kFailed) give_up();
  }
  // The calling thread will not come any more.
  void fail() { generation_.fetch_or(kFailed, std::memory_order_release); }

 private:
  static constexpr unsigned kFailed = 1u << 31;

  [[noreturn]] __attribute__((cold, noinline)) static void give_up() { throw TeamFailed{}; }

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

// Runs f(Team) on up to `wanted` threads at once, flushing denormals. What f throws (no thread may wait at a barrier of
// its own then) ends the whole team, and is thrown again: an exception that leaves OpenMP's region ends the process.
template <typename F>
void run_team(int wanted, const F& f, bool flush_operands = true) {
  Barrier barrier;
  std::exception_ptr failure;
  std::atomic<bool> failed{false};
  const auto member = [&](int rank, int size) {
    FlushDenormals flush(flush_operands);
    try {
      f(Team{rank, size, &barrier});
    } catch (const TeamFailed&) {
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
      barrier.fail();
    }
  };
#ifdef PATHRNN_STD_THREADS
  barrier.resize(wanted);
  std::vector<std::thread> others;
  for (int rank = 1; rank < wanted; ++rank) others.emplace_back(member, rank, wanted);
  member(0, wanted);
  for (std::thread& other : others) other.join();
#else
#ifdef _OPENMP
  if (wanted > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(wanted)
    {
      // The runtime may grant fewer threads than were wanted; the size is known only in here.
#pragma omp single
      barrier.resize(omp_get_num_threads());
      member(omp_get_thread_num(), omp_get_num_threads());
    }
  } else
#endif
    member(0, 1);
#endif
  if (failure) std::rethrow_exception(failure);
}

}  // namespace pathrnn

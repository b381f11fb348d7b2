// CUDA's names for a C++ compiler: csrc/cuda/device.cuh, which includes this file with PATHRNN_EMULATE, lists those
// that device code may use. Every CUDA thread is a fiber of one thread of the host. The blocks of a launch run one after
// another, those of a cluster or of a cooperative launch all at once. A launch throws, naming the kernel, where on a GPU
// it would hang or its results be undefined:
//
//  - some threads of a block wait in a barrier that others never reach, or in another one;
//  - a warp's operation is not reached by all lanes of its mask, or reads a lane outside it;
//  - shared memory is used beyond its bounds or read before it was written;
//  - two threads use the same word of shared or global memory, one of them writes, not both by atomics, and nothing
//    orders the two: not __syncwarp, which alone of a warp's operations orders memory, no barrier of the block or the
//    cluster, and no release by one block that another acquires. This does not depend on who happens to run first;
//  - a block reads with a plain load what another block wrote in this launch. Even where a barrier orders the two, its
//    level-1 cache may hold what was there before; load_published does not look there.
//
// Global memory is seen through the calls that -fsanitize=thread puts before every load and store of the kernels, which
// the engine answers in place of gcc's library (build.py). Not noticed: reads and writes beyond its bounds. The
// environment variable PATHRNN_EMULATION_SEED runs blocks, warps and lanes in a random order; results must not depend on
// it.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (emulation::now.running->thread)
#define blockIdx (emulation::now.running->block)
#define blockDim (emulation::now.block_dim)
#define gridDim (emulation::now.grid_dim)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
using std::signbit;

namespace emulation {

struct Thread {
  dim3 thread, block;
};
struct Now {
  const Thread* running = nullptr;  // null outside kernels
  dim3 block_dim, grid_dim;
};
extern constinit thread_local Now now;

// A place in the source: all threads that meet in a barrier come from the same one.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const {
    return line == other.line && (file == other.file || !strcmp(file, other.file));
  }
};
#define PATHRNN_HERE emulation::Place here = {__builtin_FILE(), __builtin_LINE()}

void run(const std::string& name, dim3 grid, dim3 block, int64_t shared_bytes, unsigned cluster, bool cooperative,
         const std::function<void()>& kernel);
[[noreturn]] void fail(const std::string& what);

struct Votes {
  int count, of;  // how many threads of the block gave a nonzero value, of all
};
Votes block_sync(bool vote, Place here);
void cluster_sync(PATHRNN_HERE);

// What other blocks see of a counter, and what of their writes is seen after it, if it releases and acquires. To look
// again at a value that was seen waits until there is another.
void add_one(unsigned long long* counter, bool release);
unsigned long long look(const unsigned long long* counter, bool acquire, PATHRNN_HERE);

enum class WarpOp { sync, shuffle, shuffle_xor, shuffle_down, shuffle_up, ballot, max };
uint64_t warp(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Place here);
inline int warp_max(int v, PATHRNN_HERE) {
  return static_cast<int>(warp(WarpOp::max, ~0u, static_cast<uint64_t>(v), 0, 32, here));
}
template <typename V>
V shuffle(WarpOp op, unsigned mask, V value, int argument, int width, Place here) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "shuffles move 32 or 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = warp(op, mask, bits, argument, width, here);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

enum class Access { read, published, write, atomic };  // published: a load that passes by the level-1 cache
// Checks and records an access; `check` that of whole words of shared memory.
void access(const void* at, int64_t bytes, Access access);
void check(const char* at, int64_t bytes, Access access);

// For functions that tell of their accesses themselves.
#define PATHRNN_TELLS __attribute__((no_sanitize_thread))

template <typename T>
PATHRNN_TELLS T load_published(const T* p) {
  access(p, sizeof(T), Access::published);
  return *p;
}
// *p = update(*p), at once.
template <typename T, typename Update>
PATHRNN_TELLS void atomically(T* p, Update update) {
  access(p, sizeof(T), Access::atomic);
  *p = update(*p);
}
// The block's dynamic shared memory from an offset; its own rank in the cluster and the distance between two ranks.
char* shared_memory(int64_t offset, int64_t bytes);
int64_t rank_distance(unsigned rank);

// A pointer into `count` entries of shared memory.
template <typename T>
class Shared {
 public:
  static_assert(sizeof(T) % 4 == 0, "checked in words of 4 bytes");

  class Reference {
   public:
    explicit Reference(Shared p) : p_(p) {}
    operator T() const { return p_.template read<T>(); }
    Reference& operator=(T v) { return p_.write(v), *this; }
    Reference& operator=(const Reference& other) { return *this = T(other); }
    Reference& operator+=(T v) { return *this = T(*this) + v; }
    Reference& operator-=(T v) { return *this = T(*this) - v; }
    Reference& operator*=(T v) { return *this = T(*this) * v; }

   private:
    Shared p_;
  };

  Shared() = default;
  Shared(char* start, int64_t count) : start_(start), count_(count) {}

  Reference operator[](int64_t i) const { return Reference(*this + i); }
  Reference operator*() const { return Reference(*this); }
  Shared operator+(int64_t i) const {
    Shared p = *this;
    p.at_ += i;
    return p;
  }
  Shared operator-(int64_t i) const { return *this + -i; }
  Shared& operator+=(int64_t i) { return *this = *this + i; }

  template <typename V>
  PATHRNN_TELLS V read() const {
    V v;
    const char* from = checked(sizeof(V), alignof(V), Access::read);
    std::memcpy(static_cast<void*>(&v), from, sizeof(V));
    return v;
  }
  template <typename V>
  PATHRNN_TELLS void write(const V& v) const {
    std::memcpy(checked(sizeof(V), alignof(V), Access::write), &v, sizeof(V));
  }
  PATHRNN_TELLS void atomic_max(T v) const {
    T now;
    char* at = checked(sizeof(T), alignof(T), Access::atomic);
    std::memcpy(&now, at, sizeof(T));
    if (v > now) std::memcpy(at, &v, sizeof(T));
  }

 private:
  template <typename V>
  friend Shared<V> on_rank(Shared<V> p, unsigned rank);

  char* checked(int64_t bytes, int64_t alignment, Access access) const {
    const int64_t n = bytes / static_cast<int64_t>(sizeof(T));
    if (at_ < 0 || at_ + n > count_) {
      fail("uses entries " + std::to_string(at_) + " to " + std::to_string(at_ + n - 1) + " of " +
           std::to_string(count_) + " in shared memory");
    }
    char* p = start_ + at_ * static_cast<int64_t>(sizeof(T));
    if (reinterpret_cast<uintptr_t>(p) % alignment) fail("uses shared memory that is not aligned");
    check(p, bytes, access);
    return p;
  }

  char* start_ = nullptr;
  int64_t count_ = 0, at_ = 0;
};

template <typename T>
Shared<T> take(int64_t offset, int64_t count) {
  return {shared_memory(offset, count * static_cast<int64_t>(sizeof(T))), count};
}
template <typename T>
Shared<T> on_rank(Shared<T> p, unsigned rank) {
  p.start_ += rank_distance(rank);
  return p;
}

}  // namespace emulation

inline void __syncthreads(PATHRNN_HERE) { emulation::block_sync(false, here); }
inline int __syncthreads_or(int v, PATHRNN_HERE) { return emulation::block_sync(v, here).count > 0; }
inline int __syncthreads_count(int v, PATHRNN_HERE) { return emulation::block_sync(v, here).count; }
inline int __syncthreads_and(int v, PATHRNN_HERE) {
  const emulation::Votes votes = emulation::block_sync(v, here);
  return votes.count == votes.of;
}

inline void __syncwarp(unsigned mask = ~0u, PATHRNN_HERE) {
  emulation::warp(emulation::WarpOp::sync, mask, 0, 0, 32, here);
}
template <typename V>
V __shfl_sync(unsigned mask, V v, int lane, int width = 32, PATHRNN_HERE) {
  return emulation::shuffle(emulation::WarpOp::shuffle, mask, v, lane, width, here);
}
template <typename V>
V __shfl_xor_sync(unsigned mask, V v, int lane_mask, int width = 32, PATHRNN_HERE) {
  return emulation::shuffle(emulation::WarpOp::shuffle_xor, mask, v, lane_mask, width, here);
}
template <typename V>
V __shfl_down_sync(unsigned mask, V v, unsigned delta, int width = 32, PATHRNN_HERE) {
  return emulation::shuffle(emulation::WarpOp::shuffle_down, mask, v, static_cast<int>(delta), width, here);
}
template <typename V>
V __shfl_up_sync(unsigned mask, V v, unsigned delta, int width = 32, PATHRNN_HERE) {
  return emulation::shuffle(emulation::WarpOp::shuffle_up, mask, v, static_cast<int>(delta), width, here);
}
inline unsigned __ballot_sync(unsigned mask, int v, PATHRNN_HERE) {
  return static_cast<unsigned>(emulation::warp(emulation::WarpOp::ballot, mask, v != 0, 0, 32, here));
}
inline int __any_sync(unsigned mask, int v, PATHRNN_HERE) { return __ballot_sync(mask, v, here) != 0; }
inline int __all_sync(unsigned mask, int v, PATHRNN_HERE) { return __ballot_sync(mask, !v, here) == 0; }

template <typename V>
V __ldg(const V* p) {
  return *p;
}

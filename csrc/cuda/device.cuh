// What device code may use. Under nvcc this is CUDA; with PATHRNN_EMULATE a C++ compiler sees the same names through
// tests/emulation/cuda_emulation.h, which runs blocks of threads on the host. The only place with inline PTX.
//
//   threads   threadIdx, blockIdx, blockDim, gridDim; __launch_bounds__
//   block     __syncthreads, __syncthreads_or, __syncthreads_and, __syncthreads_count; reached by every thread of a
//             block from one place in the source. block_sync() is a __syncthreads that warps may reach from different
//             places, all lanes of a warp from the same one
//   warp      __shfl_sync, __shfl_xor_sync, __shfl_down_sync, __shfl_up_sync (32- and 64-bit values), __ballot_sync,
//             __any_sync, __all_sync, __syncwarp; warp_max(int) of all 32 lanes
//   cluster   on_rank(pointer, rank), cluster_sync(); rank and size are the kernel's own arithmetic on blockIdx
//   grid      group_sync(counter, blocks, round): a barrier of some blocks of a cooperative launch; load_published
//             reads what other blocks wrote before it; atomic_max on global memory, and atomic_max_bits, which takes
//             magnitude_bits: as integers those are ordered as magnitudes are, nan above all; mark(flag), which any
//             number of threads may do at once
//   shared    SharedMemory memory; Shared<T> a = memory.take<T>(n);  n entries, uninitialised, aligned to 16 bytes.
//             shared_bytes<T>(n) is what it takes. Shared<T> is T* to CUDA: a[i], a + i, load, store, atomic_max; no
//             references or plain pointers into it, and T(a[i]) where a type is deduced from it. T has a multiple of 4
//             bytes. No __shared__ variables.
//   vectors   Pack<T> v = load(pointer), store(pointer, v): 16 bytes, aligned; v.value[i], v.size
//   numbers   the functions of <math.h>, min, max, exponent_of, power_of_two, scaled
//
// No memory is allocated, no exception thrown, no standard container used.
#pragma once

#include <cstdint>

#ifdef PATHRNN_EMULATE
#include "cuda_emulation.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#endif

namespace pathrnn {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// 16 bytes, the widest load of a thread.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T value[size];
};

template <typename T>
__device__ Pack<T> load(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <typename T>
__device__ void store(T* p, const Pack<T>& v) {
  *reinterpret_cast<Pack<T>*>(p) = v;
}

// Bytes of shared memory that take<T>(n) uses.
template <typename T>
__host__ __device__ constexpr int64_t shared_bytes(int64_t n) {
  return (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

#ifdef PATHRNN_EMULATE

template <typename T>
using Shared = emulation::Shared<T>;

class SharedMemory {
 public:
  template <typename T>
  Shared<T> take(int64_t n) {
    const int64_t at = used_;
    used_ += shared_bytes<T>(n);
    return emulation::take<T>(at, n);
  }

 private:
  int64_t used_ = 0;
};

template <typename T>
Pack<T> load(Shared<T> p) {
  return p.template read<Pack<T>>();
}
template <typename T>
void store(Shared<T> p, const Pack<T>& v) {
  p.write(v);
}
inline void atomic_max(Shared<int> p, int v) { p.atomic_max(v); }
inline void atomic_max(int* p, int v) {
  emulation::atomically(p, [v](int now) { return max(now, v); });
}
inline int64_t magnitude_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & INT32_MAX;
}
inline int64_t magnitude_bits(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & INT64_MAX;
}
template <typename T>
void atomic_max_bits(T* p, int64_t bits) {
  emulation::atomically(p, [bits](T now) {
    if (magnitude_bits(now) < bits) memcpy(&now, &bits, sizeof now);
    return now;
  });
}

inline void mark(bool* flag) {
  emulation::atomically(flag, [](bool) { return true; });
}

inline void block_sync() { emulation::block_sync(false, {"block_sync", 0}); }
using emulation::cluster_sync;
using emulation::load_published;
using emulation::on_rank;
using emulation::warp_max;

inline void arrive(unsigned long long* counter) { emulation::add_one(counter, true); }
inline unsigned long long arrived(const unsigned long long* counter) { return emulation::look(counter, true); }

#else

template <typename T>
using Shared = T*;

class SharedMemory {
 public:
  template <typename T>
  __device__ T* take(int64_t n) {
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
    T* p = reinterpret_cast<T*>(dynamic_shared_memory + used_);
    used_ += static_cast<unsigned>(shared_bytes<T>(n));
    return p;
  }

 private:
  unsigned used_ = 0;
};

__device__ inline void block_sync() { asm volatile("bar.sync 0;" ::: "memory"); }
__device__ inline void atomic_max(int* p, int v) { atomicMax(p, v); }
__device__ inline int64_t magnitude_bits(float x) { return __float_as_int(x) & INT32_MAX; }
__device__ inline int64_t magnitude_bits(double x) { return __double_as_longlong(x) & INT64_MAX; }
__device__ inline void atomic_max_bits(float* p, int64_t bits) {
  atomicMax(reinterpret_cast<int*>(p), static_cast<int>(bits));
}
__device__ inline void atomic_max_bits(double* p, int64_t bits) {
  atomicMax(reinterpret_cast<long long*>(p), static_cast<long long>(bits));
}

__device__ inline int warp_max(int v) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, v);
#else
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = max(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
#endif
}

// The same place in the shared memory of another block of the cluster.
template <typename T>
__device__ T* on_rank(T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
  __trap();  // PTX of an older architecture, compiled for this one: there are no clusters in it
#endif
}

__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __trap();
#endif
}

__device__ inline void mark(bool* flag) { asm volatile("st.relaxed.gpu.global.u8 [%0], %1;" ::"l"(flag), "r"(1)); }

// Release and acquire at the scope of the device.
__device__ inline void arrive(unsigned long long* counter) {
  asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ inline unsigned long long arrived(const unsigned long long* counter) {
  unsigned long long count;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(count) : "l"(counter) : "memory");
  return count;
}

// From the level-2 cache, which all multiprocessors share.
template <typename T>
__device__ T load_published(const T* p) {
  return __ldcg(p);
}

#endif

// The barrier number `round` = 1, 2, … of a group of blocks that share a counter, zero at the start. What a block wrote
// before is seen by the others after.
__device__ inline void group_sync(unsigned long long* counter, unsigned blocks, unsigned long long round) {
  __syncthreads();
  if (threadIdx.x + threadIdx.y + threadIdx.z == 0) {
    arrive(counter);
    while (arrived(counter) < blocks * round) {
    }
  }
  __syncthreads();
}

// Numbers with exponents of their own: the row t of a sequence stands for rows[t] · 2^exponents[t].

// The exponent of a zero: below every other, yet two of them add up without overflow.
constexpr int64_t kZero = -(int64_t{1} << 40);

// The limits of a dtype, its bits of precision, and the exponent that the largest entry of a row is brought to.
template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr int centre = 30, min_exponent = -126, max_exponent = 127, digits = 24;
};
template <>
struct Format<double> {
  static constexpr int centre = 300, min_exponent = -1022, max_exponent = 1023, digits = 53;
};

// 2^e, for a normal result.
template <typename T>
__device__ T power_of_two(int e) {
#ifdef PATHRNN_EMULATE
  return ldexp(T(1), e);
#else
  if constexpr (sizeof(T) == sizeof(float)) return __int_as_float((e + 127) << 23);
  else return __hiloint2double((e + 1023) << 20, 0);
#endif
}

// x · 2^e, 0 where that is too small; in two steps, so that every result that is normal is exact.
template <typename T>
__device__ T scaled(T x, int64_t e) {
  constexpr int64_t most = 2 * Format<T>::max_exponent - 2;
  const int bounded = static_cast<int>(min(max(e, -most), most));
  const int half = bounded / 2;
  return x * power_of_two<T>(half) * power_of_two<T>(bounded - half);
}

// floor(log2 x) for 0 < x < inf, subnormal x included.
__device__ inline int exponent_of(float x) { return ilogbf(x); }
__device__ inline int exponent_of(double x) { return ilogb(x); }

// m: 2^-m brings a weight whose largest entry is given to [1, 2), or beside for the largest and the least of all, so that
// 2^-m is normal. 0 for a largest entry of 0, nan or infinity.
template <typename T>
__device__ int weight_exponent(T largest) {
  if (!(largest > T(0)) || isinf(largest)) return 0;
  return max(min(exponent_of(largest), -Format<T>::min_exponent), -Format<T>::max_exponent);
}

}  // namespace pathrnn

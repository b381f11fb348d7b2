// Sums over the steps of scaled rows: what κ is made of once the chains are known. Shapes and meaning of arguments:
// the schemas in bindings.cpp; the functions of the same names in tests/gpu_model.py say what is computed.
// Every sum is taken in an order that shapes and device alone decide, so repeats agree to the last bit.
#pragma once

#include "device.cuh"

namespace pathrnn {

// kZero for whatever exponent a zero has got by multiplication.
__device__ inline int64_t settled(int64_t exponent) { return exponent > kZero / 2 ? exponent : kZero; }

// The exponent that a sum on 2^top is handed out with: 0 if entries of about 2^usual are at home there, else such that
// they come out at about 1.
__device__ inline int64_t natural(int64_t top, int64_t usual) {
  constexpr int64_t most = 60;
  return top == kZero || (top + usual >= 0 && top + usual <= most) ? 0 : top + usual;
}

// The largest of all threads' values; scratch has an entry per warp.
__device__ inline int64_t block_max(int64_t v, Shared<int64_t> scratch) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = max(v, __shfl_xor_sync(kAllLanes, v, offset));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) v = max(v, static_cast<int64_t>(scratch[warp]));
  return v;
}

// ---- row_sums -------------------------------------------------------------------------------------------------------

constexpr int kSumThreads = 1024;

constexpr int64_t sum_rows_shared(int64_t size) {
  return shared_bytes<int64_t>(kSumThreads / kWarp) + kSumThreads * size;
}

// From 2^(digits + 2) least normal numbers on, what underflowed in a sum is less than its rounding.
template <typename T>
__device__ T faint() {
  return power_of_two<T>(Format<T>::min_exponent + Format<T>::digits + 2);
}

template <typename T>
struct RowSums {
  const T* rows;  // [count, width]
  const int64_t* exponents;  // [count] or null
  int64_t count, width;
  T* sum;
  int64_t* exponent;
};

// Σ_t rows[t] · 2^exponents[t] on a natural scale, or with null exponents Σ_t rows[t]. Block (x, y): columns 32 x … of
// sequence y, a lane each; its warps share the rows.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_rows(RowSums<T> first, RowSums<T> second, bool* lost) {
  const RowSums<T> a = blockIdx.y == 0 ? first : second;  // no reference: to be pointed to, both would lie on the stack
  SharedMemory memory;
  const Shared<int64_t> scratch = memory.take<int64_t>(kSumThreads / kWarp);
  const Shared<T> partial = memory.take<T>(kSumThreads);
  int64_t top = kZero, up = 0;
  if (a.exponents != nullptr) {
    for (int64_t t = threadIdx.x; t < a.count; t += kSumThreads) top = max(top, a.exponents[t]);
    top = block_max(top, scratch);
    const int64_t result = natural(top, Format<T>::centre);
    up = top - result;
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.exponent = result;
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  T total = 0;
  bool some = false;
  if (column < a.width) {
#pragma unroll 4
    for (int64_t t = warp; t < a.count; t += kSumThreads / kWarp) {
      const T x = a.rows[t * a.width + column];
      some |= x != T(0);
      total += a.exponents != nullptr ? scaled(x, a.exponents[t] - top) : x;
    }
  }
  // A part that is not zero and yet nothing, as all of it underflowed, is handed on as -0.
  partial[threadIdx.x] = some && total == T(0) ? -T(0) : total;
  __syncthreads();
  if (warp == 0 && column < a.width) {
    some = false;
    total = 0;
    for (int other = 0; other < kSumThreads / kWarp; ++other) {
      const T part = partial[other * kWarp + lane];
      some |= part != T(0) || signbit(part);
      total += part;
    }
    const T sum = scaled(total, up);
    if (some && (total < faint<T>() || sum < power_of_two<T>(Format<T>::min_exponent))) mark(lost);
    a.sum[column] = sum;
  }
}

// ---- pair_sums ------------------------------------------------------------------------------------------------------

constexpr int kPairThreads = 256, kPairSide = 16;  // threads of a block: 16 along j, 16 along k
// Steps that are held in shared memory at a time, fewer where a thread has more to do with each.
constexpr int pair_depth(int micro) { return 64 / micro; }

// 2^e, or e itself where that is below the normal numbers: x times it may yet meet something large.
template <typename T>
__device__ T pair_factor(int64_t e) {
  return e < Format<T>::min_exponent ? static_cast<T>(e) : power_of_two<T>(static_cast<int>(e));
}
template <typename T>
__device__ T times_factor(T x, T factor) {
  return factor < T(0) ? scaled(x, static_cast<int64_t>(factor)) : x * factor;
}

template <typename T>
struct PairSums {
  int64_t hidden, pairs;
  const T *d, *h;  // [pairs, hidden]
  const int64_t *d_exponents, *h_exponents;
  T* sums;  // [slices, H, H], to be added up
  int64_t* exponent;
  bool* lost;  // set where an entry has pairs and is yet too small

  __device__ int64_t pair_exponent(int64_t t) const { return settled(d_exponents[t] + h_exponents[t]); }
  // Whether entry (j, k) of the finished sum, on its natural scale, has lost what underflowed: numbers of d, to meet ones
  // of h, which are near their centre, 2^24 above it at most, whatever the sizes.
  __device__ bool loses(T sum, int64_t j, int64_t k) const {
    if (sum >= scaled(faint<T>(), Format<T>::centre + 24)) return false;
    int64_t top = kZero;
    T most = 1;
    bool some = false;
    for (int64_t t = 0; t < pairs; ++t) {
      const T early = h[t * hidden + k];
      top = max(top, pair_exponent(t));
      most = max(most, early);
      some |= d[t * hidden + j] != T(0) && early != T(0);
    }
    const T before = scaled(sum, natural(top, 2 * Format<T>::centre) - top);
    return some && (sum < power_of_two<T>(Format<T>::min_exponent) || before < 2 * faint<T>() * most);
  }
};

constexpr int64_t pair_tiles_shared(int64_t size, int micro) {
  return shared_bytes<int64_t>(kPairThreads / kWarp) + 4 * pair_depth(micro) * kPairSide * micro * size;
}

// A slice of the steps for a tile of Σ_t d hᵀ: block (x, y) has tile x and slice y. Each thread keeps kMicro x kMicro
// entries of the tile in registers; steps pass through shared memory, a few at a time, the next ones on their way while
// these are multiplied. Beyond the edge a tile repeats the last column.
template <typename T, int kMicro>
class PairTile {
 public:
  __device__ explicit PairTile(const PairSums<T>& p) : p_(p), hidden_(static_cast<int>(p.hidden)) {
    SharedMemory memory;
    const Shared<int64_t> scratch = memory.take<int64_t>(kPairThreads / kWarp);
    d_steps_ = memory.take<T>(2 * kDepth * kTile);
    h_steps_ = memory.take<T>(2 * kDepth * kTile);
    const unsigned tiles = (hidden_ + kTile - 1) / kTile;
    j0_ = static_cast<int>(blockIdx.x / tiles) * kTile;
    k0_ = static_cast<int>(blockIdx.x % tiles) * kTile;
    // A warp is 8 along j, whose entries of the weights lie side by side, by 4 along k.
    const int thread = threadIdx.x;
    along_j_ = thread % 8 + thread / kWarp % 2 * 8;
    along_k_ = thread / 8 % 4 + thread / (2 * kWarp) * 4;
    int64_t top = kZero;
    for (int64_t t = thread; t < p.pairs; t += kPairThreads) top = max(top, p.pair_exponent(t));
    top_ = block_max(top, scratch);
  }

  __device__ void run() {
    const int64_t stages = (p_.pairs + kDepth - 1) / kDepth;
    const int64_t first = stages * blockIdx.y / gridDim.y, last = stages * (blockIdx.y + 1) / gridDim.y;
    if (first < last) fetch(first * kDepth);
    for (int64_t stage = first; stage < last; ++stage) {
      const int buffer = stage % 2;
      put(buffer);
      __syncthreads();
      if (stage + 1 < last) fetch((stage + 1) * kDepth);
      multiply(buffer);
    }
    finish();
  }

 private:
  static constexpr int kTile = kPairSide * kMicro, kPack = Pack<T>::size;
  static constexpr int kDepth = pair_depth(kMicro);
  static constexpr int kRows = kPairThreads / kTile, kSweeps = kDepth / kRows;  // how threads share a load

  // The column of a thread's entry u: 16 bytes side by side, then those of the other threads.
  __device__ static int entry(int along, int u) { return u / kPack * (kPairSide * kPack) + along * kPack + u % kPack; }
  __device__ int j(int u) const { return j0_ + entry(along_j_, u); }
  __device__ int k(int v) const { return k0_ + entry(along_k_, v); }
  __device__ int within(int column) const { return min(column, hidden_ - 1); }

  __device__ void fetch(int64_t first) {
    const int column = threadIdx.x % kTile;
    const T* d = p_.d + within(j0_ + column);
    const T* h = p_.h + within(k0_ + column);
#pragma unroll
    for (int i = 0; i < kSweeps; ++i) {
      const int64_t step = first + threadIdx.x / kTile + i * kRows, t = min(step, p_.pairs - 1);
      d_next_[i] = d[t * p_.hidden];
      h_next_[i] = h[t * p_.hidden];
      factor_next_[i] = step != t ? T(0) : pair_factor<T>(p_.pair_exponent(t) - top_);
    }
  }

  __device__ void put(int buffer) {
#pragma unroll
    for (int i = 0; i < kSweeps; ++i) {
      const int at = buffer * kDepth * kTile + threadIdx.x + i * kRows * kTile;
      d_steps_[at] = times_factor(d_next_[i], factor_next_[i]);
      h_steps_[at] = h_next_[i];
    }
  }

  __device__ void multiply(int buffer) {
#pragma unroll
    for (int t = 0; t < kDepth; ++t) {
      const int at = (buffer * kDepth + t) * kTile;
      T d[kMicro], h[kMicro];
#pragma unroll
      for (int u = 0; u < kMicro; u += kPack) {
        const Pack<T> some_d = load(d_steps_ + at + entry(along_j_, u));
        const Pack<T> some_h = load(h_steps_ + at + entry(along_k_, u));
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          d[u + i] = some_d.value[i];
          h[u + i] = some_h.value[i];
        }
      }
#pragma unroll
      for (int u = 0; u < kMicro; ++u) {
#pragma unroll
        for (int v = 0; v < kMicro; ++v) sums_[u][v] = fma(d[u], h[v], sums_[u][v]);
      }
    }
  }

  __device__ void finish() {
    T* sums = p_.sums + blockIdx.y * p_.hidden * p_.hidden;
    const int64_t exponent = natural(top_, 2 * Format<T>::centre);
#pragma unroll
    for (int u = 0; u < kMicro; ++u) {
#pragma unroll
      for (int v = 0; v < kMicro; ++v) {
        if (j(u) >= hidden_ || k(v) >= hidden_) continue;
        const T sum = scaled(sums_[u][v], top_ - exponent);
        if (gridDim.y == 1 && p_.loses(sum, j(u), k(v))) mark(p_.lost);
        sums[j(u) * p_.hidden + k(v)] = sum;
      }
    }
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *p_.exponent = exponent;
  }

  const PairSums<T>& p_;
  const int hidden_;
  Shared<T> d_steps_, h_steps_;  // [2, kDepth, kTile]
  int j0_, k0_, along_j_, along_k_;
  int64_t top_;
  T sums_[kMicro][kMicro] = {};
  T d_next_[kSweeps], h_next_[kSweeps], factor_next_[kSweeps];
};

template <typename T, int kMicro>
__global__ void __launch_bounds__(kPairThreads) sum_pairs(PairSums<T> p) {
  PairTile<T, kMicro>(p).run();
}

// The slices of every entry, one after the other.
template <typename T>
__global__ void __launch_bounds__(kPairThreads) add_slices(PairSums<T> p, int64_t slices, T* result) {
  const int64_t count = p.hidden * p.hidden, n = int64_t{blockIdx.x} * kPairThreads + threadIdx.x;
  if (n >= count) return;
  T sum = 0;
#pragma unroll 8
  for (int64_t slice = 0; slice < slices; ++slice) sum += p.sums[slice * count + n];
  result[n] = sum;
  if (p.loses(sum, n / p.hidden, n % p.hidden)) mark(p.lost);
}

}  // namespace pathrnn

// Canonical coordinates of the squared network: the exponents of what reaches every unit and of what it reaches, and the
// weights rescaled by them. Shapes and meaning of the arguments: the schemas in bindings.cpp; the functions of the same
// names in tests/gpu_model.py say what is computed. Exponents are sums and maxima of integers: in any order, the same.
#pragma once

#include "device.cuh"

namespace pathrnn {

// The exponent of a unit that nothing reaches.
constexpr int kNone = -(1 << 30);

// 2 floor(log2 |w|), kNone for a zero. Of infinity and nan a number that serves as well as any: they are told elsewhere.
template <typename T>
__device__ int square_exponent(T w) {
  if (w == T(0)) return kNone;
  return isfinite(w) ? 2 * exponent_of(w < T(0) ? -w : w) : 2 * Format<T>::max_exponent;
}

// The exponent of what comes through a weight.
__device__ inline int through(int exponent, int source) {
  return exponent == kNone || source == kNone ? kNone : exponent + source;
}

// ---- maxima ---------------------------------------------------------------------------------------------------------

constexpr int kMaximaThreads = 1024;

template <typename T>
struct Maxima {
  // By rows: [R, N], a source for every column, a result for every row; by columns: the other way round. Sources may be
  // null: zeros.
  const T *by_row, *by_column;
  const int *row_source, *column_source;
  int64_t rows[2], columns[2];
  unsigned row_blocks;
  int *row_maxima, *column_maxima;
};

// First blocks with a warp a row, then blocks with a lane a column.
template <typename T>
__global__ void __launch_bounds__(kMaximaThreads) find_maxima(Maxima<T> a) {
  SharedMemory memory;
  const Shared<int> partial = memory.take<int>(kMaximaThreads);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  constexpr int warps = kMaximaThreads / kWarp;
  if (blockIdx.x < a.row_blocks) {
    const int64_t row = int64_t{blockIdx.x} * warps + warp, columns = a.columns[0];
    if (row >= a.rows[0]) return;
    int most = kNone;
#pragma unroll 4
    for (int64_t n = lane; n < columns; n += kWarp) {
      const int source = a.row_source != nullptr ? a.row_source[n] : 0;
      most = max(most, through(square_exponent(a.by_row[row * columns + n]), source));
    }
    most = warp_max(most);
    if (lane == 0) a.row_maxima[row] = most;
    return;
  }
  const int64_t columns = a.columns[1], column = int64_t{blockIdx.x - a.row_blocks} * kWarp + lane;
  int most = kNone;
  if (column < columns) {
#pragma unroll 8
    for (int64_t r = warp; r < a.rows[1]; r += warps) {
      const int source = a.column_source != nullptr ? a.column_source[r] : 0;
      most = max(most, through(square_exponent(a.by_column[r * columns + column]), source));
    }
  }
  partial[threadIdx.x] = most;
  __syncthreads();
  if (warp == 0 && column < columns) {
    for (int other = 1; other < warps; ++other) most = max(most, static_cast<int>(partial[other * kWarp + lane]));
    a.column_maxima[column] = most;
  }
}

// ---- reach ----------------------------------------------------------------------------------------------------------

constexpr int kReachThreads = 1024;

template <typename T>
struct Reach {
  const T* weight[2];  // [n, H, H], of h and of δ
  const int* start[2];  // [n, H]
  const T* bias[2];     // [n, H] or null: of h alone
  int* found[2];        // [n, H]
  int* next;            // [2 n, H]: what a round finds, before all have seen what was there
  int64_t chains, hidden;
};

// Block i: one chain's h, or its δ. Where all units are reached from the start, W_hh is not read. A grid constant's arrays
// are indexed where they lie; of another argument every thread would keep a copy on its stack.
template <typename T>
__global__ void __launch_bounds__(kReachThreads, 1) find_reach(const __grid_constant__ Reach<T> a) {
  const int side = blockIdx.x < a.chains ? 0 : 1;
  const int64_t H = a.hidden, chain = blockIdx.x % a.chains;
  const T* const weight = a.weight[side] + chain * H * H;
  int* const found = a.found[side] + chain * H;
  int* const next = a.next + blockIdx.x * H;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  bool missing = false;
  for (int64_t j = threadIdx.x; j < H; j += kReachThreads) {
    int start = a.start[side][chain * H + j];
    for (int i = 0; i < 2 && side == 0; ++i) {
      if (a.bias[i] != nullptr) start = max(start, square_exponent(a.bias[i][chain * H + j]));
    }
    found[j] = start;
    missing |= start == kNone;
  }
  bool more = __syncthreads_or(missing) != 0;
  while (more) {
    bool newly = false;
    if (side == 0) {
      for (int64_t j = warp; j < H; j += kReachThreads / kWarp) {
        if (found[j] != kNone) continue;
        int most = kNone;
        for (int64_t k = lane; k < H; k += kWarp) most = max(most, through(square_exponent(weight[j * H + k]), found[k]));
        most = warp_max(most);
        if (lane == 0) next[j] = most;
        newly |= most != kNone;
      }
    } else {
      for (int64_t k = threadIdx.x; k < H; k += kReachThreads) {
        if (found[k] != kNone) continue;
        int most = kNone;
        for (int64_t j = 0; j < H; ++j) most = max(most, through(square_exponent(weight[j * H + k]), found[j]));
        next[k] = most;
        newly |= most != kNone;
      }
    }
    more = __syncthreads_or(newly) != 0;
    if (!more) break;
    missing = false;
    for (int64_t j = threadIdx.x; j < H; j += kReachThreads) {
      if (found[j] == kNone) found[j] = next[j];
      missing |= found[j] == kNone;
    }
    more = __syncthreads_or(missing) != 0;
  }
}

// ---- canonical_ -----------------------------------------------------------------------------------------------------

constexpr int kCanonicalThreads = 256, kCanonicalTile = 8 * kCanonicalThreads;  // entries of a block

template <typename T>
struct Canonical {
  T* flat;  // every weight, end to end: tests/gpu_model.py says in which order
  const int *f, *g;  // [C, H]
  int64_t chains, directions, hidden, inputs, outputs, head_bias, vocabulary;
  bool bias, balanced;
  int64_t* units;   // [C, H]
  T* largest;       // of every weight, zeros at first
  bool* lost;
};

// d, even.
__device__ inline int unit_exponent(int f, int g) {
  if (f == kNone) return g == kNone ? 0 : -g;
  if (g == kNone) return f;
  return ((f - g) >> 2) * 2;  // rounded down
}

// Where a weight lies in `flat`, its shape, and the first of the units in f and g of its rows and columns, or -1.
struct Place {
  int64_t at, rows, columns, target = -1, source = -1;
};

// Of weight y.
template <typename T>
__device__ Place place_of(const Canonical<T>& a, int64_t y) {
  const int64_t C = a.chains, D = a.directions, H = a.hidden, wide = D * H;
  const int64_t all_ih = D * H * a.inputs + (C - D) * H * wide, all_hh = C * H * H;
  if (y < D) return {y * H * a.inputs, H, a.inputs, y * H};
  if (y < C) return {D * H * a.inputs + (y - D) * H * wide, H, wide, y * H, (y / D - 1) * wide};
  y -= C;
  if (y < C) return {all_ih + y * H * H, H, H, y * H, y * H};
  y -= C;
  const int64_t biases = a.bias ? 2 * C : 0;
  int64_t at = all_ih + all_hh;
  if (y < biases) return {at + y * H, H, 1, y % C * H};
  at += biases * H;
  y -= biases;
  const bool head = a.outputs > 0;
  if (head && y == 0) return {at, a.outputs, wide, -1, (C - D) * H};
  at += a.outputs * wide;
  if (a.head_bias > 0 && y == (head ? 1 : 0)) return {at, a.head_bias, 1};
  return {at + a.head_bias, a.vocabulary, a.inputs};
}

// Block (x, y): tile x of weight y.
template <typename T>
__global__ void __launch_bounds__(kCanonicalThreads) make_canonical(Canonical<T> a) {
  const auto [at, rows, columns, target, source] = place_of(a, blockIdx.y);
  const int64_t tile = int64_t{blockIdx.x} * kCanonicalTile, count = rows * columns;
  if (blockIdx.y == 0) {
    for (int64_t n = tile + threadIdx.x; n < min(tile + kCanonicalTile, a.chains * a.hidden); n += kCanonicalThreads) {
      a.units[n] = a.balanced ? unit_exponent(a.f[n], a.g[n]) : 0;
    }
  }
  if (tile >= count) return;
  bool lost = false;
  int64_t most = 0;  // by their bits magnitudes are ordered, nan above all
  for (int64_t n = tile + threadIdx.x; n < min(tile + kCanonicalTile, count); n += kCanonicalThreads) {
    const int64_t row = n / columns, column = n - row * columns;
    const T w = a.flat[at + n];
    T found = w;
    if (a.balanced && (target >= 0 || source >= 0)) {
      const int f = source >= 0 ? a.f[source + column] : 0, g = target >= 0 ? a.g[target + row] : 0;
      const int of = source >= 0 ? unit_exponent(f, a.g[source + column]) : 0;
      const int to = target >= 0 ? unit_exponent(a.f[target + row], g) : 0;
      const bool idle = target >= 0 && source >= 0 && f == kNone && g == kNone;
      const int shift = (of - to) / 2;
      found = idle ? T(0) : scaled(w, shift);
      if (w != T(0) && !idle && isfinite(w)) {
        const T size = found < T(0) ? -found : found;
        constexpr int most_shift = 2 * Format<T>::max_exponent - 2;  // of `scaled`
        if (shift > most_shift || shift < -most_shift || !(size >= power_of_two<T>(Format<T>::min_exponent))) lost = true;
        if (!isfinite(found)) {
          lost = true;
          found = w < T(0) ? -power_of_two<T>(Format<T>::max_exponent) : power_of_two<T>(Format<T>::max_exponent);
        }
      }
      a.flat[at + n] = found;
    }
    most = max(most, magnitude_bits(found));
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, offset));
  if (threadIdx.x % kWarp == 0) atomic_max_bits(a.largest + blockIdx.y, most);
  if (lost) mark(a.lost);
}

}  // namespace pathrnn

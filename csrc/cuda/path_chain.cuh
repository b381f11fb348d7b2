// Column sums and both ends of the squared network, and its norm; its chains are in chains.cuh. Shapes and meaning of the
// arguments: the schemas in bindings.cpp; the functions of the same names in tests/gpu_model.py say what is computed.
// A weight enters as w̃ = (w · 2^-m)², m = weight_exponent of its largest magnitude; the true square is that times 2^(2m).
#pragma once

#include "device.cuh"

namespace pathrnn {

template <typename T>
__device__ T least_normal() {
  return power_of_two<T>(Format<T>::min_exponent);
}

// Whether a term that should not be zero has lost digits by underflow, and its sum shows it: from 2^(digits + 2) least
// normal numbers on, what subnormal terms have lost is less than the sum's own rounding.
template <typename T>
__device__ bool fades(bool given, T term, T sum) {
  return given && term < least_normal<T>() && sum < power_of_two<T>(Format<T>::min_exponent + Format<T>::digits + 2);
}

// Brings a weight's entries to at most [1, 2) and squares them.
template <typename T>
class Squares {
 public:
  __device__ explicit Squares(const T* largest)
      : scale_(power_of_two<T>(-weight_exponent(*largest))),
        exponent_(*largest == T(0) ? kZero : 2 * weight_exponent(*largest)) {}
  __device__ T operator()(T w) const {
    w *= scale_;
    return w * w;
  }
  // Also says whether the square of an entry that is not zero has left the normal numbers.
  __device__ T operator()(T w, bool& lost) const {
    const T squared = (*this)(w);
    if (w != T(0) && squared < least_normal<T>()) lost = true;
    return squared;
  }
  // Of the squares; kZero where all are zero.
  __device__ int64_t exponent() const { return exponent_; }

 private:
  T scale_;
  int64_t exponent_;
};

template <typename T>
__device__ T warp_sum(T v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// ---- column_sums ----------------------------------------------------------------------------------------------------

constexpr int kColumnThreads = 1024;
constexpr int kColumns = 8;  // of a block: their entries of a row fill a sector of memory
constexpr int kColumnRows = kColumnThreads / kColumns;

constexpr int64_t column_shared(int64_t size) { return kColumnThreads / kWarp * kColumns * size; }

// Σ_r value(w[r, column]) over every `shares`-th batch of kColumnRows rows; the sum is in the threads below kColumns.
template <typename T, typename Value>
__device__ T sum_column(const T* w, int64_t rows, int64_t columns, int64_t column, int64_t share, int64_t shares,
                        Value value) {
  SharedMemory memory;
  const Shared<T> partial = memory.take<T>(kColumnThreads / kWarp * kColumns);
  T sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t r = share * kColumnRows + threadIdx.x / kColumns; r < rows; r += shares * kColumnRows) {
      sum += value(w[r * columns + column]);
    }
  }
  for (int offset = kWarp / 2; offset >= kColumns; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threadIdx.x % kWarp < kColumns) partial[threadIdx.x / kWarp * kColumns + threadIdx.x % kWarp] = sum;
  __syncthreads();
  if (threadIdx.x < kColumns) {
    for (int warp = 1; warp < kColumnThreads / kWarp; ++warp) sum += partial[warp * kColumns + threadIdx.x];
  }
  return sum;
}

// Block (x, y): kColumns columns, share y of the rows. With a weight's largest entry Σ_r w̃[r, n] and the exponent;
// without, Σ_r w[r, n]. sums: [gridDim.y, columns].
template <typename T>
__global__ void __launch_bounds__(kColumnThreads)
    sum_columns(const T* w, const T* largest, int64_t rows, int64_t columns, T* sums, int64_t* exponent, bool* lost) {
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x % kColumns;
  bool faded = false;
  T sum;
  if (largest != nullptr) {
    const Squares<T> square(largest);
    sum = sum_column(w, rows, columns, column, blockIdx.y, gridDim.y, [&](T v) { return square(v, faded); });
    if (blockIdx.x + blockIdx.y + threadIdx.x == 0) *exponent = square.exponent();
  } else {
    sum = sum_column(w, rows, columns, column, blockIdx.y, gridDim.y, [](T v) { return v; });
  }
  if (threadIdx.x < kColumns && column < columns) sums[blockIdx.y * columns + column] = sum;
  if (faded) mark(lost);
}

// ---- ends -----------------------------------------------------------------------------------------------------------

// The squared column sums of a tensor of the head; without the tensor, `absent` in every column, on its exponent.
template <typename T>
struct HeadSums {
  const T *w, *largest;  // [rows, columns] or null
  int64_t rows, columns;
  T absent;
  int64_t absent_exponent;
  T* sums;
  int64_t* exponent;
};

constexpr int kEndLayers = 64;  // of one launch

template <typename T>
struct Ends {
  int64_t hidden, inputs;
  int layers;                   // of this launch
  const T *weight, *largest;    // weight_ih of the network's first layer; null in later launches
  const T* input;               // [I] or null: ones
  const int64_t* input_exponent;
  const T* bias[2][kEndLayers];  // ih and hh: [H], or null
  const T* largest_bias[2];      // [layers]
  T* drive;                      // [layers, H]
  int64_t* drive_exponents;
  HeadSums<T> head, head_bias;
  unsigned drive_blocks, head_blocks;  // then one of head_bias
  bool* lost;
};

// Drives and head come near 2^centre, as the chains keep what they make of them.

// The n-th entry of the drives, by a warp; returns whether something was lost.
template <typename T>
__device__ bool drive_entry(const Ends<T>& a, int64_t n) {
  const int lane = threadIdx.x % kWarp;
  const int64_t layer = n / a.hidden, j = n % a.hidden;
  if (layer >= a.layers) return false;
  bool lost = false, faded = false;
  T part[3] = {};
  int64_t exponent[3] = {kZero, kZero, kZero};
  if (layer == 0 && a.weight != nullptr) {
    const Squares<T> square(a.largest);
    T sum = 0;
#pragma unroll 4
    for (int64_t k = lane; k < a.inputs; k += kWarp) {
      const T x = a.input != nullptr ? a.input[k] : T(1), squared = square(a.weight[j * a.inputs + k], lost);
      const T term = squared * x;
      if (squared != T(0) && x != T(0) && term < least_normal<T>()) faded = true;
      sum += term;
    }
    part[0] = warp_sum(sum);
    exponent[0] = square.exponent() + (a.input != nullptr ? *a.input_exponent : 0);
  }
  for (int i = 0; i < 2; ++i) {
    if (a.bias[i][layer] == nullptr) continue;
    const Squares<T> square(a.largest_bias[i] + layer);
    part[1 + i] = square(a.bias[i][layer][j], lost);
    exponent[1 + i] = square.exponent();
  }
  const int64_t top = max(exponent[0], max(exponent[1], exponent[2]));
  T scaled_part[3], sum = 0;
  for (int i = 0; i < 3; ++i) sum += scaled_part[i] = scaled(part[i], exponent[i] - top);
  for (int i = 0; i < 3; ++i) lost |= fades(part[i] != T(0), scaled_part[i], sum);
  lost |= fades(faded, T(0), sum);
  if (lane == 0) {
    a.drive[layer * a.hidden + j] = sum * power_of_two<T>(Format<T>::centre);
    if (j == 0) a.drive_exponents[layer] = top > kZero / 2 ? top - Format<T>::centre : kZero;
  }
  return lost;
}

template <typename T>
__device__ bool sum_head(const HeadSums<T>& a, int64_t block, int up) {
  const int64_t column = block * kColumns + threadIdx.x % kColumns;
  const bool stores = threadIdx.x < kColumns && column < a.columns;
  bool lost = false;
  if (a.w == nullptr) {
    if (stores) a.sums[column] = a.absent * power_of_two<T>(up);
    if (block == 0 && threadIdx.x == 0) *a.exponent = a.absent_exponent - up;
    return lost;
  }
  const Squares<T> square(a.largest);
  const T sum = sum_column(a.w, a.rows, a.columns, column, 0, 1, [&](T v) { return square(v, lost); });
  if (stores) a.sums[column] = sum * power_of_two<T>(up);
  if (block == 0 && threadIdx.x == 0) *a.exponent = square.exponent() - up;
  return lost;
}

template <typename T>
__global__ void __launch_bounds__(kColumnThreads, 1) sum_ends(Ends<T> a) {
  const unsigned block = blockIdx.x;
  bool lost;
  if (block < a.drive_blocks) {
    lost = drive_entry(a, int64_t{block} * (kColumnThreads / kWarp) + threadIdx.x / kWarp);
  } else {
    const bool of_weight = block < a.drive_blocks + a.head_blocks;
    lost = of_weight ? sum_head(a.head, block - a.drive_blocks, Format<T>::centre) : sum_head(a.head_bias, 0, 0);
  }
  if (lost) mark(a.lost);
}

// ---- finish ---------------------------------------------------------------------------------------------------------

constexpr int kFinishThreads = 256;

template <typename T>
struct Finish {
  int64_t hidden, steps, count;
  const T *outputs, *head, *head_bias;  // [H], [H], [1]
  const int64_t *outputs_exponent, *head_exponent, *head_bias_exponent;
  const T* largest;  // [count]
  const bool* lost;
  double* log_norm;      // nan where a weight is not finite or something is lost
  T* bias;               // [1]: steps
  int8_t* arithmetic;    // -1 where something is lost
};

// log x · 2^exponent.
__device__ inline double log_scaled(double x, int64_t exponent) {
  constexpr double ln_2 = 0.6931471805599453;
  int own;
  const double fraction = frexp(x, &own);
  return log(fraction) + static_cast<double>(own + exponent) * ln_2;
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_norm(Finish<T> a) {
  SharedMemory memory;
  const Shared<double> partial = memory.take<double>(kFinishThreads / kWarp);
  double dot = 0;
  int meet = 0;
  for (int64_t j = threadIdx.x; j < a.hidden; j += kFinishThreads) {
    dot += static_cast<double>(a.outputs[j]) * static_cast<double>(a.head[j]);
    meet |= a.outputs[j] != T(0) && a.head[j] != T(0) ? 1 : 0;
  }
  int finite = 1;
  for (int64_t i = threadIdx.x; i < a.count; i += kFinishThreads) finite &= isfinite(a.largest[i]) ? 1 : 0;
  dot = warp_sum(dot);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = dot;
  finite = __syncthreads_and(finite);
  meet = __syncthreads_or(meet);
  if (threadIdx.x > 0) return;
  *a.bias = static_cast<T>(a.steps);
  for (int warp = 1; warp < kFinishThreads / kWarp; ++warp) dot += partial[warp];
  // Products of float64 may underflow; those of float32 do not.
  const bool lost = *a.lost || fades(meet != 0, 0.0, dot);
  *a.arithmetic = lost ? -1 : 0;
  const double paths = log_scaled(dot, *a.outputs_exponent + *a.head_exponent);
  const double biases = static_cast<double>(*a.head_bias) * static_cast<double>(a.steps);
  const double bias = log_scaled(biases, *a.head_bias_exponent);
  const double more = paths > bias ? paths : bias, less = paths > bias ? bias : paths;
  *a.log_norm = finite == 0 || lost ? static_cast<double>(NAN) : isinf(more) ? more : more + log1p(exp(less - more));
}

}  // namespace pathrnn

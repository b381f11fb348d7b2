// Column sums, both ends and the two chains h and δ of the squared network, and its norm. Shapes and meaning of the
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
  for (int64_t j = threadIdx.x; j < a.hidden; j += kFinishThreads) {
    dot += static_cast<double>(a.outputs[j]) * static_cast<double>(a.head[j]);
  }
  int finite = 1;
  for (int64_t i = threadIdx.x; i < a.count; i += kFinishThreads) finite &= isfinite(a.largest[i]) ? 1 : 0;
  dot = warp_sum(dot);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = dot;
  finite = __syncthreads_and(finite);
  if (threadIdx.x > 0) return;
  *a.bias = static_cast<T>(a.steps);
  *a.arithmetic = *a.lost ? -1 : 0;
  for (int warp = 1; warp < kFinishThreads / kWarp; ++warp) dot += partial[warp];
  const double paths = log_scaled(dot, *a.outputs_exponent + *a.head_exponent);
  const double biases = static_cast<double>(*a.head_bias) * static_cast<double>(a.steps);
  const double bias = log_scaled(biases, *a.head_bias_exponent);
  const double more = paths > bias ? paths : bias, less = paths > bias ? bias : paths;
  *a.log_norm = finite == 0 || *a.lost ? static_cast<double>(NAN) : isinf(more) ? more : more + log1p(exp(less - more));
}

// ---- chains ---------------------------------------------------------------------------------------------------------

constexpr int kChainThreads = 512;  // of more, a thread has too few registers
constexpr int kTile = 2;            // rows that a thread works on at a time, which share what it reads of y

// How a block holds its slice of W̃ and hands on its part of a row.
enum class ChainPlan {
  block,    // one block, all of W̃ in its shared memory
  cluster,  // a cluster, whose blocks write into each other's shared memory
  grid      // blocks all over the device meet in global memory; rows of W̃ beyond shared memory are read in every step
};

// y_s = M y_{s-1} + drive_s for s = 1 … seq_len, M = W̃ or W̃ᵀ.
template <typename T>
struct Chain {
  const T* weight;  // [H, H]
  const T* largest;
  bool transposed;
  bool starts_with_ones;  // y_0 = 1 instead of 0
  bool keeps_start;       // y_0 is a result, too
  // Step s is driven by row drive_first + s · drive_step; with driven_once only step 1 is.
  const T* drive;
  const int64_t* drive_exponents;
  int64_t drive_first, drive_step;
  bool driven_once;
  // y_s is row first + s · step of the results.
  T* rows;
  int64_t* exponents;
  int64_t first, step;
};

template <typename T>
struct Chains {
  Chain<T> chain[2];
  int seq_len;
  int hidden;    // of which two rows fit into shared memory
  int blocks;    // of each chain
  int slice;     // rows of M that a block has
  int resident;  // of them, in shared memory
  int stride;    // entries from one of those to the next
  int lanes;     // threads that share a row
  bool packs;    // whether rows of the weights are aligned to 16 bytes
  bool* lost;
  unsigned long long* arrived;  // plan grid: per chain
  int* extremes;                // plan grid: per chain and step as in `Extremes`, zero at the start
};

// What blocks tell each other of a row beside its entries: maxima of integers, in which zero stands for nothing.
struct Extremes {
  static constexpr int count = 4, bias = 1 << 14;
  int top;      // exponent of the largest entry + bias
  int low;      // bias - exponent of the least entry that is not zero
  int changed;  // whether an entry or the exponent differs from the row before
  int drive;    // of the next step: exponent of its largest entry + bias
};

template <typename T>
int64_t chain_shared_bytes(int64_t resident, int64_t stride) {
  return shared_bytes<T>(resident * stride) + shared_bytes<T>(2 * stride) + shared_bytes<int>(3 * Extremes::count) +
         2 * shared_bytes<int>(1);
}

// A group of lanes shares a row of M. Eight lanes of 16 bytes read all banks of shared memory once, so fewer would gain
// nothing, and three shuffles end a sum; more lanes where a block has threads for them.
// A row is not renormalised before it is handed on, as that would take a barrier of its own: its readers scale what they
// make of it so that its largest entry counts as 2^centre. Per step one barrier between blocks: buffers of y alternate,
// and of the extremes' three slots one is read, one written and one cleared.
template <typename T, ChainPlan plan>
__global__ void __launch_bounds__(kChainThreads, 1) run_chains(Chains<T> a) {
  const int H = a.hidden, stride = a.stride;
  SharedMemory memory;
  const Shared<T> m = memory.take<T>(int64_t{a.resident} * stride);
  const Shared<T> buffers = memory.take<T>(2 * stride);
  const Shared<int> slots = memory.take<int>(3 * Extremes::count);
  const Shared<int> least_slot = memory.take<int>(1), drive_slot = memory.take<int>(1);

  const int which = blockIdx.x / a.blocks, rank = blockIdx.x % a.blocks;
  const Chain<T>& c = a.chain[which];
  const int first = static_cast<int>(min(int64_t{rank} * a.slice, int64_t{H}));
  const int rows = min(a.slice, H - first), resident = min(rows, a.resident);
  const int thread = threadIdx.x, threads = blockDim.x;
  const int lane = thread % a.lanes, group = thread / a.lanes, groups = threads / a.lanes;
  const int warp_lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const bool writes_exponents = rank == 0 && thread == 0;
  const int ranks = plan == ChainPlan::cluster ? a.blocks : 1;  // whose shared memory this block writes into
  const auto of_rank = [&](auto p, int r) {
    if constexpr (plan == ChainPlan::cluster) return on_rank(p, r);
    else return p;
  };
  const auto wait = [&] {
    if constexpr (plan == ChainPlan::cluster) cluster_sync();
    else __syncthreads();
  };

  const T start = c.starts_with_ones ? T(1) : T(0);
  for (int k = thread; k < 2 * stride; k += threads) buffers[k] = k % stride < H ? start : T(0);
  if (thread < 3 * Extremes::count) slots[thread] = 0;
  if (thread == 0) {
    *least_slot = -Extremes::bias;
    *drive_slot = 0;
  }
  if (c.keeps_start) {
    for (int i = thread; i < rows; i += threads) c.rows[first + i] = start;
    if (writes_exponents) c.exponents[0] = c.starts_with_ones ? 0 : kZero;
  }
  __syncthreads();

  // The slice of M, and its least entry that is not zero.
  const Squares<T> square(c.largest);
  T least = INFINITY;
  const auto entry = [&](int i, int k) {
    const T w = c.weight[c.transposed ? int64_t{k} * H + first + i : int64_t{first + i} * H + k], squared = square(w);
    if (w != T(0)) least = min(least, squared);
    return squared;
  };
  const int columns = (H + Pack<T>::size - 1) / Pack<T>::size * Pack<T>::size;
  if (c.transposed) {
    // A warp takes 8 neighbours of a row of W, of 4 rows: whole sectors of memory, and every bank once if the stride is
    // an odd multiple of 16 bytes.
    const int tiles_i = (resident + 7) / 8, tiles = tiles_i * ((columns + 3) / 4);
#pragma unroll 4
    for (int tile = warp; tile < tiles; tile += warps) {
      const int i = tile % tiles_i * 8 + warp_lane % 8, k = tile / tiles_i * 4 + warp_lane / 8;
      if (i < resident && k < columns) m[i * stride + k] = k < H ? entry(i, k) : T(0);
    }
  } else {
    for (int i = warp; i < rows; i += warps) {
#pragma unroll 4
      for (int k = warp_lane; k < columns; k += kWarp) {
        const T squared = k < H ? entry(i, k) : T(0);
        if (i < resident) m[i * stride + k] = squared;
      }
    }
  }
  bool lost = least < least_normal<T>();
  const int my_least = lost ? -Format<T>::min_exponent : least < T(INFINITY) ? -exponent_of(least) : -Extremes::bias;
  const int warp_least = warp_max(my_least);
  // The largest of a thread's share of entries [from, to) of the drive of step s. Mostly one load, which nothing waits
  // for before the result is used.
  const auto most_driven = [&](int64_t s, int from, int to) {
    const T* const row = c.drive + (c.drive_first + s * c.drive_step) * H;
    T most = from + thread < to ? row[from + thread] : T(0);
    for (int k = from + thread + threads; k < to; k += threads) most = max(most, row[k]);
    return most;
  };
  const auto drive_extreme = [](T most) {
    return most > T(0) ? Extremes::bias + min(exponent_of(most), Format<T>::max_exponent) : 0;
  };
  const int first_drive = warp_max(drive_extreme(most_driven(1, 0, H)));
  if (warp_lane == 0) {
    atomic_max(least_slot, warp_least);
    atomic_max(drive_slot, first_drive);
  }
  wait();
  // How far, at least, a product with 1 is above the least normal number.
  const int margin = -*least_slot - Format<T>::min_exponent;

  const int start_top = c.starts_with_ones ? Extremes::bias : 0;
  Extremes row{start_top, start_top, 1, *drive_slot};
  int64_t row_exponent = c.starts_with_ones ? 0 : kZero;
  int64_t drive_exponent = c.drive_exponents[c.drive_first + c.drive_step];
  T next_driven = a.seq_len > 1 ? most_driven(2, first, first + rows) : T(0);
  for (int s = 1; s <= a.seq_len; ++s) {
    const Shared<T> y = buffers + (s - 1) % 2 * stride, next = buffers + s % 2 * stride;
    const Shared<int> slot = slots + s % 3 * Extremes::count;
    if (thread < Extremes::count) slots[(s + 1) % 3 * Extremes::count + thread] = 0;

    // The exponents of both parts and of their sum, and the powers that bring either to it.
    const bool driven = row.drive > 0, propagates = row.top > 0 && square.exponent() != kZero;
    const int64_t shift = propagates ? Format<T>::centre - (row.top - Extremes::bias) : 0;
    const int64_t propagated = propagates ? row_exponent - shift + square.exponent() : kZero;
    const int64_t drive_shift = Format<T>::centre - (row.drive - Extremes::bias);
    const int64_t exponent = max(propagated, driven ? drive_exponent - drive_shift : kZero);
    const int64_t up = shift + propagated - exponent, drive_up = drive_exponent - exponent;
    if (propagates && Extremes::bias - row.low + margin < 0) lost = true;

    T* const result = c.rows + (c.first + s * c.step) * H + first;
    const T* const drive = c.drive + (c.drive_first + s * c.drive_step) * H + first;
    Extremes mine{0, 0, 0, 0};
    // From a lane's share of the sum of row i to the entry of y_s.
    const auto finish = [&](int i, T sum, T drive_entry) {
      for (int offset = a.lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      if (i >= rows) return;
      const T from_drive = scaled(drive_entry, drive_up), from_row = scaled(sum, up), value = from_row + from_drive;
      if (fades(sum != T(0), from_row, value) || fades(drive_entry != T(0), from_drive, value)) lost = true;
      if (value > T(0)) {
        const int e = min(exponent_of(value), Format<T>::max_exponent);
        mine.top = max(mine.top, Extremes::bias + e);
        mine.low = max(mine.low, Extremes::bias - e);
      }
      if (!(value == y[first + i]) || exponent != row_exponent) mine.changed = 1;
      if (lane == 0) result[i] = value;
      if constexpr (plan != ChainPlan::grid) {
        for (int r = lane; r < ranks; r += a.lanes) of_rank(next, r)[first + i] = value;
      }
    };
    for (int base = 0; base < resident; base += kTile * groups) {
      int i[kTile];
      T drive_entry[kTile], sums[kTile] = {};
      for (int x = 0; x < kTile; ++x) {
        i[x] = base + x * groups + group;
        if (i[x] >= resident) i[x] = rows;
        drive_entry[x] = driven && i[x] < rows ? drive[i[x]] : T(0);
      }
      if (propagates) {
#pragma unroll 2
        for (int k = lane * Pack<T>::size; k < columns; k += a.lanes * Pack<T>::size) {
          const Pack<T> v = load(y + k);
          for (int x = 0; x < kTile; ++x) {
            const Pack<T> u = load(m + (min(i[x], resident - 1) * stride + k));
            for (int n = 0; n < Pack<T>::size; ++n) sums[x] += u.value[n] * v.value[n];
          }
        }
      }
      for (int x = 0; x < kTile; ++x) finish(i[x], sums[x], drive_entry[x]);
    }
    if constexpr (plan == ChainPlan::grid) {
      for (int base = resident; base < rows; base += groups) {
        const int i = base + group;
        const T drive_entry = driven && i < rows ? drive[i] : T(0);
        T sum = 0;
        if (propagates && i < rows) {
          const T* const w_row = c.weight + int64_t{first + i} * H;
          if (a.packs) {
#pragma unroll 4
            for (int k = lane * Pack<T>::size; k < H; k += a.lanes * Pack<T>::size) {
              const Pack<T> u = load(w_row + k), v = load(y + k);
              for (int n = 0; n < Pack<T>::size; ++n) sum += square(u.value[n]) * v.value[n];
            }
          } else {
#pragma unroll 4
            for (int k = lane; k < H; k += a.lanes) sum += square(w_row[k]) * y[k];
          }
        }
        finish(i, sum, drive_entry);
      }
    }
    if (!c.driven_once) mine.drive = drive_extreme(next_driven);
    mine = {warp_max(mine.top), warp_max(mine.low), warp_max(mine.changed), warp_max(mine.drive)};
    const int which_extreme = warp_lane % Extremes::count;
    const int extreme = which_extreme == 0   ? mine.top
                        : which_extreme == 1 ? mine.low
                        : which_extreme == 2 ? mine.changed
                                             : mine.drive;
    if (extreme > 0) {
      for (int r = warp_lane / Extremes::count; r < ranks; r += kWarp / Extremes::count) {
        atomic_max(of_rank(slot, r) + which_extreme, extreme);
      }
    }
    // Of the steps to come, while the others arrive. A constant drive stays the same.
    if (c.drive_step != 0 && s < a.seq_len) {
      drive_exponent = c.drive_exponents[c.drive_first + (s + 1) * c.drive_step];
      if (s + 1 < a.seq_len) next_driven = most_driven(s + 2, first, first + rows);
    }
    wait();

    if constexpr (plan == ChainPlan::grid) {
      int* const meeting = a.extremes + (which * (int64_t{a.seq_len} + 1) + s) * Extremes::count;
      if (thread < Extremes::count && slot[thread] > 0) atomic_max(meeting + thread, slot[thread]);
      group_sync(a.arrived + which, a.blocks, s);
      row = {load_published(meeting), load_published(meeting + 1), load_published(meeting + 2),
             load_published(meeting + 3)};
      const T* whole = c.rows + (c.first + s * c.step) * H;
      for (int k = thread; k < H; k += threads) next[k] = load_published(whole + k);
      __syncthreads();
    } else {
      row = {slot[0], slot[1], slot[2], slot[3]};
    }
    row_exponent = row.top > 0 ? exponent : kZero;
    if (writes_exponents) c.exponents[c.first + s * c.step] = row_exponent;

    // At rest: the same step gives the same row again. With driven_once, y_0 = 0, which only rests if all is zero.
    if (row.changed == 0 && c.drive_step == 0) {
      const int64_t left = int64_t{a.seq_len - s} * rows;
      for (int64_t n = thread; n < left; n += threads) {
        const int64_t later = s + 1 + n / rows;
        const int i = static_cast<int>(n % rows);
        c.rows[(c.first + later * c.step) * H + first + i] = next[first + i];
      }
      if (rank == 0) {
        for (int64_t later = s + 1 + thread; later <= a.seq_len; later += threads) {
          c.exponents[c.first + later * c.step] = row_exponent;
        }
      }
      break;
    }
  }
  if (lost) mark(a.lost);
}

}  // namespace pathrnn

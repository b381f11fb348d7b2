// Chains of blocks all over the device, which meet in global memory once a step: large H.
#pragma once

#include "chains.cuh"

namespace pathrnn {

constexpr int kGridThreads = 512;  // of more, a thread has too few registers
constexpr int kTile = 2;           // rows that a thread works on at a time, which share what it reads of y

template <typename T>
struct GridChains : Chains<T> {
  int resident;  // rows of a slice in shared memory, where two rows fit beside them
  int stride;    // entries from one of those to the next
  int lanes;     // threads that share a row
  bool packs;    // whether rows of the weights are aligned to 16 bytes
  unsigned long long* arrived;  // per chain
  int* extremes;                // per chain and step as in `Extremes`, zero at the start
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
int64_t grid_shared_bytes(int64_t resident, int64_t stride) {
  return shared_bytes<T>(resident * stride) + shared_bytes<T>(2 * stride) + shared_bytes<int>(3 * Extremes::count) +
         2 * shared_bytes<int>(1);
}

// A group of lanes shares a row of M. Eight lanes of 16 bytes read all banks of shared memory once, so fewer would gain
// nothing, and three shuffles end a sum; more lanes where a block has threads for them.
// A row is not renormalised before it is handed on, as that would take a barrier of its own: its readers scale what they
// make of it so that its largest entry counts as 2^centre. Per step one barrier between blocks: buffers of y alternate,
// and of the extremes' three slots one is read, one written and one cleared.
template <typename T>
class GridChain {
 public:
  __device__ explicit GridChain(const GridChains<T>& a)
      : a_(a),
        slice_(a),
        c_(a.chain[slice_.which]),
        square_(c_.largest),
        resident_(min(slice_.rows, a.resident)),
        lane_(static_cast<int>(threadIdx.x) % a.lanes),
        group_(static_cast<int>(threadIdx.x) / a.lanes),
        groups_(static_cast<int>(blockDim.x) / a.lanes) {
    SharedMemory memory;
    m_ = memory.take<T>(int64_t{a.resident} * a.stride);
    rows_ = memory.take<T>(2 * a.stride);
    slots_ = memory.take<int>(3 * Extremes::count);
    least_slot_ = memory.take<int>(1);
    drive_slot_ = memory.take<int>(1);
  }

  // Returns whether something has underflowed.
  __device__ bool run() {
    start();
    __syncthreads();
    const int least = c_.transposed ? read_columns() : read_rows();
    share(least);
    __syncthreads();
    // How far, at least, a product with 1 is above the least normal number.
    margin_ = -*least_slot_ - Format<T>::min_exponent;
    const int start_top = c_.starts_with_ones ? Extremes::bias : 0;
    row_ = {start_top, start_top, 1, *drive_slot_};
    row_exponent_ = c_.starts_with_ones ? 0 : kZero;
    drive_exponent_ = c_.drive_exponents[c_.drive_first + c_.drive_step];
    next_driven_ = a_.seq_len > 1 ? most_driven(2, slice_.first, slice_.first + slice_.rows) : T(0);
    for (int s = 1; s <= a_.seq_len; ++s) {
      step(s);
      if (row_.changed == 0 && c_.drive_step == 0) {
        rest(s);
        break;
      }
    }
    return underflow_;
  }

 private:
  // The exponent of a step's row, and the powers of two that bring either part to it.
  struct Shifts {
    bool propagates, driven;
    int64_t exponent, up, drive_up;
  };

  __device__ static int thread() { return threadIdx.x; }
  __device__ static int threads() { return blockDim.x; }
  __device__ static int warp_lane() { return threadIdx.x % kWarp; }
  __device__ bool writes_exponents() const { return slice_.rank == 0 && threadIdx.x == 0; }
  __device__ Shared<T> row(int s) const { return rows_ + s % 2 * a_.stride; }
  __device__ T* result(int64_t s) const { return c_.rows + (c_.first + s * c_.step) * a_.hidden; }
  __device__ const T* drive(int64_t s) const { return c_.drive + (c_.drive_first + s * c_.drive_step) * a_.hidden; }
  __device__ int columns() const { return (a_.hidden + Pack<T>::size - 1) / Pack<T>::size * Pack<T>::size; }

  __device__ void start() const {
    const T start = c_.starts_with_ones ? T(1) : T(0);
    for (int k = thread(); k < 2 * a_.stride; k += threads()) rows_[k] = k % a_.stride < a_.hidden ? start : T(0);
    if (thread() < 3 * Extremes::count) slots_[thread()] = 0;
    if (thread() == 0) {
      *least_slot_ = -Extremes::bias;
      *drive_slot_ = 0;
    }
    if (!c_.keeps_start) return;
    for (int i = thread(); i < slice_.rows; i += threads()) c_.rows[slice_.first + i] = start;
    if (writes_exponents()) c_.exponents[0] = c_.starts_with_ones ? 0 : kZero;
  }

  // The square of an entry of M, and of the least that is not zero.
  __device__ T entry(int i, int k, T& least) const {
    const int64_t H = a_.hidden, row = slice_.first + i;
    const T w = c_.weight[c_.transposed ? k * H + row : row * H + k], squared = square_(w);
    if (w != T(0)) least = min(least, squared);
    return squared;
  }
  // Both read the slice of M, and return its least entry's exponent, by its negative.
  __device__ int read_rows() {
    T least = INFINITY;
    for (int i = thread() / kWarp; i < slice_.rows; i += threads() / kWarp) {
#pragma unroll 4
      for (int k = warp_lane(); k < columns(); k += kWarp) {
        const T squared = k < a_.hidden ? entry(i, k, least) : T(0);
        if (i < resident_) m_[i * a_.stride + k] = squared;
      }
    }
    return negative_exponent(least);
  }
  // A warp takes 8 neighbours of a row of W, of 4 rows: whole sectors of memory, and every bank once if the stride is
  // an odd multiple of 16 bytes.
  __device__ int read_columns() {
    T least = INFINITY;
    const int tiles_i = (resident_ + 7) / 8, tiles = tiles_i * ((columns() + 3) / 4);
#pragma unroll 4
    for (int tile = thread() / kWarp; tile < tiles; tile += threads() / kWarp) {
      const int i = tile % tiles_i * 8 + warp_lane() % 8, k = tile / tiles_i * 4 + warp_lane() / 8;
      if (i < resident_ && k < columns()) m_[i * a_.stride + k] = k < a_.hidden ? entry(i, k, least) : T(0);
    }
    return negative_exponent(least);
  }
  __device__ int negative_exponent(T least) {
    underflow_ = least < least_normal<T>();
    return underflow_ ? -Format<T>::min_exponent : least < T(INFINITY) ? -exponent_of(least) : -Extremes::bias;
  }

  // Of the matrix and of the first drive, what all threads need to know.
  __device__ void share(int least) const {
    const int warp_least = warp_max(least), first_drive = warp_max(drive_extreme(most_driven(1, 0, a_.hidden)));
    if (warp_lane() != 0) return;
    atomic_max(least_slot_, warp_least);
    atomic_max(drive_slot_, first_drive);
  }
  // The largest of a thread's share of entries [from, to) of the drive of step s. Mostly one load, which nothing waits
  // for before the result is used.
  __device__ T most_driven(int64_t s, int from, int to) const {
    const T* const entries = drive(s);
    T most = from + thread() < to ? entries[from + thread()] : T(0);
    for (int k = from + thread() + threads(); k < to; k += threads()) most = max(most, entries[k]);
    return most;
  }
  __device__ static int drive_extreme(T most) {
    return most > T(0) ? Extremes::bias + min(exponent_of(most), Format<T>::max_exponent) : 0;
  }

  __device__ Shifts shifts() const {
    const bool driven = row_.drive > 0, propagates = row_.top > 0 && square_.exponent() != kZero;
    const int64_t shift = propagates ? Format<T>::centre - (row_.top - Extremes::bias) : 0;
    const int64_t propagated = propagates ? row_exponent_ - shift + square_.exponent() : kZero;
    const int64_t drive_shift = Format<T>::centre - (row_.drive - Extremes::bias);
    const int64_t exponent = max(propagated, driven ? drive_exponent_ - drive_shift : kZero);
    return {propagates, driven, exponent, shift + propagated - exponent, drive_exponent_ - exponent};
  }

  __device__ void step(int s) {
    const Shared<int> slot = slots_ + s % 3 * Extremes::count;
    if (thread() < Extremes::count) slots_[(s + 1) % 3 * Extremes::count + thread()] = 0;
    const Shifts to = shifts();
    if (to.propagates && Extremes::bias - row_.low + margin_ < 0) underflow_ = true;
    Extremes mine{0, 0, 0, 0};
    resident_rows(s, to, mine);
    streamed_rows(s, to, mine);
    if (!c_.driven_once) mine.drive = drive_extreme(next_driven_);
    publish(slot, mine);
    // Of the steps to come, while the others arrive. A constant drive stays the same.
    if (c_.drive_step != 0 && s < a_.seq_len) {
      drive_exponent_ = c_.drive_exponents[c_.drive_first + (s + 1) * c_.drive_step];
      if (s + 1 < a_.seq_len) next_driven_ = most_driven(s + 2, slice_.first, slice_.first + slice_.rows);
    }
    __syncthreads();
    meet(s, slot);
    row_exponent_ = row_.top > 0 ? to.exponent : kZero;
    if (writes_exponents()) c_.exponents[c_.first + s * c_.step] = row_exponent_;
  }

  // kTile rows at a time.
  __device__ void resident_rows(int s, const Shifts& to, Extremes& mine) {
    const Shared<T> y = row(s - 1);
    for (int base = 0; base < resident_; base += kTile * groups_) {
      int i[kTile];
      T drive_entry[kTile], sums[kTile] = {};
      for (int x = 0; x < kTile; ++x) {
        i[x] = base + x * groups_ + group_;
        if (i[x] >= resident_) i[x] = slice_.rows;
        drive_entry[x] = driven_by(s, to, i[x]);
      }
      if (to.propagates) {
#pragma unroll 2
        for (int k = lane_ * Pack<T>::size; k < columns(); k += a_.lanes * Pack<T>::size) {
          const Pack<T> v = load(y + k);
          for (int x = 0; x < kTile; ++x) {
            const Pack<T> u = load(m_ + (min(i[x], resident_ - 1) * a_.stride + k));
            for (int n = 0; n < Pack<T>::size; ++n) sums[x] += u.value[n] * v.value[n];
          }
        }
      }
      for (int x = 0; x < kTile; ++x) finish(s, to, i[x], sums[x], a_.lanes, drive_entry[x], mine);
    }
  }

  // A warp has a row, so that many loads are under way at a time: they come from the level-2 cache.
  __device__ void streamed_rows(int s, const Shifts& to, Extremes& mine) {
    const Shared<T> y = row(s - 1);
    const int warps = threads() / kWarp;
    for (int base = resident_; base < slice_.rows; base += warps) {
      const int i = base + thread() / kWarp;
      const T drive_entry = driven_by(s, to, i);
      T sum = 0;
      if (to.propagates && i < slice_.rows) {
        const T* const w = c_.weight + int64_t{slice_.first + i} * a_.hidden;
        if (a_.packs) {
#pragma unroll 8
          for (int k = warp_lane() * Pack<T>::size; k < a_.hidden; k += kWarp * Pack<T>::size) {
            const Pack<T> u = load(w + k), v = load(y + k);
            for (int n = 0; n < Pack<T>::size; ++n) sum += square_(u.value[n]) * v.value[n];
          }
        } else {
#pragma unroll 4
          for (int k = warp_lane(); k < a_.hidden; k += kWarp) sum += square_(w[k]) * y[k];
        }
      }
      finish(s, to, i, sum, kWarp, drive_entry, mine);
    }
  }

  __device__ T driven_by(int s, const Shifts& to, int i) const {
    return to.driven && i < slice_.rows ? drive(s)[slice_.first + i] : T(0);
  }
  // From what one of so many lanes has of the sum of row i to the entry of y_s.
  __device__ void finish(int s, const Shifts& to, int i, T sum, int lanes, T drive_entry, Extremes& mine) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    if (i >= slice_.rows) return;
    const T from_drive = scaled(drive_entry, to.drive_up), from_row = scaled(sum, to.up), value = from_row + from_drive;
    if (fades(sum != T(0), from_row, value) || fades(drive_entry != T(0), from_drive, value)) underflow_ = true;
    if (value > T(0)) {
      const int e = min(exponent_of(value), Format<T>::max_exponent);
      mine.top = max(mine.top, Extremes::bias + e);
      mine.low = max(mine.low, Extremes::bias - e);
    }
    if (!(value == row(s - 1)[slice_.first + i]) || to.exponent != row_exponent_) mine.changed = 1;
    if (thread() % lanes == 0) result(s)[slice_.first + i] = value;
  }

  __device__ static void publish(Shared<int> slot, const Extremes& mine) {
    const int which = warp_lane() % Extremes::count;
    const int most[Extremes::count] = {warp_max(mine.top), warp_max(mine.low), warp_max(mine.changed),
                                       warp_max(mine.drive)};
    const int extreme = which == 0 ? most[0] : which == 1 ? most[1] : which == 2 ? most[2] : most[3];
    if (extreme > 0 && warp_lane() < Extremes::count) atomic_max(slot + which, extreme);
  }

  // Takes what the other blocks have made of the row.
  __device__ void meet(int s, Shared<int> slot) {
    int* const meeting = a_.extremes + (slice_.which * (int64_t{a_.seq_len} + 1) + s) * Extremes::count;
    if (thread() < Extremes::count && slot[thread()] > 0) atomic_max(meeting + thread(), slot[thread()]);
    group_sync(a_.arrived + slice_.which, a_.blocks, s);
    row_ = {load_published(meeting), load_published(meeting + 1), load_published(meeting + 2),
            load_published(meeting + 3)};
    const T* const whole = result(s);
    for (int k = thread(); k < a_.hidden; k += threads()) row(s)[k] = load_published(whole + k);
    __syncthreads();
  }

  // The same step gives the same row again: rows s + 1 and later. With driven_once, y_0 = 0, which only rests if all is
  // zero.
  __device__ void rest(int s) const {
    const int64_t left = int64_t{a_.seq_len - s} * slice_.rows;
    for (int64_t n = thread(); n < left; n += threads()) {
      const int i = slice_.first + static_cast<int>(n % slice_.rows);
      result(s + 1 + n / slice_.rows)[i] = row(s)[i];
    }
    if (slice_.rank != 0) return;
    for (int64_t later = s + 1 + thread(); later <= a_.seq_len; later += threads()) {
      c_.exponents[c_.first + later * c_.step] = row_exponent_;
    }
  }

  const GridChains<T>& a_;
  const Slice slice_;
  const Chain<T>& c_;
  const Squares<T> square_;
  const int resident_;              // rows of M in shared memory
  const int lane_, group_, groups_;  // of the threads that share a row
  Shared<T> m_, rows_;
  Shared<int> slots_, least_slot_, drive_slot_;
  int margin_;
  // Of y: what blocks told each other, and its exponent; of the next step's drive, its exponent and its largest entry.
  Extremes row_;
  int64_t row_exponent_, drive_exponent_;
  T next_driven_;
  bool underflow_ = false;
};

template <typename T>
__global__ void __launch_bounds__(kGridThreads, 1) run_chains_on_grid(GridChains<T> a) {
  if (GridChain<T>(a).run()) mark(a.lost);
}

}  // namespace pathrnn

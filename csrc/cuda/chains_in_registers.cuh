// Chains whose W̃ stays in registers, of one block or of a cluster.
//
// A step of a thread is some products with what it holds of M, a few shuffles and one entry of y, its row's. No thread
// asks how large the entries of a row have become: the last warp of a block, which has no rows, does that meanwhile. It
// decides the powers of two of a step (Factors) two steps after the row whose largest entry it has seen, so that nothing
// waits for it:
//
//   step n    rows' warps                                  scales' warp
//             publish the largest entry of y_{n-1}         reads that of y_{n-2}, published in step n-1,
//             y_n = M y_{n-1} · row + drive_n · drive      and decides row and drive of step n+1
//             ------------------------------- barrier -------------------------------
//
// Overflow: let x < 2^u entry by entry; then M x < 2^(u + growth), growth being that of M's largest row sum. From the
// largest entry of y_{n-2} follow bounds of y_{n-1}, y_n and, through the factors, y_{n+1}: these are chosen so that it is
// 2^kTop. So no row passes 2^kTop but by rounding and no sum 2^(kTop + growth), whatever the weights: far from overflow,
// and within what sums over steps allow a row (PairSums). How much smaller than 2^kTop a row's largest entry may be is
// the price: three times what its growth falls short of 2^growth, and a bit for each of the three sums with a drive.
//
// Underflow: a product is normal as long as the least entries, not zero, of M and of the row that it reads are far enough
// above it; every thread keeps the least entry of its row of all steps, and looks at the end. What both parts of an entry
// lose when they are scaled matters only in entries that are small themselves: those are computed once more, exactly, and
// looked at one by one (`exactly`).
#pragma once

#include "chains.cuh"

namespace pathrnn {

// A bound of the largest entry of a row, and a level that what underflows lies below, as far as it matters.
template <typename T>
constexpr int kTop = Format<T>::centre + 12;
template <typename T>
constexpr int kFaint = Format<T>::min_exponent + Format<T>::digits + 2;
// An entry from here on is so much above kFaint that it does not show.
template <typename T>
constexpr int kSafe = kFaint<T> + Format<T>::digits + 6;

// A power of two far below all others, of a part that is not there; a few of them add up without overflow.
constexpr int kAbsent = -(1 << 24);

// An integer that orders numbers ≥ 0 as they are ordered; zero is that of zero alone.
__device__ inline int magnitude_word(float x) { return static_cast<int>(magnitude_bits(x)); }
__device__ inline int magnitude_word(double x) {
  const int64_t bits = magnitude_bits(x);
  return static_cast<int>(bits >> 32) | static_cast<int>((bits & 0xffffffff) != 0);
}
// The least e such that numbers of that word are below 2^e; kAbsent for zero.
template <typename T>
__device__ int exponent_above(int word) {
  constexpr int fraction = sizeof(T) == sizeof(float) ? 23 : 20;
  return word > 0 ? (word >> fraction) + Format<T>::min_exponent : kAbsent;
}

// What the sums and the drive of a step are multiplied with: the powers of two of these exponents, or 0 where these are
// so low that what is left does not show. nan if such a power is no normal number: then the entries go through `exactly`.
template <typename T>
struct alignas(16) Factors {
  static constexpr int kStop = INT32_MIN;  // row_exponent after the last step
  T row, drive;
  int row_exponent, drive_exponent;
};

// How W̃ lies in the registers of a warp: kLanes lanes share kRows rows, with kColumns of the columns each. A group's
// kRows sums end up in one lane each, or in kCopies lanes. Of a lane's columns the last kParked lie in shared memory, where
// registers would not suffice.
template <typename Number, int lanes, int rows, int columns, int most_rows, int parked = 0>
struct Layout {
  using T = Number;
  static constexpr int kLanes = lanes, kRows = rows, kColumns = columns, kParked = parked;
  static constexpr int kWidth = lanes * columns;  // columns of M, zeros beyond H
  static constexpr int kWarpRows = kWarp / lanes * rows;
  static constexpr int kCopies = lanes / rows;
  static constexpr int kMostRows = most_rows;  // of a block
  static constexpr int kMostThreads = ((most_rows + kWarpRows - 1) / kWarpRows + 1) * kWarp;
  static_assert(lanes % rows == 0 && kWarp % lanes == 0 && rows % Pack<T>::size == 0);
};

// A thread's part of M.
template <typename L>
class Held {
 public:
  using T = typename L::T;

  __device__ explicit Held(Shared<T> parked) : parked_(parked) {}
  __host__ __device__ static constexpr int64_t parked_entries(int warps) {
    return int64_t{L::kParked} * L::kRows * warps * kWarp;
  }

  // What has been read of M: the least square that is not zero, and the sum of the lane's row.
  struct Found {
    T least, row_sum;
  };
  // Row `row` of M and those after it, as far as they are below `end`.
  __device__ Found read(const Chain<T>& c, int hidden, int row, int end) {
    const Squares<T> square(c.largest);
    const bool packs = c.transposed && row + L::kRows <= end && (row | hidden) % Pack<T>::size == 0 &&
                       reinterpret_cast<uintptr_t>(c.weight) % sizeof(Pack<T>) == 0;
    T least = INFINITY, sums[L::kRows] = {};
#pragma unroll
    for (int j = 0; j < L::kColumns; ++j) {
      const int k = column(j);
      T entries[L::kRows] = {};
      if (packs) {
        if (k < hidden) read_packs(c.weight + k * hidden + row, entries);
      } else {
#pragma unroll
        for (int i = 0; i < L::kRows; ++i) {
          if (row + i < end && k < hidden) entries[i] = c.weight[c.transposed ? k * hidden + row + i : (row + i) * hidden + k];
        }
      }
#pragma unroll
      for (int i = 0; i < L::kRows; ++i) {
        const bool some = entries[i] != T(0);
        entries[i] = square(entries[i]);
        if (some) least = min(least, entries[i]);
      }
      cross(entries);
      keep(j, entries);
      add(sums, entries, T(1));
    }
    return {least, gathered(sums)};
  }

  // Adds the lane's share of M y to sums that `gathered` adds up.
  __device__ void multiply(Shared<T> y, T (&sums)[L::kRows]) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const Pack<T> v = load(y + (lane() + L::kLanes * p) * Pack<T>::size);
#pragma unroll
      for (int n = 0; n < Pack<T>::size; ++n) add_column(sums, p * Pack<T>::size + n, v.value[n]);
    }
#pragma unroll
    for (int j = kPacks * Pack<T>::size; j < L::kColumns; ++j) add_column(sums, j, y[column(j)]);
  }
  // From the shares of a group's lanes in its rows, the sum of the lane's own row.
  __device__ static T gathered(T (&sums)[L::kRows]) {
    gather<L::kRows / 2>(sums);
#pragma unroll
    for (int mask = L::kRows; mask < L::kLanes; mask *= 2) sums[0] += __shfl_xor_sync(kAllLanes, sums[0], mask);
    return sums[0];
  }

 private:
  static constexpr int kPacks = L::kColumns / Pack<T>::size, kKept = L::kColumns - L::kParked;

  __device__ static int lane() { return threadIdx.x % L::kLanes; }
  __device__ static void read_packs(const T* p, T (&entries)[L::kRows]) {
#pragma unroll
    for (int i = 0; i < L::kRows; i += Pack<T>::size) {
      const Pack<T> pack = load(p + i);
#pragma unroll
      for (int n = 0; n < Pack<T>::size; ++n) entries[i + n] = pack.value[n];
    }
  }
  // Lanes take 16 bytes in turn, and single entries of what is left.
  __device__ static int column(int j) {
    return j < kPacks * Pack<T>::size ? (lane() + L::kLanes * (j / Pack<T>::size)) * Pack<T>::size + j % Pack<T>::size
                                      : lane() + L::kLanes * j;
  }
  // The pack i of column j in shared memory.
  __device__ Shared<T> parked(int j, int i) const {
    const int threads = blockDim.x - kWarp, pack = ((j - kKept) * L::kRows + i) / Pack<T>::size;
    return parked_ + (pack * threads + static_cast<int>(threadIdx.x)) * Pack<T>::size;
  }
  __device__ void keep(int j, const T (&entries)[L::kRows]) {
#pragma unroll
    for (int i = 0; i < L::kRows; ++i) {
      if (j < kKept) {
        held_[i][j < kKept ? j : 0] = entries[i];
      } else if (i % Pack<T>::size == 0) {
        Pack<T> pack;
#pragma unroll
        for (int n = 0; n < Pack<T>::size; ++n) pack.value[n] = entries[i + n];
        store(parked(j, i), pack);
      }
    }
  }
  __device__ void add_column(T (&sums)[L::kRows], int j, T v) const {
    T entries[L::kRows];
#pragma unroll
    for (int i = 0; i < L::kRows; ++i) {
      if (j < kKept) {
        entries[i] = held_[i][j < kKept ? j : 0];
      } else if (i % Pack<T>::size == 0) {
        const Pack<T> pack = load(parked(j, i));
#pragma unroll
        for (int n = 0; n < Pack<T>::size; ++n) entries[i + n] = pack.value[n];
      }
    }
    add(sums, entries, v);
  }
  __device__ static void add(T (&sums)[L::kRows], const T (&entries)[L::kRows], T v) {
#pragma unroll
    for (int i = 0; i < L::kRows; ++i) sums[i] += entries[i] * v;
  }

  // Lets entry i be of row i ^ lane, so that in every round of `gathered` lanes hand on what they have in the same
  // registers, whatever their place.
  __device__ static void cross(T (&entries)[L::kRows]) {
#pragma unroll
    for (int bit = 1; bit < L::kRows; bit *= 2) {
      const bool crossed = (lane() & bit) != 0;
#pragma unroll
      for (int i = 0; i < L::kRows; ++i) {
        if ((i & bit) != 0) continue;
        const T one = entries[i], other = entries[i | bit];
        entries[i] = crossed ? other : one;
        entries[i | bit] = crossed ? one : other;
      }
    }
  }
  template <int half>
  __device__ static void gather(T (&sums)[L::kRows]) {
    if constexpr (half > 0) {
#pragma unroll
      for (int i = 0; i < half; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i + half], half);
      gather<half / 2>(sums);
    }
  }

  T held_[L::kRows][kKept];
  Shared<T> parked_;
};

// What the blocks of a chain share: they write into each other's, at the same place.
template <typename L, ChainPlan plan>
class Exchange {
 public:
  using T = typename L::T;
  static constexpr int kMoved = INT32_MIN;  // bit of a published word: the row differs from the one before

  __device__ explicit Exchange(const Chains<T>& a)
      : blocks_(plan == ChainPlan::cluster ? a.blocks : 1),
        rank_(static_cast<int>(blockIdx.x) % a.blocks),
        warps_(static_cast<int>(blockDim.x) / kWarp - 1) {
    SharedMemory memory;
    factors_ = memory.take<Factors<T>>(2);
    rows_ = memory.take<T>(2 * L::kWidth);
    words_ = memory.take<int>(2 * blocks_ * warps_);
    least_ = memory.take<int>(blocks_ * warps_);
    parked_ = memory.take<T>(Held<L>::parked_entries(warps_));
  }
  static int64_t bytes(int blocks, int warps) {
    return shared_bytes<Factors<T>>(2) + shared_bytes<T>(2 * L::kWidth) +
           shared_bytes<int>(int64_t{2} * blocks * warps) + shared_bytes<int>(int64_t{blocks} * warps) +
           shared_bytes<T>(Held<L>::parked_entries(warps));
  }

  __device__ int warps() const { return warps_; }  // that have rows, of a block
  __device__ Shared<T> parked() const { return parked_; }
  __device__ Shared<Factors<T>> factors(unsigned step) const { return factors_ + step % 2; }
  __device__ Shared<T> row(unsigned step) const { return rows_ + step % 2 * L::kWidth; }

  // Before anything is published: y_0, and nothing said of it yet.
  __device__ void clear(int hidden, T start) const {
    const int thread = threadIdx.x, threads = blockDim.x;
    for (int k = thread; k < 2 * L::kWidth; k += threads) rows_[k] = k < hidden ? start : T(0);
    for (int i = thread; i < 2 * words(); i += threads) words_[i] = kMoved;
  }
  // All threads of the chain; rows' and scales' warps come from different places.
  __device__ void meet() const {
    if constexpr (plan == ChainPlan::cluster) cluster_sync();
    else block_sync();
  }
  // A word of a warp in a step, of which the others read the largest of all warps, after they have met.
  __device__ void publish(unsigned step, int word) const { put(words_ + step % 2 * words(), word); }
  __device__ void publish_least(int exponent) const { put(least_, exponent); }
  __device__ int published(unsigned step, bool& moved) const {
    const int lane = threadIdx.x % kWarp;
    int most = lane < words() ? words_[step % 2 * words() + lane] : 0, all = most;
    most &= ~kMoved;
    if constexpr (plan == ChainPlan::cluster) {
#pragma unroll 1
      for (int i = lane + kWarp; i < words(); i += kWarp) {
        const int word = words_[step % 2 * words() + i];
        most = max(most, word & ~kMoved);
        all |= word;
      }
    }
    moved = __any_sync(kAllLanes, all < 0);
    return warp_max(most);
  }
  // The least exponent of an entry of M, by its negative.
  __device__ int least() const {
    int most = INT32_MIN;
    for (int i = threadIdx.x % kWarp; i < words(); i += kWarp) most = max(most, static_cast<int>(least_[i]));
    return -warp_max(most);
  }
  // An entry of y of a step, by the copies of its lane.
  __device__ void put_entry(unsigned step, int k, int copy, T value) const {
    for (int r = copy; r < blocks_; r += L::kCopies) of_rank(row(step), r)[k] = value;
  }

 private:
  __device__ int words() const { return blocks_ * warps_; }
  template <typename V>
  __device__ static Shared<V> of_rank(Shared<V> p, int rank) {
    if constexpr (plan == ChainPlan::cluster) return on_rank(p, rank);
    else return p;
  }
  __device__ void put(Shared<int> words, int word) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (lane < blocks_) of_rank(words, lane)[rank_ * warps_ + warp] = word;
  }

  int blocks_, rank_, warps_;
  Shared<Factors<T>> factors_;  // of two steps
  Shared<T> rows_;              // y of two steps
  Shared<int> words_, least_;   // of every rank's warps
  Shared<T> parked_;            // of this block's threads alone
};

// The warp that decides the factors of every step, in all its lanes alike, and stores the exponents of the rows.
template <typename L, ChainPlan plan>
class Scales {
 public:
  using T = typename L::T;

  __device__ Scales(const Chains<T>& a, const Slice& slice, const Exchange<L, plan>& exchange)
      : exchange_(exchange),
        seq_len_(a.seq_len),
        hidden_(a.hidden),
        first_lane_(threadIdx.x % kWarp == 0),
        stores_(slice.rank == 0 && first_lane_) {
    const Chain<T>& c = a.chain[slice.which];
    const int64_t own = Squares<T>(c.largest).exponent();
    own_ = own == kZero ? 0 : static_cast<int>(own);
    drive_above_[1] = c.starts_with_ones ? 0 : kAbsent;
    constant_ = c.drive_step == 0;
    once_ = c.driven_once;
    drive_ = c.drive + (c.drive_first + c.drive_step) * hidden_;
    drive_exponents_ = c.drive_exponents + c.drive_first + c.drive_step;
    drive_step_ = c.drive_step;
    exponents_ = c.exponents + (c.first - c.step);
    exponents_step_ = c.step;
    first_stored_ = c.keeps_start ? 0 : 1;
    load_drive(1);
    take_drive();
    if (!constant_) load_drive(2);
  }

  // All steps; M x < 2^growth for x < 1.
  __device__ void run(int growth) {
    growth_ = growth;
    decide(1, kAbsent);
    exchange_.meet();
    int n = 0;
    for (bool last = false; !last;) {
      ++n;
      bool moved;
      const int above = exponent_above<T>(exchange_.published(n - 1, moved));
      // At rest: the same step gives the same row again. With driven_once, y_0 = 0, which only rests if all is zero.
      last = n == seq_len_ || (!moved && constant_ && (kept_ & 4) != 0);
      store(n - 2, above, exponent_[0]);
      if (last) put(n + 1, {0, 0, Factors<T>::kStop, 0});
      else decide(n + 1, above);
      exchange_.meet();
    }
    exchange_.meet();
    finish(n);
  }

 private:
  static constexpr int kDrives = (L::kWidth + kWarp - 1) / kWarp;

  // Entries of the drive of a step, of which its largest is asked one step later.
  __device__ void load_drive(int step) {
    if (step > seq_len_) return;
#pragma unroll
    for (int i = 0; i < kDrives; ++i) {
      const int k = static_cast<int>(threadIdx.x) % kWarp + i * kWarp;
      loaded_[i] = k < hidden_ ? drive_[k] : T(0);
    }
    loaded_exponent_ = *drive_exponents_;
    drive_ += drive_step_ * hidden_;
    drive_exponents_ += drive_step_;
  }
  __device__ void take_drive() {
    T most = 0;
#pragma unroll
    for (int i = 0; i < kDrives; ++i) most = max(most, loaded_[i]);
    most_driven_ = exponent_above<T>(warp_max(magnitude_word(most)));
    drive_exponent_ = loaded_exponent_;
  }
  __device__ void next_drive(int step) {
    if (once_) {
      most_driven_ = kAbsent;
    } else if (!constant_) {
      take_drive();
      load_drive(step + 1);
    }
  }

  // Publishes the factors of a step, from what the row three steps before it is below. All exponents are differences to
  // that of the step's sums, but for the row's own.
  __device__ void decide(int step, int above) {
    // What y of the step before is below, on its scale.
#pragma unroll
    for (int i = 0; i < 2; ++i) above = max(max(above + growth_ + up_[i], drive_above_[i]) + 1, kAbsent);
    const int sum_above = above + growth_;
    const int64_t base = exponent_[2] + own_;
    const bool driven = most_driven_ > kAbsent / 2;
    const int gap = bounded(drive_exponent_ - base), drive_above = driven ? gap + most_driven_ : kAbsent;
    const int top = max(sum_above, drive_above);
    const int up = top > kAbsent / 2 ? kTop<T> - 1 - top : own_, drive_up = driven ? gap + up : kAbsent;
    put(step, {factor(up, sum_above), factor(drive_up, most_driven_), up, drive_up});

    kept_ = kept_ << 1 | static_cast<unsigned>(up == own_);
    up_[0] = up_[1];
    drive_above_[0] = drive_above_[1];
    exponent_[0] = exponent_[1];
    exponent_[1] = exponent_[2];
    up_[1] = up;
    drive_above_[1] = driven ? most_driven_ + drive_up : kAbsent;
    exponent_[2] = drive_above > sum_above ? drive_exponent_ + most_driven_ + 1 - kTop<T> : base - up;
    next_drive(step + 1);
  }
  // Beyond these bounds the lesser part does not show.
  __device__ static int bounded(int64_t e) {
    constexpr int64_t most = -kAbsent / 4;
    return static_cast<int>(min(max(e, -most), most));
  }
  // 2^up for numbers below 2^above.
  __device__ static T factor(int up, int above) {
    if (up >= Format<T>::min_exponent && up <= Format<T>::max_exponent) return power_of_two<T>(up);
    return above + up < kFaint<T> ? T(0) : static_cast<T>(NAN);
  }
  __device__ void put(int step, const Factors<T>& factors) const {
    if (first_lane_) *exchange_.factors(step) = factors;
  }

  // Step after step, from -1 on; a row that is not below 2^kAbsent is zero.
  __device__ void store(int step, int above, int64_t exponent) {
    if (stores_ && step >= first_stored_) *exponents_ = above == kAbsent ? kZero : exponent;
    exponents_ += exponents_step_;
  }
  // The last two rows, and those that equal the last.
  __device__ void finish(int last) {
    bool moved;
    store(last - 1, exponent_above<T>(exchange_.published(last, moved)), exponent_[1]);
    const int above = exponent_above<T>(exchange_.published(last + 1, moved));
    for (int later = last; later <= seq_len_; ++later) store(later, above, exponent_[2]);
  }

  const Exchange<L, plan>& exchange_;
  const int seq_len_, hidden_;
  const bool first_lane_, stores_;
  bool constant_, once_;
  int growth_ = kAbsent, own_;  // of M
  // Of the last steps, the last one last: y's exponent, that of the factor, and what the drive is below on y's scale;
  // whether y's exponent is that of the step before, in bits.
  int64_t exponent_[3] = {};
  int up_[2] = {}, drive_above_[2] = {kAbsent, kAbsent};
  unsigned kept_ = 0;
  // Of the next step's drive, and of the one after it.
  int most_driven_ = kAbsent;
  int64_t drive_exponent_ = kZero, loaded_exponent_ = kZero;
  T loaded_[kDrives];
  // Where the next ones are read and stored.
  const T* drive_;
  const int64_t* drive_exponents_;
  int64_t* exponents_;
  int64_t drive_step_, exponents_step_;
  int first_stored_;
};

// A thread of the other warps: the row of M that its lane ends up with.
template <typename L, ChainPlan plan>
class Row {
 public:
  using T = typename L::T;

  __device__ Row(const Chains<T>& a, const Slice& slice, const Exchange<L, plan>& exchange)
      : exchange_(exchange), seq_len_(a.seq_len), held_(exchange.parked()) {
    const Chain<T>& c = a.chain[slice.which];
    const int thread = threadIdx.x, row = thread / L::kLanes * L::kRows + thread % L::kRows;
    const bool there = row < slice.rows;
    safe_ = there ? power_of_two<T>(kSafe<T>) : T(-1);
    k_ = slice.first + row;
    value_ = there && c.starts_with_ones ? T(1) : T(0);
    result_step_ = static_cast<int>(c.step) * a.hidden;
    result_ = c.rows + c.first * a.hidden + k_;
    if (stores() && c.keeps_start) *result_ = value_;
    drive_step_ = static_cast<int>(c.drive_step) * a.hidden;
    const T* const drive = c.drive + c.drive_first * a.hidden + drive_step_ + k_;
    drive_ = there ? *drive : T(0);
    next_drive_ = c.driven_once ? nullptr : drive + drive_step_;
    changes_ = c.driven_once || c.drive_step != 0;
  }

  // Reads M, and says what the others need to know of it.
  __device__ void read(const Chain<T>& c, int hidden, const Slice& slice) {
    const int row = static_cast<int>(threadIdx.x) / L::kLanes * L::kRows;
    const typename Held<L>::Found found = held_.read(c, hidden, slice.first + row, slice.first + slice.rows);
    const T least = found.least;
    exchange_.publish(1, warp_max(magnitude_word(found.row_sum)));
    // By its negative; of an entry that has underflowed, the least there is.
    underflow_ = least < least_normal<T>();
    exchange_.publish_least(warp_max(underflow_              ? -Format<T>::min_exponent
                                     : least < T(INFINITY) ? -exponent_of(least)
                                                             : kAbsent));
  }

  // All steps; returns whether something has underflowed.
  __device__ bool run() {
    const int least_exponent = exchange_.least();
    exchange_.meet();
    int n = 1;
    for (;; ++n) {
      // What takes long is begun first, for a warp waits where it needs a result.
      const int largest = warp_max(magnitude_word(value_));
      const bool moved = __any_sync(kAllLanes, moved_);
      T sums[L::kRows] = {};
      held_.multiply(exchange_.row(n - 1), sums);
      exchange_.publish(n, moved ? largest | exchange_.kMoved : largest);
      if (n > 1 && stores()) *result_ = value_;  // of the step before, so that no barrier waits for it
      result_ += result_step_;
      const auto now = Factors<T>(*exchange_.factors(n));
      if (now.row_exponent == Factors<T>::kStop) break;
      step(n, now, held_.gathered(sums));
      exchange_.meet();
    }
    exchange_.meet();
    for (int later = n; later <= seq_len_ && stores(); ++later, result_ += result_step_) *result_ = value_;
    const bool product = low_ < T(INFINITY) && exponent_of(low_) + least_exponent < Format<T>::min_exponent;
    return underflow_ || product;
  }

 private:
  __device__ bool there() const { return safe_ > T(0); }
  __device__ static int copy() { return static_cast<int>(threadIdx.x) % L::kLanes / L::kRows; }
  __device__ bool stores() const { return there() && copy() == 0; }

  __device__ void step(int n, const Factors<T>& now, T sum) {
    if (value_ > T(0)) low_ = min(low_, value_);  // which M has been multiplied with
    const T drive = drive_, before = value_;
    if (changes_) load_drive(n + 1);
    value_ = sum * now.row + drive * now.drive;
    if (!(value_ >= safe_)) value_ = exactly(sum, drive, now);
    moved_ = value_ != before;
    if (there()) exchange_.put_entry(n, k_, copy(), value_);
  }
  __device__ void load_drive(int n) {
    drive_ = next_drive_ != nullptr && there() && n <= seq_len_ ? *next_drive_ : T(0);
    if (next_drive_ != nullptr) next_drive_ += drive_step_;
  }
  __device__ T exactly(T sum, T drive, const Factors<T>& now) {
    const T from_row = scaled(sum, now.row_exponent), from_drive = scaled(drive, now.drive_exponent);
    const T value = from_row + from_drive;
    if (fades(sum != T(0), from_row, value) || fades(drive != T(0), from_drive, value)) underflow_ = true;
    return value;
  }

  const Exchange<L, plan>& exchange_;
  const int seq_len_;
  Held<L> held_;
  T low_ = T(INFINITY);  // least entry, not zero, of the lane's row in all steps
  T value_, drive_;      // of the row, in this step
  T safe_;  // what an entry must not be below without a closer look; -1 for rows that are not there, which are always 0
  bool changes_, moved_ = true, underflow_ = false;
  int k_, result_step_, drive_step_;
  T* result_;
  const T* next_drive_;  // null if there is none
};

template <typename L, ChainPlan plan>
__global__ void __launch_bounds__(L::kMostThreads, 1) run_chains(Chains<typename L::T> a) {
  using T = typename L::T;
  const Slice slice(a);
  const Exchange<L, plan> exchange(a);
  exchange.clear(a.hidden, a.chain[slice.which].starts_with_ones ? T(1) : T(0));
  exchange.meet();
  bool underflow = false;
  if (static_cast<int>(threadIdx.x) / kWarp < exchange.warps()) {
    Row<L, plan> row(a, slice, exchange);
    row.read(a.chain[slice.which], a.hidden, slice);
    exchange.meet();
    underflow = row.run();
  } else {
    Scales<L, plan> scales(a, slice, exchange);
    exchange.meet();
    bool moved;
    scales.run(exponent_above<T>(exchange.published(1, moved)));
  }
  if (underflow) mark(a.lost);
}

}  // namespace pathrnn

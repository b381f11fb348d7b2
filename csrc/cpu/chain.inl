// The parts of path_chain and kappa2: vectors with power-of-two exponents, the two plans of a chain, and sums over steps.

// The largest entry of a chain's vector is kept within 2^(kCentre ± kSlack): high enough that an entry 2^-126 below
// it is still normal, low enough that products of h and δ, summed over T and H, stay finite.
template <typename T>
constexpr int64_t kCentre = std::is_same<T, float>::value ? 40 : 400;
constexpr int64_t kSlack = 6;
// Rows this far below the largest cannot reach the smallest number that the result can hold beside it.
template <typename T>
constexpr int64_t kNegligible = std::is_same<T, float>::value ? 240 : 1900;

// 2^n, zero where the dtype has no normal number for it, infinity above.
template <typename T>
inline T power_of_two(int64_t n) {
  using Bits = std::conditional_t<std::is_same<T, float>::value, uint32_t, uint64_t>;
  constexpr int64_t bias = std::numeric_limits<T>::max_exponent - 1;
  n = std::min<int64_t>(std::max<int64_t>(n, -bias), bias + 1);
  const Bits bits = static_cast<Bits>(n + bias) << (std::numeric_limits<T>::digits - 1);
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}
template <typename T>
inline int64_t magnitude(T largest) {
  return largest > T(0) ? std::ilogb(largest) : kZeroExponent;
}
template <typename T>
inline T largest_lane(const Vec<T>& v) {
  T m = v[0];
  for (int64_t i = 1; i < Simd<T>::width; ++i) m = std::max(m, v[i]);
  return m;
}
// The sum of all lanes, by halves.
template <typename T, int64_t Lanes>
inline T lane_sum(const T* lanes) {
  if constexpr (Lanes == 1) {
    return lanes[0];
  } else {
    typedef T Half __attribute__((vector_size(Lanes / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, lanes, sizeof(Half));
    std::memcpy(&high, lanes + Lanes / 2, sizeof(Half));
    low += high;
    T sums[Lanes / 2];
    std::memcpy(sums, &low, sizeof(Half));
    return lane_sum<T, Lanes / 2>(sums);
  }
}
template <typename T>
inline T lane_sum(const Vec<T>& v) {
  T lanes[Simd<T>::width];
  store(lanes, v);
  return lane_sum<T, Simd<T>::width>(lanes);
}
template <typename T>
inline Vec<T> maximum(const Vec<T>& a, const Vec<T>& b) {
  return a > b ? a : b;
}

// ---- exponents of weights, exact also where their squares would leave the dtype ----

template <typename T>
using Int = std::conditional_t<std::is_same<T, float>::value, int32_t, int64_t>;
template <typename T>
using Ints = decltype(Vec<T>{} > Vec<T>{});  // lanes of Int<T>

// The binary exponent of a zero. Three of them, with any others beside, add up without overflow.
constexpr int64_t kNone = -(int64_t{1} << 28);
inline bool is_none(int64_t exponent) { return exponent < kNone / 2; }

template <typename T>
inline Ints<T> bits_of(const Vec<T>& v) {
  Ints<T> bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
template <typename T>
inline Vec<T> from_bits(const Ints<T>& bits) {
  Vec<T> v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// floor(log2 |v|) by lanes, kNone for 0; nothing of use for what is not finite.
template <typename T>
inline Ints<T> exponents_of(const Vec<T>& v) {
  constexpr Int<T> mantissa = std::numeric_limits<T>::digits - 1, bias = std::numeric_limits<T>::max_exponent - 1;
  constexpr Int<T> one = 1, magic = (bias + mantissa) << mantissa;
  const Ints<T> bits = bits_of<T>(v) & std::numeric_limits<Int<T>>::max();
  // A subnormal number is its bits, as an integer, times the smallest of them.
  const Ints<T> low = bits_of<T>(from_bits<T>(bits | magic) - from_bits<T>(Ints<T>{} + magic));
  const Ints<T> subnormal = (low >> mantissa) - (2 * bias - 1 + mantissa);
  return bits >= (one << mantissa) ? (bits >> mantissa) - bias : bits > 0 ? subnormal : Ints<T>{} + Int<T>(kNone);
}
template <typename T>
inline int64_t exponent_of(T v) {
  Int<T> bits;
  std::memcpy(&bits, &v, sizeof(v));
  const Int<T> field = (bits >> (std::numeric_limits<T>::digits - 1)) & (2 * std::numeric_limits<T>::max_exponent - 1);
  if (field != 0) return field - (std::numeric_limits<T>::max_exponent - 1);
  return v == T(0) ? kNone : std::ilogb(v);
}
// x · 2^n, x > 0, as std::ldexp, without a call where neither 2^n nor the result is subnormal.
inline double times_power_of_two(double x, int64_t n) {
  const int64_t m = exponent_of(x) + n;
  if (n >= -1022 && n <= 1023 && m >= -1022 && m <= 1023) return x * power_of_two<double>(n);
  return std::ldexp(x, static_cast<int>(std::clamp<int64_t>(n, -5000, 5000)));
}
// v · 2^n, in halves, as 2^n may be out of range where the product is not; 0 for a zero, whatever n.
template <typename T>
inline Vec<T> times_power(const Vec<T>& v, const Ints<T>& n) {
  constexpr Int<T> mantissa = std::numeric_limits<T>::digits - 1, bias = std::numeric_limits<T>::max_exponent - 1;
  const auto power = [](Ints<T> e) {
    e = e < -bias ? Ints<T>{} - bias : e > bias ? Ints<T>{} + bias : e;
    return from_bits<T>((e + bias) << mantissa);
  };
  const Ints<T> half = n >> 1;
  return v * power(half) * power(n - half);
}
template <typename T>
inline Ints<T> load_ints(const Int<T>* p) {
  Ints<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
inline void store_ints(Int<T>* p, const Ints<T>& v) {
  std::memcpy(p, &v, sizeof(v));
}

// A matrix of weights in canonical coordinates: its squares are (data[j, k] · column[k] · row[j])² · 2^exponent, none
// above 4 · 2^exponent, also before `row` is applied but for a factor 2^kFactor.
constexpr int64_t kFactor = 8;
template <typename T>
struct Weights {
  const T* data;
  const T *row, *column;  // padded, powers of two or 0
  int64_t exponent;
};

// Doubles from memory that holds T.
template <typename T>
inline Vec<double> load_wide(const T* p) {
  if constexpr (std::is_same<T, double>::value) {
    return load(p);
  } else {
    typedef T Half __attribute__((vector_size(Simd<double>::width * sizeof(T))));
    Half v;
    std::memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, Vec<double>);
  }
}

// Uninitialised, aligned memory: what is read of it has been written, padding included.
template <typename T>
using Buffer = std::vector<T, Aligned<T>>;

// Memory for one pass, kept by the calling thread between calls up to a limit: fresh pages cost as much as a pass over a
// small network. Slots are kept apart.
template <typename T, int Slot = 0>
class Workspace {
 public:
  explicit Workspace(int64_t count) : size_(count) {
    thread_local Buffer<T> kept;
    kept_ = &kept;
    if (static_cast<int64_t>(kept.size()) >= count) memory_.swap(kept);
    else memory_.resize(count);
    poison(memory_.data(), memory_.size());
  }
  ~Workspace() {
    constexpr int64_t kKeep = (int64_t{32} << 20) / static_cast<int64_t>(sizeof(T));
    if (size_ <= kKeep) memory_.swap(*kept_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* take(int64_t count) {
    T* const result = memory_.data() + taken_;
    taken_ += padded<T>(count);
    return result;
  }

 private:
  int64_t size_, taken_ = 0;
  Buffer<T> memory_;
  Buffer<T>* kept_;
};

// The exponent of a result whose largest entry is about 2^m: with the largest mantissa near 2^40, float32 holds what is
// 2^-166 of it.
inline int64_t result_exponent(int64_t m) { return m == kZeroExponent ? 0 : m - 40; }

// Steps [first, last) of a chain in closed form: row t is Σ_i coefficients[i][t] · basis[i], on the scale of the step's
// exponent; these rows themselves are not written. A chain that has converged is one row with the coefficient 1.
template <typename T>
struct Closed {
  static constexpr int kMost = 3;
  int64_t first = 0, last = 0;
  int count = 0;
  const T* basis[kMost] = {};
  const T* coefficients[kMost] = {};
  bool holds(int64_t t) const { return t >= first && t < last; }
};

// Rows of [n, row] with an exponent and the magnitude of the largest entry each.
template <typename T>
struct Rows {
  T* data;
  int64_t* exponent;
  int64_t* largest;
  int64_t row;
  Closed<T>* closed_form;
  int64_t offset = 0;  // of these rows among those that `closed_form` counts
  T* operator[](int64_t t) const { return data + t * row; }
  Closed<T> closed() const {
    Closed<T> c = *closed_form;
    c.first = std::max<int64_t>(c.first - offset, 0);
    c.last = std::max<int64_t>(c.last - offset, 0);
    for (int i = 0; i < c.count; ++i) c.coefficients[i] += offset;
    return c;
  }
  Rows from(int64_t t) const { return {data + t * row, exponent + t, largest + t, row, closed_form, offset + t}; }
};

// A drive of T rows; row 0 means that one row serves all steps.
template <typename T>
struct Drive {
  const T* data;
  const int64_t* exponent;  // kZeroExponent: no drive at that step
  int64_t row, exponent_step;
  int64_t constant_from;  // steps from this one on are driven alike
};

// Whether every entry of `large` is so large, where `small` has one, that `small`, too small for its dtype on the scale
// of `large`, changes nothing in it.
template <typename T>
bool covers(const T* large, const T* small, int64_t n) {
  constexpr int64_t bits = std::numeric_limits<T>::min_exponent + kCentre<T> + kSlack + std::numeric_limits<T>::digits + 6;
  const T least = std::ldexp(T(1), static_cast<int>(bits));
  for (int64_t k = 0; k < n; ++k) {
    if (small[k] > T(0) && large[k] < least) return false;
  }
  return true;
}

// Leaves the mark of an underflow, for a loss that no operation made.
inline void mark_lost() {
  volatile float tiny = std::numeric_limits<float>::min();
  volatile float lost = tiny * tiny;
  (void)lost;
}

// out = out · 2^from + drive · 2^drive_exponent, renormalised.
template <typename T>
void finish_step(T* out, int64_t from, const T* drive, int64_t drive_exponent, int64_t n, int64_t& exponent,
                 int64_t& largest) {
  constexpr int64_t width = Simd<T>::width;
  exponent = std::max(from, drive_exponent);
  const T a = power_of_two<T>(from - exponent);
  const bool driven = drive_exponent != kZeroExponent;
  const T b = driven ? power_of_two<T>(drive_exponent - exponent) : T(0);
  // A chain that grows leaves its drive behind, harmlessly, unless some unit lives on the drive alone.
  const bool moved = from > kZeroExponent / 2;
  if (driven && b == T(0) && !covers(out, drive, n)) mark_lost();
  if (moved && a == T(0) && !covers(drive, out, n)) mark_lost();
  Vec<T> most{};
  if (b != T(0)) {
    for (int64_t k = 0; k < n; k += width) {
      const Vec<T> r = a * load(out + k) + b * load(drive + k);
      store(out + k, r);
      most = maximum<T>(most, r);
    }
  } else {
    for (int64_t k = 0; k < n; k += width) most = maximum<T>(most, load(out + k));
  }
  largest = magnitude(largest_lane<T>(most));
  if (largest == kZeroExponent) {
    exponent = kZeroExponent;
  } else if (largest < kCentre<T> - kSlack || largest > kCentre<T> + kSlack) {
    // In two halves: a drive can lie further from the centre than one power of two reaches.
    const int64_t shift = kCentre<T> - largest;
    const T s1 = std::ldexp(T(1), static_cast<int>(shift / 2)), s2 = std::ldexp(T(1), static_cast<int>(shift - shift / 2));
    for (int64_t k = 0; k < n; k += width) store(out + k, load(out + k) * s1 * s2);
    exponent -= shift;
    largest += shift;
  }
}

// out = W a for one vector, W packed in panels of up to kVectorRow vectors: enough chains of additions to hide their
// latency.
constexpr int kVectorRow = 8;

template <typename T, int Vectors>
void vector_panel(const T* a, const T* b, int64_t depth, T* out) {
  constexpr int64_t width = Simd<T>::width;
  Vec<T> acc[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) acc[v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k, b += Vectors * width) {
    const T s = a[k];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) acc[v] += s * load(b + v * width);
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) store(out + v * width, acc[v]);
}
template <typename T, int... V>
constexpr std::array<void (*)(const T*, const T*, int64_t, T*), sizeof...(V)> vector_table(
    std::integer_sequence<int, V...>) {
  return {{&vector_panel<T, V + 1>...}};
}
template <typename T>
void matrix_vector(const Packed<T>& w, const T* a, T* out) {
  constexpr auto table = vector_table<T>(std::make_integer_sequence<int, kVectorRow>());
  for (int64_t p = 0; p < w.panels(); ++p) {
    table[w.row(p) / Simd<T>::width - 1](a, w.begin(p), w.depth, out + p * w.panel);
  }
}

// A chain that lies in `out`: `start`, then one row a step from `first` on in steps of `stride` rows.
template <typename T>
struct Chain {
  Rows<T> out;
  int64_t first, stride;
  const T* start;  // padded
  int64_t start_exponent;
  Drive<T> drive;
  bool fill;  // whether rows in closed form are wanted too
  T* coefficients[2];  // memory for those of a closed form
  // Whether the chain starts from nothing and is driven alike at every step, or at the first alone.
  bool from_nothing() const { return start_exponent == kZeroExponent && drive.row == 0 && drive.constant_from <= 1; }
};

// The chain is a map of its last row alone once the drive is constant. When it returns that row, bit for bit, every
// later step would too: the rest is copied. With h_0 = 0 and a constant drive this happens whenever the chain
// converges, since the map is monotone, rounding included, so that its rows only grow.
template <typename T>
bool has_converged(const Chain<T>& c, int64_t step, const T* row, const T* before, int64_t exponent,
                   int64_t exponent_before) {
  return step > c.drive.constant_from && exponent == exponent_before &&
         std::memcmp(row, before, c.out.row * sizeof(T)) == 0;
}

// Records that the chain has converged at step `at`; the row of step `done` stands for the steps after it.
template <typename T>
void end_converged(const Chain<T>& c, int64_t at, int64_t done, int64_t steps) {
  const int64_t from = c.first + done * c.stride;
  for (int64_t s = done + 1, t = from + c.stride; s < steps; ++s, t += c.stride) {
    if (c.fill) std::copy(c.out[from], c.out[from] + c.out.row, c.out[t]);
    c.out.exponent[t] = c.out.exponent[from];
    c.out.largest[t] = c.out.largest[from];
  }
  const int64_t begin = c.first + at * c.stride, end = c.first + (steps - 1) * c.stride;
  Closed<T>& closed = *c.out.closed_form;
  closed.first = std::min(begin, end);
  closed.last = std::max(begin, end) + 1;
  closed.count = 1;
  closed.basis[0] = c.out[from];
  closed.coefficients[0] = c.coefficients[0];
  std::fill(c.coefficients[0] + closed.first, c.coefficients[0] + closed.last, T(1));
}

// The relative error that a closed form may have: that of one rounding, and in double more than the noise of its ratios.
template <typename T>
constexpr double kClosedError = std::is_same<T, float>::value ? 0x1p-24 : 0x1p-44;

// A chain that starts from nothing is a sum of increments, x_{s+1} = d_0 + … + d_s with d_{s+1} = W̃ d_s, or the last of
// them where only its first step is driven. If lo d_s ≤ d_{s+1} ≤ hi d_s, entry by entry, multiplying by W̃ ≥ 0 shows
// lo d_{s+m} ≤ d_{s+m+1} ≤ hi d_{s+m}: from the step on at which the two are close enough for all steps that are left,
// the increments are a geometric sequence and the chain has a closed form. In double, so that rounding does not keep the
// ratios apart.
template <typename T>
class Increments {
 public:
  // `memory`: three vectors of c.out.row doubles.
  Increments(const Chain<T>& c, int64_t steps, int64_t w_exponent, double* memory)
      : now(memory), next(now + c.out.row), c_(c), steps_(steps), w_exponent_(w_exponent), sum_(next + c.out.row) {
    const int64_t t = c.first, drive_exponent = c.drive.exponent[t * c.drive.exponent_step];
    sums_ = steps > 1 && c.drive.exponent[(t + c.stride) * c.drive.exponent_step] != kZeroExponent;
    drives_ = drive_exponent != kZeroExponent;
    failed_ = !drives_;
    const double s = std::ldexp(1.0, static_cast<int>(-kCentre<T>));
    for (int64_t k = 0; k < c.out.row; ++k) sum_[k] = now[k] = c.drive.data[k] * s;
    exponent_ = sum_exponent_ = drive_exponent + kCentre<T>;
    std::fill(next, next + c.out.row, 0.0);
  }

  bool open() const { return !failed_ && !certified_; }
  bool certified() const { return certified_; }
  int64_t step() const { return s_; }
  int64_t written() const { return drives_ ? s_ + 1 : 0; }
  // The step from which on increments are too small to be seen, as far as the last ones tell.
  int64_t converges_after() const {
    const double left = high_ < 1 && sums_ ? std::log(0x1p-25 / share_) / std::log(high_) : 0x1p40;
    return s_ + static_cast<int64_t>(std::max(left, 0.0));
  }

  // Takes W̃ · now from `next`: the increment of the next step.
  void advance() {
    double low = std::numeric_limits<double>::infinity(), high = 0, top = 0;
    for (int64_t k = 0; k < c_.out.row; ++k) {
      top = std::max(top, next[k]);
      if (now[k] > 0) {
        const double r = next[k] / now[k];
        low = std::min(low, r);
        high = std::max(high, r);
      } else if (next[k] > 0) {
        high = std::numeric_limits<double>::infinity();
      }
    }
    const int64_t m = top > 0 ? std::ilogb(top) : 0, sum_before = sum_exponent_, exponent = exponent_ + w_exponent_ + m;
    const int64_t sum_exponent = sums_ ? std::max(sum_exponent_, exponent) : exponent;
    const double a = sums_ ? power_of_two<double>(sum_before - sum_exponent) : 0.0;
    const double b = power_of_two<double>(exponent - sum_exponent);
    // Sums and increments too far apart for one scale are left to the chain itself, which watches them unit by unit.
    if (!(top > 0) || s_ + 4 >= steps_ || (sums_ && a == 0.0) || b == 0.0) {
      failed_ = true;
      return;
    }
    ++s_;
    exponent_ = exponent;
    sum_exponent_ = sum_exponent;
    const double scale = std::ldexp(1.0, static_cast<int>(-m));
    double share = 0;
    for (int64_t k = 0; k < c_.out.row; ++k) {
      next[k] *= scale;
      sum_[k] = a * sum_[k] + b * next[k];
      if (next[k] > 0) share = std::max(share, b * next[k] / sum_[k]);
    }
    std::swap(now, next);
    certify(low, high, share);
  }

  // Writes the row of step `step()`.
  void write() const {
    if (written() == 0) return;
    const int64_t t = c_.first + s_ * c_.stride;
    write(sum_, sum_exponent_, c_.out[t], c_.out.exponent[t]);
    c_.out.largest[t] = kCentre<T>;
  }

  // Gives the chain its closed form, from the step after `step()` on. That step's row must have been written.
  void close() {
    const int64_t t = c_.first + s_ * c_.stride, left = steps_ - 1 - s_;
    T* const increment = c_.out[t + c_.stride];  // a row that the closed form leaves unused
    int64_t increment_exponent;
    write(now, exponent_, increment, increment_exponent);
    Closed<T>& closed = *c_.out.closed_form;
    const int64_t begin = t + c_.stride, end = t + left * c_.stride;
    closed.first = std::min(begin, end);
    closed.last = std::max(begin, end) + 1;
    closed.count = 2;
    closed.basis[0] = c_.out[t];
    closed.basis[1] = increment;
    for (int i = 0; i < 2; ++i) closed.coefficients[i] = c_.coefficients[i];
    // x_{s+m} = x_s + (ρ + … + ρ^m) d_s, or ρ^m d_s: g · 2^ge, with ρ = ratio_ · 2^ratio_exponent_, 1 ≤ ratio_ < 2.
    double g = sums_ ? 0.0 : 1.0;
    int64_t ge = 0;
    for (int64_t m = 1; m <= left; ++m) {
      if (sums_) g += power_of_two<double>(-ge);
      g *= ratio_;
      ge += ratio_exponent_;
      if (g > 0x1p30 || g < 0x1p-30) {
        const int64_t shift = std::ilogb(g);
        g = std::ldexp(g, static_cast<int>(-shift));
        ge += shift;
      }
      const int64_t row = t + m * c_.stride, high = increment_exponent + ge + std::max(0, std::ilogb(g));
      const int64_t exponent = sums_ ? std::max(c_.out.exponent[t], high) : high;
      c_.coefficients[0][row] = sums_ ? power_of_two<T>(c_.out.exponent[t] - exponent) : T(0);
      c_.coefficients[1][row] = static_cast<T>(g * power_of_two<double>(increment_exponent + ge - exponent));
      c_.out.exponent[row] = exponent;
      c_.out.largest[row] = kCentre<T> + 2;  // a bound
    }
  }

  double* now;
  double* next;

 private:
  void certify(double low, double high, double share) {
    const double left = static_cast<double>(steps_ - s_), spread = high / low - 1;
    double error = left / 2 * spread;
    const double true_high = std::ldexp(high, static_cast<int>(w_exponent_));
    high_ = true_high;
    share_ = share;
    if (sums_ && true_high < 1) {
      // No more is to come than a geometric series.
      const double true_low = std::ldexp(low, static_cast<int>(w_exponent_));
      error = std::min(error, share / 2 * (true_high / (1 - true_high) - true_low / (1 - true_low)));
    }
    // Increments that die, low = 0, have no ratio.
    certified_ = low > 0 && error <= kClosedError<T>;
    if (certified_) {
      const double ratio = std::sqrt(low) * std::sqrt(high);
      const int m = std::ilogb(ratio);
      ratio_ = std::ldexp(ratio, -m);
      ratio_exponent_ = w_exponent_ + m;
    } else if (s_ % kPatience == 0) {
      failed_ = !(spread < spread_before_ / 2);
      spread_before_ = spread;
    }
  }

  void write(const double* v, int64_t exponent, T* out, int64_t& out_exponent) const {
    const int64_t shift = kCentre<T> - std::ilogb(*std::max_element(v, v + c_.out.row));
    const double s = std::ldexp(1.0, static_cast<int>(shift));
    for (int64_t k = 0; k < c_.out.row; ++k) out[k] = static_cast<T>(v[k] * s);
    out_exponent = exponent - shift;
  }

  static constexpr int64_t kPatience = 4;  // steps in which the spread of the ratios must halve

  const Chain<T>& c_;
  int64_t steps_, w_exponent_, s_ = 0;
  double* sum_;
  int64_t exponent_, sum_exponent_;
  bool drives_, sums_, failed_, certified_ = false;
  double spread_before_ = std::numeric_limits<double>::infinity();
  double ratio_ = 1, high_ = 1, share_ = 1;
  int64_t ratio_exponent_ = 0;
};

// out = W a in double, W packed in panels.
template <typename T>
void matrix_vector_wide(const Packed<T>& w, const double* a, double* out) {
  constexpr int64_t width = Simd<double>::width, kBlock = 4;
  for (int64_t p = 0; p < w.panels(); ++p) {
    for (int64_t n = 0; n < w.row(p); n += kBlock * width) {
      const int64_t vectors = std::min(kBlock, (w.row(p) - n) / width);
      Vec<double> acc[kBlock] = {};
      const T* b = w.begin(p) + n;
      for (int64_t k = 0; k < w.depth; ++k, b += w.row(p)) {
        for (int64_t v = 0; v < vectors; ++v) acc[v] += a[k] * load_wide(b + v * width);
      }
      for (int64_t v = 0; v < vectors; ++v) store(out + p * w.panel + n + v * width, acc[v]);
    }
  }
}

// W̃^kLeap by two squarings, in rows padded to ld; false if entries underflowed, which one step at a time would not lose.
constexpr int64_t kLeap = 4;

template <typename T>
bool leap_matrix(const Packed<T>& w, int64_t w_exponent, Buffer<T>& power, int64_t& exponent) {
  const int64_t hidden = w.depth, ld = padded<T>(hidden);
  Buffer<T> square(hidden * ld), right(Packed<T>::size(hidden, hidden));
  const Packed<T> factor{right.data(), hidden, hidden, kPanel<T>};
  power.resize(hidden * ld);
  for (int64_t p = 0; p < w.panels(); ++p) {
    for (int64_t k = 0; k < hidden; ++k) {
      std::copy(w.begin(p) + k * w.row(p), w.begin(p) + (k + 1) * w.row(p), power.data() + k * ld + p * w.panel);
    }
  }
  exponent = w_exponent;
  const bool lost = FlushDenormals::lost();
  for (int64_t n = 1; n < kLeap; n *= 2) {
    pack(factor, power.data(), ld, 1, Team{}, [](T v) { return v; });
    Vec<T> most{};
    for (int64_t p = 0; p < factor.panels(); ++p) {
      Product<T> product{power.data(), ld, 1, factor.begin(p), factor.row(p), hidden};
      Tile<T> t{};
      t.num_products = 1;
      t.columns = factor.row(p);
      t.c = square.data() + p * factor.panel;
      t.c_row = ld;
      panel(t, &product, hidden);
    }
    for (int64_t at = 0; at < hidden * ld; at += Simd<T>::width) most = maximum<T>(most, load(square.data() + at));
    const int64_t m = magnitude(largest_lane<T>(most));
    if (m == kZeroExponent) return false;  // nilpotent: one step at a time ends sooner
    const T s = std::ldexp(T(1), static_cast<int>(-m));
    for (int64_t at = 0; at < hidden * ld; at += Simd<T>::width) store(power.data() + at, load(square.data() + at) * s);
    exponent = 2 * exponent + m;
  }
  if (lost || !FlushDenormals::lost()) return true;
  FlushDenormals::forget();
  return false;
}

// Steps [from, steps), kLeap at a time, where the drive has been one row, or none, for all but the first step:
// x_{s+m} = W̃^m x_s + d, d what m steps make of nothing. W̃^m is read once for m steps, whose rows fill a register tile.
template <typename T>
void leap(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, const Buffer<T>& power, int64_t power_exponent,
          int64_t from, int64_t steps) {
  const int64_t hidden = w.depth, ld = c.out.row, late = c.first + from * c.stride;
  Buffer<T> drive(2 * ld, T(0));
  T *driven = drive.data(), *before = driven + ld;
  int64_t drive_exponent = kZeroExponent, largest;
  for (int64_t n = 0; n < kLeap; ++n) {
    std::swap(driven, before);
    matrix_vector(w, before, driven);
    finish_step(driven, drive_exponent + w_exponent, c.drive.data, c.drive.exponent[late * c.drive.exponent_step], ld,
                drive_exponent, largest);
  }
  for (int64_t s = from; s < steps; s += kLeap) {
    const int64_t rows = std::min(kLeap, steps - s), t = c.first + s * c.stride, source = t - kLeap * c.stride;
    for (int64_t column = 0; column < ld; column += kPanel<T>) {
      Product<T> product{c.out[source], c.stride * ld, 1, power.data() + column, ld, hidden};
      Tile<T> tile{};
      tile.num_products = 1;
      tile.columns = std::min(kPanel<T>, ld - column);
      tile.c = c.out[t] + column;
      tile.c_row = c.stride * ld;
      panel(tile, &product, rows);
    }
    bool converged = rows == kLeap;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = t + r * c.stride, previous = row - c.stride;
      finish_step(c.out[row], c.out.exponent[source + r * c.stride] + power_exponent, driven, drive_exponent, ld,
                  c.out.exponent[row], c.out.largest[row]);
      converged = converged && has_converged(c, s + r, c.out[row], c.out[previous], c.out.exponent[row],
                                             c.out.exponent[previous]);
    }
    if (converged) return end_converged(c, s, s + rows - 1, steps);
  }
}

// Steps [done, until) by one thread, W̃ being packed and small enough for its cache; true if the chain converges.
template <typename T>
bool walk(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t& done, int64_t until, int64_t steps) {
  for (int64_t t = c.first + done * c.stride; done < until; ++done, t += c.stride) {
    const T* before = done ? c.out[t - c.stride] : c.start;
    const int64_t exponent = done ? c.out.exponent[t - c.stride] : c.start_exponent;
    T* out = c.out[t];
    matrix_vector(w, before, out);
    // The drive's rows run with the output's.
    finish_step(out, exponent + w_exponent, c.drive.data + t * c.drive.row,
                c.drive.exponent[t * c.drive.exponent_step], c.out.row, c.out.exponent[t], c.out.largest[t]);
    if (has_converged(c, done, out, before, c.out.exponent[t], exponent)) {
      end_converged(c, done, done, steps);
      return true;
    }
  }
  return false;
}

// The first steps, all of them if the chain converges or has a closed form: then it returns 0. Otherwise, the steps
// after which it may converge, as far as can be told, `done` of them being written.
template <typename T>
int64_t begin_chain(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t& done, int64_t steps) {
  // A chain that converges fast has done so at the first of these, mostly, one that converges at all at the second.
  constexpr int64_t kLooks[] = {24, 64};
  // Other ways must pay for themselves in the steps that are left.
  const bool closable = !c.fill && c.from_nothing() && steps - kLooks[0] >= w.depth;
  Buffer<double> memory(closable ? 3 * c.out.row : 0);
  std::optional<Increments<T>> increments;
  if (closable) increments.emplace(c, steps, w_exponent, memory.data());
  for (const int64_t look : kLooks) {
    if (walk(c, w, w_exponent, done, std::min(look, steps), steps) || done == steps) return 0;
    if (!closable) continue;
    // The closed form starts from a row that is written.
    while (increments->open() && increments->step() + 1 < done) {
      matrix_vector_wide(w, increments->now, increments->next);
      increments->advance();
    }
    if (increments->certified()) {
      increments->close();
      return 0;
    }
    if (!increments->open()) return std::min(increments->converges_after(), steps);
  }
  return steps;
}

// The rest of the steps.
template <typename T>
void end_chain(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t done, int64_t steps) {
  constexpr int64_t kWorthPowers = 3;
  if (done > kLeap && c.drive.row == 0 && steps - done >= kWorthPowers * w.depth) {
    Buffer<T> power;
    int64_t power_exponent;
    if (leap_matrix(w, w_exponent, power, power_exponent)) {
      return leap(c, w, w_exponent, power, power_exponent, done, steps);
    }
  }
  walk(c, w, w_exponent, done, steps, steps);
}

template <typename T>
void chain(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t steps) {
  int64_t done = 0;
  if (begin_chain(c, w, w_exponent, done, steps) > 0) end_chain(c, w, w_exponent, done, steps);
}

// One thread's copy of a chain's last two rows, for the plan below.
template <typename T>
struct Pair {
  T* now;
  T* next;
  int64_t exponent = kZeroExponent;
  int64_t converged_at = -1;  // the step at which the chain converged

  // Takes up the chain before step `from`.
  void begin(const Chain<T>& c, int64_t from) {
    const int64_t t = c.first + (from - 1) * c.stride;
    const T* row = from ? c.out[t] : c.start;
    std::copy(row, row + c.out.row, now);
    exponent = from ? c.out.exponent[t] : c.start_exponent;
  }

  // Finishes the step whose raw result lies in `next`; `writes` for the one thread that keeps it.
  void finish(const Chain<T>& c, int64_t s, int64_t w_exponent, bool writes) {
    const int64_t t = c.first + s * c.stride, before = exponent;
    int64_t largest;
    finish_step(next, before + w_exponent, c.drive.data + t * c.drive.row, c.drive.exponent[t * c.drive.exponent_step],
                c.out.row, exponent, largest);
    if (converged_at < 0 && has_converged(c, s, next, now, exponent, before)) converged_at = s;
    std::swap(now, next);
    if (!writes) return;
    std::copy(now, now + c.out.row, c.out[t]);
    c.out.exponent[t] = exponent;
    c.out.largest[t] = largest;
  }
};

// Both chains (or one) by a whole team over a W that no cache holds: each thread reads its rows of W once a step and
// uses them for h (a dot product a row) and for δ (a multiple of the row); W is squared in registers. Steps from `from`
// on, those before it having been written.
template <typename T, bool Forward, bool Backward>
void chains_shared(const Chain<T>& h, const Chain<T>& d, const Weights<T>& weight, int64_t hidden, int64_t from,
                   int64_t steps, Buffer<T>& scratch, const Team& team) {
  constexpr int64_t width = Simd<T>::width;
  constexpr int64_t kRows = 4;
  const int64_t ld = padded<T>(hidden);
  // Raw results are double-buffered by the parity of the step, so that one barrier a step is enough; then every thread
  // finishes the whole step for itself.
  T* const raw_h = scratch.data();
  T* const partial = raw_h + 2 * ld;
  T* const own = partial + 2 * team.size * ld + 4 * team.rank * ld;
  Pair<T> own_h{own, own + ld}, own_d{own + 2 * ld, own + 3 * ld};
  std::fill(own, own + 4 * ld, T(0));
  if (Forward) own_h.begin(h, from);
  if (Backward) own_d.begin(d, from);
  int64_t row_first, row_last;
  team.share(hidden, row_first, row_last);

  int64_t s = from;
  for (bool moving = true; moving && s < steps; ++s) {
    T* const next_h = raw_h + (s & 1) * ld;
    T* const next_d = partial + ((s & 1) * team.size + team.rank) * ld;
    if (Backward) std::fill(next_d, next_d + ld, T(0));
    for (int64_t j = row_first; j < row_last; j += kRows) {
      const int64_t rows = std::min(kRows, row_last - j);
      const T* w[kRows];
      T dj[kRows];
      Vec<T> dot[kRows];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        // Rows past the end repeat the last one, with a zero for δ; their dot products are not stored.
        w[r] = weight.data + (j + std::min(r, rows - 1)) * hidden;
        dj[r] = Backward && r < rows ? own_d.now[j + r] * (weight.row[j + r] * weight.row[j + r]) : T(0);
        dot[r] = Vec<T>{};
      }
      for (int64_t k = 0; k < hidden; k += width) {
        Vec<T> x{}, y{};
        const Vec<T> column = load(weight.column + k);
        if (Forward) x = load(own_h.now + k);
        if (Backward) y = load(next_d + k);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; ++r) {
          Vec<T> v = load(w[r] + k, hidden - k);
          v *= column;
          v *= v;
          if (Forward) dot[r] += v * x;
          if (Backward) y += v * dj[r];
        }
        if (Backward) store(next_d + k, y);
      }
      if (Forward) {
        for (int64_t r = 0; r < rows; ++r) {
          next_h[j + r] = lane_sum<T>(dot[r]) * (weight.row[j + r] * weight.row[j + r]);
        }
      }
    }
    team.wait();
    if (Forward) {
      std::copy(next_h, next_h + hidden, own_h.next);
      own_h.finish(h, s, weight.exponent, team.rank == 0);
    }
    if (Backward) {
      const T* parts = partial + (s & 1) * team.size * ld;
      for (int64_t k = 0; k < ld; k += width) {
        Vec<T> sum = load(parts + k);
        for (int64_t r = 1; r < team.size; ++r) sum += load(parts + r * ld + k);
        store(own_d.next + k, sum);
      }
      own_d.finish(d, s, weight.exponent, team.rank == team.size - 1);
    }
    moving = (Forward && own_h.converged_at < 0) || (Backward && own_d.converged_at < 0);
  }
  if (Forward && team.rank == 0 && own_h.converged_at >= 0) end_converged(h, own_h.converged_at, s - 1, steps);
  if (Backward && team.rank == team.size - 1 && own_d.converged_at >= 0) {
    end_converged(d, own_d.converged_at, s - 1, steps);
  }
  team.wait();
}

// The same read of W for the increments of both chains, or of one: until each has a closed form or none is in sight.
// `scratch` holds (8 + 7 · team.size) rows. Returns the number of steps written of the chains that have none.
template <typename T>
int64_t close_shared(const Chain<T>& h, const Chain<T>& d, const Weights<T>& weight, int64_t hidden, int64_t steps,
                     bool& forward, bool& backward, Buffer<double>& scratch, const Team& team) {
  constexpr int64_t width = Simd<double>::width;
  constexpr int64_t kRows = 4;
  const int64_t ld = h.out.row;
  double* const raw_h = scratch.data();
  double* const partial = raw_h + 2 * ld;
  double* const own = partial + 2 * team.size * ld + 6 * team.rank * ld;
  Increments<T> own_h(h, steps, weight.exponent, own), own_d(d, steps, weight.exponent, own + 3 * ld);
  if (forward && team.rank == 0) own_h.write();
  if (backward && team.rank == team.size - 1) own_d.write();
  int64_t row_first, row_last;
  team.share(hidden, row_first, row_last);
  while ((forward && own_h.open()) || (backward && own_d.open())) {
    const bool do_h = forward && own_h.open(), do_d = backward && own_d.open();
    const int64_t parity = (do_h ? own_h : own_d).step() & 1;
    double* const next_h = raw_h + parity * ld;
    double* const next_d = partial + (parity * team.size + team.rank) * ld;
    std::fill(next_d, next_d + ld, 0.0);
    for (int64_t j = row_first; j < row_last; j += kRows) {
      const int64_t rows = std::min(kRows, row_last - j);
      const T* w[kRows];
      double dj[kRows], factor[kRows];
      Vec<double> dot[kRows];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t row = j + std::min(r, rows - 1);
        w[r] = weight.data + row * hidden;
        factor[r] = static_cast<double>(weight.row[row]) * weight.row[row];
        dj[r] = do_d && r < rows ? own_d.now[row] * factor[r] : 0.0;
        dot[r] = Vec<double>{};
      }
      const int64_t whole = hidden / width * width;
      for (int64_t k = 0; k < whole; k += width) {
        const Vec<double> x = load(own_h.now + k);
        const Vec<double> column = load_wide(weight.column + k);
        Vec<double> y = load(next_d + k);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; ++r) {
          Vec<double> v = load_wide(w[r] + k) * column;
          v *= v;
          dot[r] += v * x;
          y += v * dj[r];
        }
        store(next_d + k, y);
      }
      for (int64_t r = 0; r < kRows; ++r) {
        double rest = 0;
        for (int64_t k = whole; k < hidden; ++k) {
          const double v = static_cast<double>(w[r][k]) * weight.column[k];
          rest += v * v * own_h.now[k];
          next_d[k] += v * v * dj[r];
        }
        if (r < rows) next_h[j + r] = (lane_sum<double>(dot[r]) + rest) * factor[r];
      }
    }
    team.wait();
    if (do_h) {
      std::copy(next_h, next_h + hidden, own_h.next);
      own_h.advance();
      if (team.rank == 0) own_h.write();
    }
    if (do_d) {
      const double* parts = partial + parity * team.size * ld;
      for (int64_t k = 0; k < ld; k += width) {
        Vec<double> sum = load(parts + k);
        for (int64_t r = 1; r < team.size; ++r) sum += load(parts + r * ld + k);
        store(own_d.next + k, sum);
      }
      own_d.advance();
      if (team.rank == team.size - 1) own_d.write();
    }
  }
  if (forward && own_h.certified() && team.rank == 0) own_h.close();
  if (backward && own_d.certified() && team.rank == team.size - 1) own_d.close();
  forward = forward && !own_h.certified();
  backward = backward && !own_d.certified();
  team.wait();
  // Of two chains that go on, both take the step at which the first gave up.
  return std::min(forward ? own_h.written() : steps, backward ? own_d.written() : steps);
}

// ---- what underflowed, and whether it matters ----

// Sums of products leave out what is too far below the largest for the dtype, and must. An entry is right all the same if
// it is far above the most that may be missing from it, or a true zero. Entries at which no row is positive:
template <typename T>
class Support {
 public:
  // Of `count` columns from `first` on, n rows: bit t of column k is set where row t is positive there.
  Support(const Rows<T>& rows, int64_t n, int64_t first, int64_t count)
      : words_((n + 63) / 64), bits_(words_ * count, 0) {
    const Closed<T> closed = rows.closed();
    const auto mark = [&](const T* row, int64_t t) {
      for (int64_t k = 0; k < count; ++k) {
        if (row[first + k] > T(0)) bits_[k * words_ + t / 64] |= uint64_t{1} << (t % 64);
      }
    };
    for (int64_t t = 0; t < n; ++t) {
      if (rows.exponent[t] == kZeroExponent) continue;
      if (!closed.holds(t)) mark(rows[t], t);
      // A coefficient too small for the dtype is not zero: the rows of a closed form are alike.
      for (int i = 0; i < closed.count && closed.holds(t); ++i) mark(closed.basis[i], t);
    }
  }
  bool any(int64_t k) const {
    return std::any_of(bits_.begin() + k * words_, bits_.begin() + (k + 1) * words_, [](uint64_t w) { return w != 0; });
  }
  bool meets(int64_t k, const Support& other, int64_t l) const {
    for (int64_t i = 0; i < words_; ++i) {
      if (bits_[k * words_ + i] & other.bits_[l * words_ + i]) return true;
    }
    return false;
  }

 private:
  int64_t words_;
  std::vector<uint64_t> bits_;
};

// The bits by which an entry must stand above what may be missing.
template <typename T>
constexpr int64_t kAbove = std::numeric_limits<T>::digits + 1;
// The magnitude of the largest entry of a row or of a basis of a closed form, at most, with its coefficient.
template <typename T>
constexpr int64_t kHighest = kCentre<T> + kSlack + 5;

// Whether any of n numbers is below `least`.
template <typename T>
bool any_below(const T* v, int64_t n, T least) {
  constexpr int64_t width = Simd<T>::width;
  Ints<T> found{}, others{};
  int64_t k = 0;
  for (; k + 2 * width <= n; k += 2 * width) {
    found |= load(v + k) < least;
    others |= load(v + k + width) < least;
  }
  found |= others;
  for (int64_t i = 0; i < width; ++i) {
    if (found[i]) return true;
  }
  return std::any_of(v + k, v + n, [least](T x) { return x < least; });
}
// Whether every positive number has become one that is normal.
template <typename T>
bool kept(const T* from, const T* to, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    if (from[k] > T(0) && to[k] < std::numeric_limits<T>::min()) return false;
  }
  return true;
}
inline int64_t log2_above(int64_t n) { return n <= 1 ? 0 : std::ilogb(static_cast<double>(n - 1)) + 1; }

// Σ_t row_t as a vector with an exponent: rows first … last-1, n numbers, `out` padded. Returns whether it is right.
template <typename T>
bool sum_rows(const Rows<T>& rows, int64_t first, int64_t last, int64_t n, T* out, int64_t& exponent) {
  constexpr int64_t width = Simd<T>::width;
  int64_t top = kZeroExponent;
  for (int64_t t = first; t < last; ++t) top = std::max(top, rows.exponent[t]);
  std::fill(out, out + rows.row, T(0));
  const auto add = [&](T s, const T* row) {
    for (int64_t k = 0; k < rows.row; k += width) store(out + k, load(out + k) + s * load(row + k));
  };
  const Closed<T> closed = rows.closed();
  double sums[Closed<T>::kMost] = {};
  for (int64_t t = first; t < last; ++t) {
    const T s = power_of_two<T>(rows.exponent[t] - top);
    if (s == T(0)) continue;
    if (!closed.holds(t)) {
      add(s, rows[t]);
      continue;
    }
    for (int i = 0; i < closed.count; ++i) sums[i] += s * closed.coefficients[i][t];
  }
  for (int i = 0; i < closed.count; ++i) add(static_cast<T>(sums[i]), closed.basis[i]);
  exponent = top;
  if (top == kZeroExponent) return true;
  const int64_t missing = log2_above(last - first) + std::numeric_limits<T>::min_exponent + kHighest<T>;
  const T least = power_of_two<T>(missing + kAbove<T>);
  if (!any_below(out, n, least)) return true;
  const Support<T> support(rows.from(first), last - first, 0, n);
  for (int64_t k = 0; k < n; ++k) {
    if (out[k] < least && support.any(k)) return false;
  }
  return true;
}

// out = the first n numbers of a padded vector, on the scale that suits a result; returns that scale's exponent, and
// whether all of them are held.
template <typename T>
int64_t copy_result(const T* vector, int64_t exponent, int64_t n, T* out, bool& held) {
  const int64_t m = magnitude(*std::max_element(vector, vector + n));
  const int64_t result = result_exponent(m == kZeroExponent ? m : m + exponent);
  const T s = m == kZeroExponent ? T(0) : std::ldexp(T(1), static_cast<int>(exponent - result));
  std::transform(vector, vector + n, out, [s](T v) { return v * s; });
  held = kept(vector, out, n);
  return result;
}

// As many ones as a vector has lanes.
template <typename T>
constexpr std::array<T, Simd<T>::width> kLanes = [] {
  std::array<T, Simd<T>::width> ones{};
  for (T& one : ones) one = 1;
  return ones;
}();

// Σ_t d_t h_tᵀ, steps 0 … n-1, columns [j0, j1) of d, on the scale 2^exponent, as at most two products: one of the few
// vectors that closed forms leave, one of the steps at which both chains move.
template <typename T>
struct PairSum {
  int64_t exponent = kZeroExponent;
  int64_t largest = kZeroExponent;  // a bound of the largest d_t h_tᵀ, its magnitude on the scale 1
  int64_t missing = 0;              // what may be missing from an entry is below 2^missing, on the scale 2^exponent
  bool drops = false;               // whether a step has been left out, which raises no flag
  int count = 0;
  Product<T> products[2];

  static int64_t left_size(int64_t n, int64_t columns) { return (n + 2 * Closed<T>::kMost) * columns; }
  static int64_t right_size(int64_t ld) { return 2 * Closed<T>::kMost * ld; }

  // `left` and `right` are memory of the sizes above.
  PairSum(const Rows<T>& d, const Rows<T>& h, int64_t n, int64_t j0, int64_t j1, T* left, T* right) {
    for (int64_t t = 0; t < n; ++t) {
      const int64_t x = d.exponent[t] + h.exponent[t];
      exponent = std::max(exponent, x);
      largest = std::max(largest, x + d.largest[t] + h.largest[t]);
    }
    // A row of zeros has a sum far below every other.
    if (largest <= kZeroExponent / 2) {
      exponent = largest = kZeroExponent;
      return;
    }
    const int64_t own = j1 - j0, ld = h.row;
    const Closed<T> dc = d.closed(), hc = h.closed();
    const int depth = dc.count + hc.count;
    // What may have underflowed is a scaled row of d, which meets h; with a closed form a coefficient, which meets both.
    const int64_t factors = depth > 0 ? 2 : 1;
    missing = std::numeric_limits<T>::min_exponent + factors * kHighest<T>;
    const auto scale = [&](int64_t t) {
      const int64_t x = d.exponent[t] + h.exponent[t];
      const T s = power_of_two<T>(x - exponent);
      if (s == T(0) && x > kZeroExponent / 2) {
        drops = true;
        missing = std::max(missing, x - exponent + d.largest[t] + h.largest[t] + 2);
      }
      return s;
    };
    if (depth > 0) {
      // Row i of `right` meets the basis of d; the rows after them are the basis of h, met by sums over d.
      std::fill(right, right + dc.count * ld, T(0));
      std::fill(left + dc.count * own, left + depth * own, T(0));
      for (int i = 0; i < dc.count; ++i) std::copy(dc.basis[i] + j0, dc.basis[i] + j1, left + i * own);
      for (int l = 0; l < hc.count; ++l) std::copy(hc.basis[l], hc.basis[l] + ld, right + (dc.count + l) * ld);
    }
    // Between these steps each chain either moves or is in closed form.
    std::array<int64_t, 6> ends{0, dc.first, dc.last, hc.first, hc.last, n};
    for (int64_t& t : ends) t = std::min(t, n);
    std::sort(ends.begin(), ends.end());
    for (size_t e = 0; e + 1 < ends.size(); ++e) {
      const int64_t from = ends[e], to = ends[e + 1];
      if (from == to) continue;
      if (dc.holds(from) && hc.holds(from)) {
        double sums[Closed<T>::kMost][Closed<T>::kMost];
        dots(d, h, dc, hc, from, to, sums);
        for (int i = 0; i < dc.count; ++i) {
          for (int l = 0; l < hc.count; ++l) axpy(static_cast<T>(sums[i][l]), hc.basis[l], ld, right + i * ld);
        }
      } else if (dc.holds(from)) {
        for (int64_t t = from; t < to; ++t) {
          for (int i = 0; i < dc.count; ++i) axpy(scale(t) * dc.coefficients[i][t], h[t], ld, right + i * ld);
        }
      } else if (hc.holds(from)) {
        for (int64_t t = from; t < to; ++t) {
          for (int l = 0; l < hc.count; ++l) {
            const T s = scale(t) * hc.coefficients[l][t];
            T* out = left + (dc.count + l) * own;
            for (int64_t j = 0; j < own; ++j) out[j] += s * d[t][j0 + j];
          }
        }
      } else {
        T* const rows = left + depth * own;
        for (int64_t t = from; t < to; ++t) {
          const T s = scale(t);
          T* out = rows + (t - from) * own;
          for (int64_t j = 0; j < own; ++j) out[j] = d[t][j0 + j] * s;
        }
        products[count++] = {rows, 1, own, h[from], ld, to - from};
      }
    }
    if (depth > 0) products[count++] = {left, 1, own, right, ld, depth};
    missing += log2_above(n);
  }

  // out = alpha · the sum, [j1 - j0, columns]. Returns whether an entry is below `least`, while it is in a cache.
  bool multiply(T* out, int64_t row, int64_t rows, int64_t columns, T alpha, T least = 0) const {
    Ints<T> below{};
    for (int64_t column = 0; column < columns; column += kPanel<T>) {
      Product<T> parts[2];
      for (int i = 0; i < count; ++i) {
        parts[i] = products[i];
        parts[i].b += column;
      }
      Tile<T> t{};
      t.num_products = count;
      t.columns = std::min(kPanel<T>, columns - column);
      t.c = out + column;
      t.c_row = row;
      t.alpha = alpha;
      panel(t, parts, rows);
      const int64_t whole = t.columns / Simd<T>::width * Simd<T>::width;
      for (int64_t j = 0; least > T(0) && j < rows; ++j) {
        const T* const c = t.c + j * row;
        for (int64_t k = 0; k < whole; k += Simd<T>::width) below |= load(c + k) < least;
        // Lanes beyond the end are zeros, which are no entries.
        if (whole < t.columns) {
          const Vec<T> v = load(c + whole, t.columns - whole), ends = load(kLanes<T>.data(), t.columns - whole);
          below |= (v < least) & (ends > T(0));
        }
      }
    }
    for (int64_t i = 0; i < Simd<T>::width; ++i) {
      if (below[i]) return true;
    }
    return false;
  }

 private:
  // sums[i][l] = Σ_t 2^(exponents of d and h - exponent) · (coefficient i of d)[t] · (coefficient l of h)[t].
  void dots(const Rows<T>& d, const Rows<T>& h, const Closed<T>& dc, const Closed<T>& hc, int64_t from, int64_t to,
            double (&sums)[Closed<T>::kMost][Closed<T>::kMost]) {
    typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
    constexpr int64_t width = Simd<double>::width, kLeast = -1022, kBias = 1023;
    Vec<double> parts[Closed<T>::kMost][Closed<T>::kMost] = {};
    Integers lows{};
    int64_t t = from;
    for (; t + width <= to; t += width) {
      Integers x, y;
      std::memcpy(&x, d.exponent + t, sizeof(x));
      std::memcpy(&y, h.exponent + t, sizeof(y));
      x += y - exponent;
      lows |= x < kLeast;
      x = x < kLeast ? Integers{} - kBias : x;
      x = (x + kBias) << 52;
      Vec<double> scale;
      std::memcpy(&scale, &x, sizeof(scale));
      for (int i = 0; i < dc.count; ++i) {
        const Vec<double> a = scale * load_wide(dc.coefficients[i] + t);
        for (int l = 0; l < hc.count; ++l) parts[i][l] += a * load_wide(hc.coefficients[l] + t);
      }
    }
    for (int64_t i = 0; i < width; ++i) drops = drops || lows[i] != 0;
    for (int i = 0; i < dc.count; ++i) {
      for (int l = 0; l < hc.count; ++l) sums[i][l] = lane_sum<double>(parts[i][l]);
    }
    for (; t < to; ++t) {
      const double scale = power_of_two<double>(d.exponent[t] + h.exponent[t] - exponent);
      drops |= scale == 0;
      for (int i = 0; i < dc.count; ++i) {
        for (int l = 0; l < hc.count; ++l) {
          sums[i][l] += scale * static_cast<double>(dc.coefficients[i][t]) * hc.coefficients[l][t];
        }
      }
    }
  }

  static void axpy(T s, const T* x, int64_t n, T* y) {
    for (int64_t k = 0; k < n; k += Simd<T>::width) store(y + k, load(y + k) + s * load(x + k));
  }
};

// A bound of the largest d_t h_tᵀ, steps 0 … n-1, its magnitude on the scale 1.
template <typename T>
int64_t largest_pair(const Rows<T>& d, const Rows<T>& h, int64_t n) {
  int64_t largest = kZeroExponent;
  for (int64_t t = 0; t < n; ++t) largest = std::max(largest, d.exponent[t] + h.exponent[t] + d.largest[t] + h.largest[t]);
  return largest <= kZeroExponent / 2 ? kZeroExponent : largest;
}

// out[j, k] = Σ_t d_t[j] h_t[k], rows of `row` numbers, with its exponent: κ⁽¹⁾ of a matrix, or of some columns of one,
// whose largest_pair elsewhere is `beside`; split by rows over the team. Returns whether this thread's are right.
template <typename T>
bool outer_sum(const Rows<T>& d, const Rows<T>& h, int64_t n, int64_t rows, int64_t columns, T* out, int64_t row,
               int64_t beside, int64_t& exponent, T* left, T* right, const Team& team) {
  int64_t first, last;
  team.share(rows, first, last);
  const PairSum<T> sum(d, h, n, first, last, left, right);
  const int64_t result = result_exponent(std::max(sum.largest, beside));
  if (team.rank == 0) exponent = result;
  // Beside something far larger in two steps: the scale may be out of range where the entries are not.
  const int64_t shift = sum.count == 0 ? 0 : sum.exponent - result;
  const int64_t at_once = std::max<int64_t>(shift, std::numeric_limits<T>::min_exponent);
  const int64_t missing = std::max<int64_t>(sum.missing + kAbove<T> + shift, std::numeric_limits<T>::min_exponent);
  const T least = sum.count == 0 ? T(0) : power_of_two<T>(missing), rest = power_of_two<T>(shift - at_once);
  const bool below = sum.multiply(out + first * row, row, last - first, columns, power_of_two<T>(at_once), least);
  for (int64_t j = first; rest != T(1) && j < last; ++j) {
    for (int64_t k = 0; k < columns; ++k) out[j * row + k] *= rest;
  }
  if (sum.count == 0 || (!below && rest == T(1))) return true;
  std::optional<Support<T>> of_h;
  for (int64_t j = first; j < last; ++j) {
    const T* const own = out + j * row;
    if (!any_below(own, columns, least)) continue;
    const Support<T> of_d(d, n, j, 1);
    if (!of_d.any(0)) continue;
    if (!of_h) of_h.emplace(h, n, 0, columns);
    for (int64_t k = 0; k < columns; ++k) {
      if (own[k] < least && of_d.meets(0, *of_h, k)) return false;
    }
  }
  return true;
}

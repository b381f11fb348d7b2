// Lanes of vectors, powers of two, and binary exponents, exact also where squares would leave the dtype.

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
// The same of every lane, n ≤ 0.
inline Vec<double> powers_of_two(const Vec<int64_t>& n) {
  const Vec<int64_t> bits = n < -1022 ? Vec<int64_t>{} : (n + 1023) << 52;
  Vec<double> result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
// A row of ones, as long as what a step takes at once.
constexpr int64_t kRun = 256;
template <typename T>
constexpr std::array<T, kRun> kOnes = [] {
  std::array<T, kRun> ones{};
  for (T& one : ones) one = 1;
  return ones;
}();
template <typename T>
inline int64_t magnitude(T largest) {
  return largest > T(0) ? std::ilogb(largest) : kZeroExponent;
}
template <typename V>
inline auto largest_lane(const V& v) {
  auto m = v[0];
  for (size_t i = 1; i < sizeof(v) / sizeof(v[0]); ++i) m = std::max(m, v[i]);
  return m;
}
template <typename V>
inline bool any_lane(const V& v) {
  for (size_t i = 0; i < sizeof(v) / sizeof(v[0]); ++i) {
    if (v[i]) return true;
  }
  return false;
}
// An instruction set may have a faster one.
template <typename V>
inline V inverse(const V& v) {
  return 1 / v;
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
template <typename V>
inline V maximum(const V& a, const V& b) {
  return a > b ? a : b;
}

template <typename T>
using Int = std::conditional_t<std::is_same<T, float>::value, int32_t, int64_t>;
template <typename T>
using Ints = Vec<Int<T>>;

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

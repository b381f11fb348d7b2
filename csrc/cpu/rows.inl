// Rows of numbers with a power-of-two exponent each, some of them in closed form.

// The largest entry of a chain's vector is kept within 2^(kCentre ± kSlack): high enough that an entry 2^-126 below
// it is still normal, low enough that products of h and δ, summed over T and H, stay finite.
template <typename T>
constexpr int64_t kCentre = std::is_same<T, float>::value ? 40 : 400;
constexpr int64_t kSlack = 6;
// Rows this far below the largest cannot reach the smallest number that the result can hold beside it.
template <typename T>
constexpr int64_t kNegligible = std::is_same<T, float>::value ? 240 : 1900;
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

// `count` sequences of n rows each.
template <typename T>
class Sequences {
 public:
  Sequences() = default;
  Sequences(int64_t count, int64_t n, int64_t row, T* memory)
      : n_(n), row_(row), data_(memory),
        exponent_(count * n, kZeroExponent), largest_(count * n, kZeroExponent), closed_(count) {}
  Rows<T> operator[](int64_t i) {
    const int64_t at = i * n_;
    return {data_ + at * row_, exponent_.data() + at, largest_.data() + at, row_, &closed_[i]};
  }

 private:
  int64_t n_ = 0, row_ = 0;
  T* data_ = nullptr;
  std::vector<int64_t> exponent_, largest_;
  std::vector<Closed<T>> closed_;
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
inline void mark_underflow() {
  volatile float tiny = std::numeric_limits<float>::min();
  volatile float underflowed = tiny * tiny;
  (void)underflowed;
}

// v · 2^shift, of whole vectors; in two factors, which are returned, as one may be out of range.
template <typename T>
[[gnu::always_inline]] inline std::pair<T, T> scale(T* v, int64_t n, int64_t shift) {
  const T s1 = power_of_two<T>(shift / 2), s2 = power_of_two<T>(shift - shift / 2);
  for (int64_t k = 0; shift != 0 && k < n; k += Simd<T>::width) store(v + k, load(v + k) * s1 * s2);
  return {s1, s2};
}
template <typename T>
int64_t magnitude(const T* v, int64_t n) {  // of the largest entry, of whole vectors
  Vec<T> most{};
  for (int64_t k = 0; k < n; k += Simd<T>::width) most = maximum(most, load(v + k));
  return magnitude(largest_lane(most));
}
// What brings a vector whose largest entry is near 2^m to the centre; 0 where it is there, or m is of none.
template <typename T>
int64_t to_centre(int64_t m) {
  return m == kZeroExponent || std::abs(kCentre<T> - m) <= kSlack ? 0 : kCentre<T> - m;
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
  if (driven && b == T(0) && !covers(out, drive, n)) mark_underflow();
  if (moved && a == T(0) && !covers(drive, out, n)) mark_underflow();
  Vec<T> most{};
  if (b != T(0)) {
    for (int64_t k = 0; k < n; k += width) {
      const Vec<T> r = a * load(out + k) + b * load(drive + k);
      store(out + k, r);
      most = maximum(most, r);
    }
  } else {
    for (int64_t k = 0; k < n; k += width) most = maximum(most, load(out + k));
  }
  largest = magnitude(largest_lane(most));
  if (largest == kZeroExponent) {
    exponent = kZeroExponent;
  } else if (const int64_t shift = to_centre<T>(largest); shift != 0) {
    scale(out, n, shift);
    exponent -= shift;
    largest += shift;
  }
}

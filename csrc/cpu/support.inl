// Whether what underflowed in a sum matters.

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
  return any_lane(found | others) || std::any_of(v + k, v + n, [least](T x) { return x < least; });
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

// out = the first n numbers of a padded vector, on the scale that suits a result, beside others of magnitude `beside` at
// most; returns that scale's exponent, and whether all of them are held.
template <typename T>
int64_t copy_result(const T* vector, int64_t exponent, int64_t n, T* out, bool& held, int64_t beside = kZeroExponent) {
  const int64_t m = magnitude(*std::max_element(vector, vector + n));
  const int64_t result = result_exponent(m == kZeroExponent ? beside : std::max(m + exponent, beside));
  // In two halves: the scale may be out of range where the entries are not.
  const int64_t shift = m == kZeroExponent ? 0 : exponent - result;
  const T s1 = power_of_two<T>(shift / 2), s2 = power_of_two<T>(shift - shift / 2);
  std::transform(vector, vector + n, out, [=](T v) { return v * s1 * s2; });
  held = kept(vector, out, n);
  return result;
}

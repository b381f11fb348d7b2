// Geometric scans of the rows of δ or of h: E_t = ρ (x_t + E_{t'}), t' the row before or after.

template <typename T>
struct Scan {
  std::vector<int64_t> exponent, largest;
  std::vector<T> coefficients;
  Closed<T> closed;
  T* data;
  int64_t row;

  Scan(T* memory, int64_t n, int64_t entries) : exponent(n), largest(n), data(memory), row(padded<T>(entries)) {}
  Rows<T> rows() { return {data, exponent.data(), largest.data(), row, &closed}; }
  // Brings row t, on the scale 2^e, near the centre; returns the two factors that do.
  std::pair<T, T> centre(int64_t t, int64_t e) {
    T* const out = data + t * row;
    const int64_t m = magnitude(out, row), shift = to_centre<T>(m);
    exponent[t] = m == kZeroExponent ? kZeroExponent : e - shift;
    largest[t] = m == kZeroExponent ? kZeroExponent : m + shift;
    return scale(out, row, shift);
  }
};

// Entries [j0, j0 + own) of row t, near the centre, and their exponent: the rest of the row may be far larger.
template <typename T>
[[gnu::always_inline]] inline int64_t own_part(const Rows<T>& rows, const Closed<T>& closed, int64_t t, int64_t j0, int64_t own,
                                               Buffer<T>& out) {
  std::fill(out.begin(), out.end(), T(0));
  if (rows.exponent[t] == kZeroExponent) return kZeroExponent;
  const bool is_closed = closed.holds(t);
  for (int b = 0; b < (is_closed ? closed.count : 1); ++b) {
    const T c = is_closed ? closed.coefficients[b][t] : T(1);
    const T* row = (is_closed ? closed.basis[b] : rows[t]) + j0;
    for (int64_t j = 0; j < own; ++j) out[j] += c * row[j];
  }
  const int64_t n = static_cast<int64_t>(out.size()), m = magnitude(out.data(), n), shift = to_centre<T>(m);
  if (m == kZeroExponent) return m;
  scale(out.data(), n, shift);
  return rows.exponent[t] - shift;
}
// 2^(exponent - top) beside a term on the scale 2^top; `dropped`: it is not zero, but too small for the dtype.
template <typename T>
T beside(int64_t exponent, int64_t top, bool& dropped) {
  const T scale = exponent == kZeroExponent ? T(0) : power_of_two<T>(exponent - top);
  dropped = dropped || (scale == T(0) && exponent != kZeroExponent);
  return scale;
}

// From row `first` on in the direction `step`, for every ρ in [low, high] · 2^exponent: the middles go to `e`, and to
// `width` the largest half width over the middle. Returns whether nothing underflowed.
template <typename T>
bool scan(const Rows<T>& in, int64_t first, int64_t step, int64_t j0, int64_t own, const T* low, const T* high,
          int64_t ratio_exponent, Scan<T>& e, T* width) {
  const Closed<T> closed = in.closed();
  const int64_t n = static_cast<int64_t>(e.exponent.size());
  Buffer<T> x(e.row), least(e.row, T(0)), most(e.row, T(0));
  std::fill(width, width + own, T(0));
  int64_t before = kZeroExponent;
  bool dropped = false;
  FlushDenormals::forget();
  // In explicit vectors: what a compiler makes of a loop with a condition may raise flags for lanes that do not count.
  constexpr int64_t lanes = Simd<T>::width;
  const Vec<T> one = Vec<T>{} + T(1), infinity = Vec<T>{} + std::numeric_limits<T>::infinity();
  for (int64_t i = 0, t = first; i < n; ++i, t += step) {
    const int64_t given = own_part(in, closed, t, j0, own, x), top = std::max(before, given);
    bool left = false;
    const T a = beside<T>(before, top, left), b = beside<T>(given, top, left);
    if (left) dropped = dropped || !covers(a > T(0) ? least.data() : x.data(), a > T(0) ? x.data() : most.data(), own);
    T* const out = e.data + t * e.row;
    for (int64_t j = 0; j < own; j += lanes) {
      const Vec<T> given_j = b * load(x.data() + j);
      const Vec<T> l = load(low + j0 + j, own - j) * (a * load(least.data() + j) + given_j);
      const Vec<T> m = load(high + j0 + j, own - j) * (a * load(most.data() + j) + given_j);
      store(least.data() + j, l);
      store(most.data() + j, m);
      store(out + j, (l + m) * T(0.5));
      const Vec<T> half = (m - l) / (m > T(0) ? m + l : one), w = load(width + j, own - j);
      store(width + j, half <= w ? w : half == half ? half : infinity, own - j);
    }
    const auto [s1, s2] = e.centre(t, top + ratio_exponent);
    for (int64_t j = 0; j < own; j += lanes) {
      store(least.data() + j, load(least.data() + j) * s1 * s2);
      store(most.data() + j, load(most.data() + j) * s1 * s2);
    }
    before = e.exponent[t];
  }
  return !dropped && !FlushDenormals::underflowed();
}

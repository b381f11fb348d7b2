// Sums of outer products over time: κ⁽¹⁾, and C of κ⁽²⁾.

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
  PairSum(const Rows<T>& d, const Rows<T>& h, int64_t n, int64_t j0, int64_t j1, T* left, T* right)
      : d_(d), h_(h), dc_(d.closed()), hc_(h.closed()), j0_(j0), own_(j1 - j0), left_(left), right_(right) {
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
    const int depth = dc_.count + hc_.count;
    // What may have underflowed is a scaled row of d, which meets h; with a closed form a coefficient, which meets both.
    missing = std::numeric_limits<T>::min_exponent + (depth > 0 ? 2 : 1) * kHighest<T>;
    if (depth > 0) place_bases(depth);
    // Between these steps each chain either moves or is in closed form.
    std::array<int64_t, 6> ends{0, dc_.first, dc_.last, hc_.first, hc_.last, n};
    for (int64_t& t : ends) t = std::min(t, n);
    std::sort(ends.begin(), ends.end());
    for (size_t e = 0; e + 1 < ends.size(); ++e) {
      if (ends[e] < ends[e + 1]) add(ends[e], ends[e + 1], depth);
    }
    if (depth > 0) products[count++] = {left, 1, own_, right, h.row, depth};
    missing += log2_above(n);
  }

  // out = alpha · the sum, [j1 - j0, columns]. Returns whether an entry is below `least`, while it is in a cache.
  bool multiply(T* out, int64_t row, int64_t rows, int64_t columns, T alpha, T least = 0) const {
    Ints<T> below{};
    panels(products, count, out, row, rows, columns, alpha, [&](int64_t width, const T* panel) {
      const int64_t whole = width / Simd<T>::width * Simd<T>::width;
      for (int64_t j = 0; least > T(0) && j < rows; ++j) {
        const T* const c = panel + j * row;
        for (int64_t k = 0; k < whole; k += Simd<T>::width) below |= load(c + k) < least;
        // Lanes beyond the end are zeros, which are no entries.
        if (whole < width) {
          const Vec<T> v = load(c + whole, width - whole), ends = load(kOnes<T>.data(), width - whole);
          below |= (v < least) & (ends > T(0));
        }
      }
    });
    return any_lane(below);
  }

 private:
  // Row i of `right` meets the basis of d; the rows after them are the basis of h, met by sums over d.
  void place_bases(int depth) {
    const int64_t ld = h_.row;
    std::fill(right_, right_ + dc_.count * ld, T(0));
    std::fill(left_ + dc_.count * own_, left_ + depth * own_, T(0));
    for (int i = 0; i < dc_.count; ++i) std::copy(dc_.basis[i] + j0_, dc_.basis[i] + j0_ + own_, left_ + i * own_);
    for (int l = 0; l < hc_.count; ++l) std::copy(hc_.basis[l], hc_.basis[l] + ld, right_ + (dc_.count + l) * ld);
  }

  // Steps [from, to).
  void add(int64_t from, int64_t to, int depth) {
    const int64_t ld = h_.row;
    if (dc_.holds(from) && hc_.holds(from)) {
      double sums[Closed<T>::kMost][Closed<T>::kMost];
      dots(from, to, sums);
      for (int i = 0; i < dc_.count; ++i) {
        for (int l = 0; l < hc_.count; ++l) axpy(static_cast<T>(sums[i][l]), hc_.basis[l], ld, right_ + i * ld);
      }
      return;
    }
    T* const rows = left_ + depth * own_;
    for (int64_t t = from; t < to; ++t) {
      const T s = step_scale(t);
      if (dc_.holds(from)) {
        for (int i = 0; i < dc_.count; ++i) axpy(s * dc_.coefficients[i][t], h_[t], ld, right_ + i * ld);
      } else if (hc_.holds(from)) {
        for (int l = 0; l < hc_.count; ++l) {
          const T c = s * hc_.coefficients[l][t];
          T* out = left_ + (dc_.count + l) * own_;
          for (int64_t j = 0; j < own_; ++j) out[j] += c * d_[t][j0_ + j];
        }
      } else {
        T* out = rows + (t - from) * own_;
        for (int64_t j = 0; j < own_; ++j) out[j] = d_[t][j0_ + j] * s;
      }
    }
    if (!dc_.holds(from) && !hc_.holds(from)) products[count++] = {rows, 1, own_, h_[from], ld, to - from};
  }

  // 2^(exponents of step t - exponent).
  T step_scale(int64_t t) {
    const int64_t x = d_.exponent[t] + h_.exponent[t];
    const T s = power_of_two<T>(x - exponent);
    if (s == T(0) && x > kZeroExponent / 2) {
      drops = true;
      missing = std::max(missing, x - exponent + d_.largest[t] + h_.largest[t] + 2);
    }
    return s;
  }

  // sums[i][l] = Σ_t 2^(exponents of d and h - exponent) · (coefficient i of d)[t] · (coefficient l of h)[t].
  void dots(int64_t from, int64_t to, double (&sums)[Closed<T>::kMost][Closed<T>::kMost]) {
    constexpr int64_t width = Simd<double>::width;
    Vec<double> parts[Closed<T>::kMost][Closed<T>::kMost] = {};
    Vec<int64_t> lows{};
    int64_t t = from;
    for (; t + width <= to; t += width) {
      const Vec<int64_t> x = load(d_.exponent + t) + (load(h_.exponent + t) - exponent);
      lows |= x < -1022;
      const Vec<double> scale = powers_of_two(x);
      for (int i = 0; i < dc_.count; ++i) {
        const Vec<double> a = scale * load_wide(dc_.coefficients[i] + t);
        for (int l = 0; l < hc_.count; ++l) parts[i][l] += a * load_wide(hc_.coefficients[l] + t);
      }
    }
    drops |= any_lane(lows);
    for (int i = 0; i < dc_.count; ++i) {
      for (int l = 0; l < hc_.count; ++l) sums[i][l] = lane_sum<double>(parts[i][l]);
    }
    for (; t < to; ++t) {
      const double scale = power_of_two<double>(d_.exponent[t] + h_.exponent[t] - exponent);
      drops |= scale == 0;
      for (int i = 0; i < dc_.count; ++i) {
        for (int l = 0; l < hc_.count; ++l) {
          sums[i][l] += scale * static_cast<double>(dc_.coefficients[i][t]) * hc_.coefficients[l][t];
        }
      }
    }
  }

  static void axpy(T s, const T* x, int64_t n, T* y) {
    for (int64_t k = 0; k < n; k += Simd<T>::width) store(y + k, load(y + k) + s * load(x + k));
  }

  const Rows<T> d_, h_;
  const Closed<T> dc_, hc_;
  const int64_t j0_, own_;
  T *left_, *right_;
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

// The tail of S with W̃^{n+m} between lo^m W̃ⁿ and hi^m W̃ⁿ, and its bound: reference._geometric, which proves it.

template <typename T>
class Geometric {
 public:
  Geometric(int64_t hidden, int threads) : H_(hidden), memory_((5 + 2 * threads) * ld_) {}

  // Whether the ratios of the next power to this one are so close, in every column of P or in every row, that the sum of
  // all later lags is enclosed tightly enough; then the middle of the enclosure is added.
  bool certifies(Lags<T>& s, Powers<T>& powers, int64_t lag, double& bound) {
    powers.form(lag + 1, s.team);
    // Nilpotent: the next lag ends the sum. What underflowed has no ratio.
    if (powers.exponent(lag) == kZeroExponent || powers.missing(lag) > 0) return false;
    // The share of the lag that has just been added, for guesses whether it is worth the sums below.
    const T scale = s.scale_beside(lag - 1);
    const auto added = [&](int64_t j, int64_t k) {
      return load(s.sums + j * ld_ + k) * load(powers[lag - 1] + j * ld_ + k) * scale;
    };
    // One row of S tells for most matrices that it is not.
    T half = 0, one = 0;
    if (s.j0 < s.j1) {
      half = half_width(powers, lag, s.j0);
      one = s.largest_share(s.j0, [&](int64_t k) { return added(s.j0, k); });
    }
    if (!promises(s, half, one, lag)) return false;
    const T share = s.largest_share(added);
    find_ratios(s, lag);
    const auto finite = [&](const T* v) { return *std::max_element(v, v + H_) < std::numeric_limits<T>::infinity(); };
    return (finite(column_high_) && by_columns(s, lag, share, bound)) || (finite(row_high_) && by_rows(s, lag, share, bound));
  }

  // Whether W̃ is diagonal: then its first power tells all the others.
  bool diagonal(const Lags<T>& s) {
    T beside = 0;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T* q = s.powers[0] + j * ld_;
      for (int64_t k = 0; k < H_ && beside == T(0); ++k) beside = k == j ? T(0) : q[k];
      column_low_[j] = column_high_[j] = q[j];
    }
    return s.largest_of(beside) == T(0);
  }
  void add_diagonal_tail(Lags<T>& s) {
    const int64_t own = s.j1 - s.j0;
    Scan<T> e(s.scans(), later(s, 0), own);
    s.underflowed |= !scan_columns(s, 0, s.powers.exponent(0), e);
    // Rows of E are this thread's alone; so are the columns of h that meet them.
    s.add_diagonal(PairSum<T>(e.rows(), s.p.h, later(s, 0), 0, own, s.p.left, s.p.right));
  }

 private:
  // The steps that later lags have.
  static int64_t later(const Lags<T>& s, int64_t lag) { return s.T_ - 2 - lag; }

  // By columns of P, which are rows of S.
  void find_ratios(const Lags<T>& s, int64_t lag) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    T* const low = partial_ + 2 * s.team.rank * ld_;
    T* const high = low + ld_;
    std::fill(low, low + ld_, infinity);
    std::fill(high, high + ld_, T(0));
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T *now = s.powers[lag - 1] + j * ld_, *next = s.powers[lag] + j * ld_;
      Vec<T> least = Vec<T>{} + infinity, most{};
      for (int64_t k = 0; k < ld_; k += Simd<T>::width) {
        const Vec<T> a = load(now + k), b = load(next + k);
        const Vec<T> r = b / (a > T(0) ? a : Vec<T>{} + T(1));
        const Vec<T> up = a > T(0) ? r : b > T(0) ? Vec<T>{} + infinity : Vec<T>{};
        const Vec<T> down = a > T(0) ? r : Vec<T>{} + infinity;
        least = down < least ? down : least;
        most = maximum(most, up);
        const Vec<T> l = load(low + k);
        store(low + k, down < l ? down : l);
        store(high + k, maximum(load(high + k), up));
      }
      column_high_[j] = largest_lane(most);
      column_low_[j] = std::min(column_high_[j], -largest_lane(-least));
    }
    s.team.wait();
    if (s.team.rank == 0) {
      for (int64_t k = 0; k < ld_; ++k) {
        T a = infinity, b = 0;
        for (int64_t r = 0; r < s.team.size; ++r) {
          a = std::min(a, partial_[2 * r * ld_ + k]);
          b = std::max(b, partial_[(2 * r + 1) * ld_ + k]);
        }
        row_low_[k] = std::min(a, b);
        row_high_[k] = b;
      }
    }
    s.team.wait();
  }

  // The least half width that a scan with the ratios of row j can have.
  T half_width(const Powers<T>& powers, int64_t lag, int64_t j) const {
    const T *now = powers[lag - 1] + j * ld_, *next = powers[lag] + j * ld_;
    T low = std::numeric_limits<T>::infinity(), high = 0;
    for (int64_t k = 0; k < H_; ++k) {
      if (now[k] == T(0) && next[k] > T(0)) return T(1);
      if (now[k] == T(0)) continue;
      low = std::min(low, next[k] / now[k]);
      high = std::max(high, next[k] / now[k]);
    }
    return high > T(0) ? (high - low) / (high + low) : T(0);
  }

  static int64_t ratio_exponent(const Lags<T>& s, int64_t lag) { return s.powers.exponent(lag) - s.powers.exponent(lag - 1); }

  // Of δ, each thread its own entries.
  bool scan_columns(const Lags<T>& s, int64_t lag, int64_t exponent, Scan<T>& e) {
    return scan(s.p.d.from(lag + 2), later(s, lag) - 1, -1, s.j0, s.j1 - s.j0, column_low_, column_high_, exponent, e,
                width_ + s.j0);
  }
  bool by_columns(Lags<T>& s, int64_t lag, T share, double& bound) {
    const int64_t own = s.j1 - s.j0;
    Scan<T> e(s.scans(), later(s, lag), own);
    const bool right = scan_columns(s, lag, ratio_exponent(s, lag), e);
    T widest = own > 0 ? *std::max_element(width_ + s.j0, width_ + s.j1) : T(0);
    if (!right) widest = std::numeric_limits<T>::infinity();
    if (!promises(s, widest, right ? share : T(1), lag)) return false;
    s.collect(e.rows(), s.p.h, later(s, lag), 0, own);
    return accept(s, lag, widest, bound, [&](int64_t j, int64_t) { return Vec<T>{} + width_[j]; });
  }

  // By rows: h is scanned, by one thread for all.
  bool by_rows(Lags<T>& s, int64_t lag, T share, double& bound) {
    const int64_t n = later(s, lag);
    if (s.team.rank == 0) {
      of_h_ = std::make_unique<Scan<T>>(s.shared_scans(), n, H_);
      const bool right = scan(s.p.h, 0, 1, 0, H_, row_low_, row_high_, ratio_exponent(s, lag), *of_h_, width_);
      std::fill(width_ + H_, width_ + ld_, T(0));
      if (!right) width_[0] = std::numeric_limits<T>::infinity();
    }
    s.team.wait();
    const T widest = *std::max_element(width_, width_ + H_);
    if (!promises(s, widest, share, lag)) return false;
    s.collect(s.p.d.from(lag + 2), of_h_->rows(), n, s.j0, s.j1);
    return accept(s, lag, widest, bound, [&](int64_t, int64_t k) { return load(width_ + k); });
  }

  // A guess, before the sums are formed: no bound rests on it.
  static bool promises(const Lags<T>& s, T widest, T share, int64_t lag) {
    const double likely = std::min(1.0, static_cast<double>(s.largest_of(share)) * static_cast<double>(later(s, lag)));
    return static_cast<double>(s.largest_of(widest)) * likely <= s.p.rtol;
  }

  // C holds the scan's sum: times the power it is the tail, wrong by at most the scan's relative half width.
  template <typename Width>
  static bool accept(Lags<T>& s, int64_t lag, T widest, double& bound, const Width& half_width) {
    s.stale = true;
    const T scale = s.scale_beside(lag - 1);
    const T* q = s.powers[lag - 1];
    const T most = s.largest_share([&](int64_t j, int64_t k) {
      return load(s.sums + j * s.ld + k) * load(q + j * s.ld + k) * Lags<T>::not_flushed(scale * half_width(j, k));
    });
    // Beside the tail, too, which is part of κ and no less than the lower end of the enclosure.
    const double half = s.largest_of(widest), beside = half < 1 ? half / (1 - half) : std::numeric_limits<double>::infinity();
    const double found = std::min<double>(s.largest_of(most), beside);
    if (!(found <= s.p.rtol)) return false;
    bound = found;
    s.add(lag - 1);
    return true;
  }

  const int64_t H_, ld_ = padded<T>(H_);
  Workspace<T, 5> memory_;
  T *const column_low_ = memory_.take(ld_), *const column_high_ = memory_.take(ld_), *const row_low_ = memory_.take(ld_);
  T *const row_high_ = memory_.take(ld_), *const width_ = memory_.take(ld_);
  T* const partial_ = memory_.take(0);  // the rest: two rows a thread
  std::unique_ptr<Scan<T>> of_h_;
};

// The tail of S with W̃^{n+m} ≈ ρ^{n+m} x uᵀ (Perron), and its bound: reference._rank_one, which proves it.

template <typename T>
class RankOne {
 public:
  RankOne(int64_t seq_len, int64_t hidden, int threads) : T_(seq_len), H_(hidden), memory_((4 + threads) * ld_) {}

  // Of a thread: χ of the last lag that was looked at, Σ_m χ_m, Σ_m ρ^m χ_m; σ and g of own rows.
  struct Own {
    std::vector<T> chi, chi_sum, chi_series, sigma, growth;
    int64_t seen = 0;
    bool mixes = false;
  };

  // The right (x) and left (u) Perron vectors by power iteration in double, one on either end of the team, u · x = 1,
  // until the Collatz-Wielandt bounds of the eigenvalue agree well enough for all steps. False if they do not.
  bool perron(const Lags<T>& s, Own& own, int64_t lag) {
    const Team& team = s.team;
    const double wanted = s.p.rtol / 64 / static_cast<double>(T_);
    double centre = 0;
    if (team.rank == 0) {
      x_spread_ = power_iteration<true>(s.powers, x_, lag, wanted, centre);
      const int m = x_spread_ <= wanted ? std::ilogb(centre) : 0;
      ratio_ = std::ldexp(centre, -m);
      ratio_exponent_ = s.powers.exponent(0) + m;
    }
    if (team.rank == team.size - 1) u_spread_ = power_iteration<false>(s.powers, u_, lag, wanted, centre);
    team.wait();
    if (!(x_spread_ <= wanted && u_spread_ <= wanted)) return false;
    double least = 1;
    for (int64_t k = 0; k < H_; ++k) least = std::min(least, x_[k] * u_[k]);
    team.wait();                         // u is about to change
    if (least < 0x1p-100) return false;  // weights that a float would lose
    if (team.rank == 0) {
      double dot = 0;
      for (int64_t k = 0; k < H_; ++k) dot += x_[k] * u_[k];
      for (int64_t k = 0; k < H_; ++k) u_[k] /= dot;
      for (int64_t k = 0; k < ld_; ++k) {
        inverse_x_[k] = k < H_ ? static_cast<T>(1 / x_[k]) : T(0);
        x_narrow_[k] = k < H_ ? static_cast<T>(x_[k]) : T(0);
        pi_[k] = k < H_ ? static_cast<T>(x_[k] * u_[k]) : T(0);
      }
    }
    team.wait();
    find_growth(s, own);
    for (auto* v : {&own.chi, &own.chi_sum, &own.chi_series}) v->assign(ld_, T(0));
    own.sigma.resize(s.j1 - s.j0);
    return true;
  }

  // z = P_lag[k, j] / (ρ^lag x_k u_j) - 1, P_lag the n-th cached power: its norms χ_k by rows, which `own` gathers, and
  // σ_j by columns, weighted by π = x u. Returns X, the norm of them all.
  double deviation(const Lags<T>& s, Own& own, int64_t lag, int64_t n) {
    const Team& team = s.team;
    const auto [mantissa, exponent] = power_of_ratio(lag);
    T* const partial = partial_ + team.rank * ld_;
    std::fill(partial, partial + ld_, T(0));
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T* q = s.powers[n] + j * ld_;
      const T scale = static_cast<T>(std::ldexp(1 / (u_[j] * mantissa), static_cast<int>(s.powers.exponent(n) - exponent)));
      const T pi = pi_[j];
      Vec<T> sum{};
      for (int64_t k = 0; k < ld_; k += Simd<T>::width) {
        const Vec<T> z = load(q + k) * (scale * load(inverse_x_ + k)) - T(1);
        const Vec<T> squared = z * z;
        sum += squared * load(pi_ + k);
        store(partial + k, load(partial + k) + squared * pi);
      }
      own.sigma[j - s.j0] = std::sqrt(lane_sum<T>(sum));
    }
    team.wait();
    double total = 0;
    // ρ^lag, and the sum of the powers left out.
    const double rho = ratio(), power = std::pow(rho, static_cast<double>(lag));
    double others = 0;
    for (int64_t m = own.seen + 1; m < lag; ++m) others += std::pow(rho, static_cast<double>(m));
    for (int64_t k = 0; k < H_; ++k) {
      T squared = 0;
      for (int64_t r = 0; r < team.size; ++r) squared += partial_[r * ld_ + k];
      const T chi = std::sqrt(squared);
      // χ does not grow with the lag: it stands for the lags that were left out, too.
      own.chi_sum[k] += own.chi[k] * static_cast<T>(lag - own.seen - 1) + chi;
      own.chi_series[k] += own.chi[k] * static_cast<T>(others) + chi * static_cast<T>(power);
      own.chi[k] = chi;
      total += static_cast<double>(pi_[k]) * squared;
    }
    own.seen = lag;
    team.wait();
    return std::sqrt(total);
  }

  // Whether everything after the lag, whose C is at hand, may be replaced by ρ^m x uᵀ.
  bool certifies(const Lags<T>& s, Own& own, int64_t lag, int64_t n, double& bound) {
    const double norm = deviation(s, own, lag, n);
    own.mixes = norm < 1;
    // Later lags weigh no more than σ_j χ_m[k] each, which shrinks by X every `lag` lags. Where C does not grow, ρ^m stands
    // beside it, and may be enough by itself.
    const double rho = ratio(), infinity = std::numeric_limits<double>::infinity();
    const T decay = static_cast<T>(rho < 1 ? std::pow(rho, static_cast<double>(lag + 1)) / (1 - rho) : infinity);
    const double both = std::pow(rho, static_cast<double>(lag)) * norm;
    const T repeat = static_cast<T>(both < 1 ? 1 / (1 - both) : infinity);
    const auto series_weight = [&](int64_t k) {
      return std::min(own.chi_series[k] + decay * own.chi[k], own.chi_series[k] * repeat);
    };
    T largest_sum = 0, largest_series = 0;
    for (int64_t k = 0; k < H_; ++k) {
      largest_sum = std::max(largest_sum, own.chi_sum[k]);
      largest_series = std::max(largest_series, series_weight(k));
    }
    const bool series = s.p.monotone && largest_series < (own.mixes ? largest_sum / (1 - norm) : infinity);
    if (!own.mixes && !series) return false;
    if (s.team.rank == 0) {
      for (int64_t k = 0; k < ld_; ++k) {
        weighted_x_[k] = k < H_ ? x_narrow_[k] * (series ? series_weight(k) : own.chi_sum[k] / static_cast<T>(1 - norm)) : T(0);
      }
    }
    s.team.wait();
    const auto [mantissa, exponent] = power_of_ratio(lag);
    T most = 0;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const double row = u_[j] * own.sigma[j - s.j0] * (series ? T(1) : own.growth[j - s.j0]) * mantissa;
      const T r = static_cast<T>(std::ldexp(row, static_cast<int>(s.sum_exponent + exponent - s.exponent)));
      most = std::max(most, s.largest_share(j, [&](int64_t k) {
        return load(s.sums + j * ld_ + k) * Lags<T>::not_flushed(r * load(weighted_x_ + k));
      }));
    }
    // x, u and ρ are themselves known to within their bounds alone.
    const double widest = s.largest_of(own.sigma.empty() ? T(0) : *std::max_element(own.sigma.begin(), own.sigma.end()));
    const double theta = std::expm1(static_cast<double>(T_) * (x_spread_ + u_spread_));
    const double drift = theta * (series ? 2 + widest * static_cast<double>(largest_sum) : 1 + widest / (1 - norm));
    const double found = drift < 1 ? ((1 + theta) * s.largest_of(most) + drift) / (1 - drift) : infinity;
    if (!(found <= s.p.rtol)) return false;
    bound = found;
    return true;
  }

  // S += ρ^{lag+1} (u xᵀ) ⊙ Σ_t E_t h_tᵀ, E_t = δ_{t+lag+3} + ρ E_{t+1}.
  void add_tail(Lags<T>& s, int64_t lag) const {
    const int64_t n = T_ - 2 - lag, own = s.j1 - s.j0;
    const Rows<T> d = s.p.d.from(lag + 2);
    const Closed<T> closed = d.closed();
    const int64_t begin = std::min(closed.count ? closed.last : 0, n);  // rows before it are in closed form
    Scan<T> e(s.scans(), n + 1, own);
    s.underflowed |= !discount(d, begin, s.j0, own, e);
    if (begin > 0) discount_closed(d, begin, s.j0, e);
    s.collect(e.rows(), s.p.h, n, 0, own);  // rows of E are this thread's alone
    const auto [mantissa, exponent] = power_of_ratio(lag + 1);
    // u may have entries far above one, as x has none.
    const int m = std::ilogb(*std::max_element(u_.begin(), u_.begin() + H_));
    const int64_t from = s.sum_exponent == kZeroExponent ? kZeroExponent : s.sum_exponent + exponent + m;
    const T scale = s.onto(from);
    s.miss(from, scale, 2 * s.most_of_sum(), 0);
    s.stale = true;
    if (scale == T(0)) return;
    FlushDenormals::forget();
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T row = static_cast<T>(std::ldexp(u_[j], -m) * mantissa) * scale;
      for (int64_t k = 0; k < ld_; k += Simd<T>::width) {
        const int64_t i = j * ld_ + k;
        store(s.pairs + i, load(s.pairs + i) + load(s.sums + i) * (row * load(x_narrow_ + k)));
      }
    }
    // Perhaps of a factor of C.
    if (FlushDenormals::underflowed()) s.missing += 2 * s.most_of_sum() * std::numeric_limits<T>::min();
  }

 private:
  // The relative distance of the bounds of the eigenvalue, infinite for none, and their middle; `v` has its largest entry
  // at one. Starts with the power of the lag, which is at hand, until its rounding could show.
  template <bool Right>
  double power_iteration(const Powers<T>& powers, std::vector<double>& v, int64_t lag, double wanted, double& centre) const {
    constexpr int kMost = 32, kPatience = 4;
    constexpr double kNever = std::numeric_limits<double>::infinity();
    std::vector<double> next(ld_, 0.0);
    std::fill(v.begin(), v.end(), 0.0);
    std::fill(v.begin(), v.begin() + H_, 1.0);
    double spread = kNever, before = kNever;
    for (int i = 1; i <= kMost; ++i) {
      const bool first = lag == 1 || spread < 0x1p-18;
      multiply_wide<Right>(powers[first ? 0 : lag - 1], H_, ld_, ld_, v.data(), next.data());
      double low = kNever, high = 0, top = 0, least = kNever;
      for (int64_t k = 0; k < H_; ++k) {
        const double r = next[k] / v[k];
        low = std::min(low, r);
        high = std::max(high, r);
        top = std::max(top, next[k]);
        least = std::min(least, next[k]);
      }
      // Entries that a float could not hold beside one are refused.
      if (!(low > 0) || least < top * 0x1p-100) return kNever;
      for (int64_t k = 0; k < H_; ++k) v[k] = next[k] / top;
      spread = high / low - 1;
      centre = std::sqrt(low) * std::sqrt(high);
      if (first && spread <= wanted) return spread;
      if (i % kPatience == 0) {
        if (!(spread < before / 2)) return kNever;
        before = spread;
      }
    }
    return kNever;
  }

  // g_j ≥ ρ^m δ_{s+m}[j] / δ_s[j] for all s, m: x · δ_s ≥ ρ^m x · δ_{s+m}, so the largest quotient of
  // δ_s[j] / (u_j x · δ_s) over the steps s by the smallest will do; for a closed form, over its basis.
  void find_growth(const Lags<T>& s, Own& of) {
    std::vector<const T*> rows;
    const Rows<T>& d = s.p.d;
    const Closed<T> closed = d.closed();
    for (int64_t t = 0; t < T_; ++t) {
      if (closed.holds(t)) t = closed.last;
      if (t < T_ && d.largest[t] != kZeroExponent) rows.push_back(d[t]);
    }
    for (int i = 0; i < closed.count; ++i) rows.push_back(closed.basis[i]);
    int64_t first, last;
    s.team.share(static_cast<int64_t>(rows.size()), first, last);
    for (int64_t r = first; r < last; ++r) {
      Vec<double> dot{};
      for (int64_t k = 0; k < ld_; k += Simd<double>::width) dot += load(x_.data() + k) * load_wide(rows[r] + k);
      row_dots_[r] = static_cast<T>(1 / lane_sum<double>(dot));
    }
    s.team.wait();
    const int64_t own = s.j1 - s.j0;
    std::vector<T> most(own, T(0)), least(own, std::numeric_limits<T>::infinity());
    for (size_t r = 0; r < rows.size(); ++r) {
      for (int64_t j = 0; j < own; ++j) {
        const T v = rows[r][s.j0 + j] * row_dots_[r];
        most[j] = v > most[j] ? v : most[j];
        least[j] = v < least[j] ? v : least[j];
      }
    }
    of.growth.resize(own);
    for (int64_t j = 0; j < own; ++j) of.growth[j] = most[j] / least[j];
  }

  double ratio() const { return std::ldexp(ratio_, static_cast<int>(std::clamp<int64_t>(ratio_exponent_, -2000, 2000))); }
  // ρ^n as a mantissa and an exponent.
  std::pair<double, int64_t> power_of_ratio(int64_t n) const {
    const double logarithm = std::log2(ratio_) * static_cast<double>(n);
    const double whole = std::floor(logarithm);
    return {std::exp2(logarithm - whole), static_cast<int64_t>(whole) + ratio_exponent_ * n};
  }

  // E of the rows from `begin` on, from the last one down. Returns whether nothing underflowed.
  bool discount(const Rows<T>& d, int64_t begin, int64_t j0, int64_t own, Scan<T>& e) const {
    const int64_t n = static_cast<int64_t>(e.exponent.size()) - 1;
    const Closed<T> closed = d.closed();
    const T ratio = static_cast<T>(ratio_);
    std::fill(e.data + n * e.row, e.data + (n + 1) * e.row, T(0));
    e.exponent[n] = e.largest[n] = kZeroExponent;
    Buffer<T> x(e.row);
    bool dropped = false;
    FlushDenormals::forget();
    for (int64_t t = n - 1; t >= begin; --t) {
      const int64_t from = e.exponent[t + 1] == kZeroExponent ? kZeroExponent : e.exponent[t + 1] + ratio_exponent_;
      const int64_t given = own_part(d, closed, t, j0, own, x), top = std::max(from, given);
      bool left = false;
      const T a = ratio * beside<T>(from, top, left), b = beside<T>(given, top, left);
      T *out = e.data + t * e.row, *before = out + e.row;
      if (left) dropped = dropped || !covers(a > T(0) ? before : x.data(), a > T(0) ? x.data() : before, own);
      for (int64_t j = 0; j < own; ++j) out[j] = a * before[j] + b * x[j];
      std::fill(out + own, out + e.row, T(0));
      e.centre(t, top);
    }
    return !dropped && !FlushDenormals::underflowed();
  }

  // E of the rows before it, where δ has a closed form: the same basis and row `begin` of E.
  void discount_closed(const Rows<T>& d, int64_t begin, int64_t j0, Scan<T>& e) const {
    const Closed<T> closed = d.closed();
    e.closed.last = begin;
    e.closed.count = closed.count + 1;
    std::fill(e.largest.begin(), e.largest.begin() + begin, kCentre<T> + kSlack + 5);  // a bound
    e.coefficients.resize(e.closed.count * begin);
    for (int i = 0; i < e.closed.count; ++i) e.closed.coefficients[i] = e.coefficients.data() + i * begin;
    for (int i = 0; i < closed.count; ++i) e.closed.basis[i] = closed.basis[i] + j0;
    e.closed.basis[closed.count] = e.data + begin * e.row;
    // E_t = (Σ_i c_i basis_i) · 2^at.
    double c[Closed<T>::kMost] = {};
    c[closed.count] = 1;
    int64_t at = e.exponent[begin];
    for (int64_t t = begin - 1; t >= 0; --t) {
      const int64_t from = at == kZeroExponent ? at : at + ratio_exponent_, top = std::max(from, d.exponent[t]);
      const double a = ratio_ * power_of_two<double>(from - top), b = power_of_two<double>(d.exponent[t] - top);
      double most = 0;
      const double c0 = c[0];
      for (int i = 0; i < e.closed.count; ++i) {
        c[i] = a * c[i] + (i < closed.count ? b * closed.coefficients[i][t] : 0.0);
        most = std::max(most, c[i]);
      }
      // δ that has converged is alike at every step; once E is, too, so is the rest of it.
      const bool converged = closed.count == 1 && at == top && from < at && c[0] == c0 && c[1] < c[0] * 0x1p-60;
      at = top;
      if (most > 8 || most < 0.125) {
        const int m = std::ilogb(most);
        for (double& v : c) v = std::ldexp(v, -m);
        at += m;
      }
      for (int i = 0; i < e.closed.count; ++i) e.coefficients[i * begin + t] = static_cast<T>(c[i]);
      e.exponent[t] = at;
      if (converged) {
        for (int i = 0; i < 2; ++i) std::fill_n(e.coefficients.begin() + i * begin, t, static_cast<T>(c[i]));
        std::fill_n(e.exponent.begin(), t, at);
        break;
      }
    }
  }

  const int64_t T_, H_, ld_ = padded<T>(H_);
  Workspace<T, 4> memory_;
  T *const inverse_x_ = memory_.take(ld_), *const x_narrow_ = memory_.take(ld_), *const pi_ = memory_.take(ld_);
  T *const weighted_x_ = memory_.take(ld_), *const partial_ = memory_.take(0);  // the last: rows by threads
  std::vector<double> x_ = std::vector<double>(ld_), u_ = x_;
  std::vector<T> row_dots_ = std::vector<T>(T_ + Closed<T>::kMost);
  int64_t ratio_exponent_ = 0;
  double ratio_ = 1, x_spread_ = 0, u_spread_ = 0;
};

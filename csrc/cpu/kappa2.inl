// κ⁽²⁾ of one recurrent matrix, in the pass that has just made its chains: S = Σ_n Q_n ⊙ C_n over the lags n, with
// C_n = Σ_t δ_{t+n+2} h_tᵀ and Q_n = (W̃ᵀ)^n, which lies in memory as S does. A few lags are summed one by one; the rest
// follow from one of two certificates (the proofs: reference.kappa2_certified). Each thread owns some rows of S.

template <typename T>
struct SecondTerm {
  const T* weight;
  T scale;  // W̃ = (weight · scale)² · 2^weight_exponent
  int64_t weight_exponent;
  Rows<T> h, d;    // h_0 … h_{T-1}, δ_1 … δ_T
  const T* drive;  // of h at every step, or null: it varies
  int64_t drive_exponent;
  T* kappa;  // [H, H]: κ⁽¹⁾ comes, κ goes
  int64_t* exponent;
  double factor;  // κ⁽²⁾ = factor · W̃ ⊙ S
  double rtol;
  int64_t first_lags;  // how many a former call needed, or 0
  int64_t* lags;
  double* bound;
  T *left, *right;  // this thread's memory for a PairSum
};

template <typename T>
class Kappa2Run {
 public:
  Kappa2Run(int64_t seq_len, int64_t hidden, int64_t workspace_bytes, int threads)
      : T_(seq_len),
        H_(hidden),
        ld_(padded<T>(hidden)),
        matrix_(H_ * ld_),
        chunk_(chunk(seq_len, hidden, workspace_bytes)),
        few_(std::min(chunk_, kFew)),
        memory_((3 + few_) * matrix_ + 2 * padded<T>(Packed<T>::size(H_, H_)) + filtered_size(threads) + (9 + 2 * threads) * ld_),
        exponents_(chunk_ + 1),
        x_(ld_),
        u_(ld_),
        row_dots_(T_ + Closed<T>::kMost),
        tops_(threads),
        lost_(threads, 0),
        maxima_(threads) {
    pairs_ = memory_.take(matrix_);
    sums_ = memory_.take(matrix_);
    spare_ = memory_.take(matrix_);
    first_powers_ = memory_.take(few_ * matrix_);
    packed_first_ = memory_.take(Packed<T>::size(H_, H_));
    packed_wide_ = memory_.take(Packed<T>::size(H_, H_));
    filtered_ = memory_.take(filtered_size(threads));
    for (T** vector : {&inverse_x_, &x_narrow_, &pi_, &ratio_low_, &ratio_high_, &row_low_, &row_high_, &width_,
                       &weighted_x_}) {
      *vector = memory_.take(ld_);
    }
    partial_ = memory_.take(2 * threads * ld_);
  }

  bool lost() const { return std::find(lost_.begin(), lost_.end(), 1) != lost_.end(); }

  void run(const SecondTerm<T>& p, const Team& team) {
    State s;
    team.share(H_, s.j0, s.j1);
    s.sums = sums_;
    s.spare = spare_;
    std::fill(pairs_ + s.j0 * ld_, pairs_ + s.j1 * ld_, T(0));
    FlushDenormals::forget();
    first_power(p, team);
    int64_t summed = 0;
    double bound = 0;
    if (T_ > 1) {
      add_diagonal(p, s);
      summed = 1;
      const bool perron = p.rtol > 0 && T_ > 3 && find_perron(p, s, team);
      int64_t base = 1;  // the lag of the first cached power
      while (summed < T_ - 1) {
        if (summed == base + chunk_) {
          next_chunk(std::min(chunk_, T_ - 1 - summed), base == 1, team);
          base += chunk_;
        }
        const int64_t end = std::min({batch_end(summed, p.first_lags), base + chunk_, T_ - 1});
        if (base == 1) form(end - 1, team);
        if (exponents_[summed - base] == kZeroExponent) break;  // nilpotent: no more lags
        const bool tests = p.rtol > 0 && end < T_ - 1 && end >= p.first_lags;
        // The last lag first: the tests look at it.
        sum_pairs(p, end - 1, s);
        add(end - 1 - base, s);
        const int64_t lag = end - 1;
        // The Perron certificate wants to have seen the first powers all.
        for (int64_t n = summed; perron && n < lag && n <= kFew; ++n) mixing(n, n - base, s, team);
        bool certified = tests && perron && perron_certifies(p, lag, lag - base, s, bound, team);
        if (certified) {
          add_perron_tail(p, lag, s, team);
        } else if (tests && !s.mixes && base == 1 && lag < chunk_) {
          certified = ratios_certify(p, lag, s, bound, team);
        }
        if (lag > summed) {
          if (s.stale) sum_pairs(p, lag, s);
          add_between(p, summed, lag, base, s);
        }
        summed = end;
        if (certified) break;
      }
    }
    finish(p, s, team);
    if (team.rank == 0) {
      *p.lags = summed;
      *p.bound = bound;
    }
    team.wait();
  }

 private:
  // Lags that are tested one by one; from there on their number doubles between tests.
  static constexpr int64_t kSingle = 8;
  // Powers that find place without an allocation.
  static constexpr int64_t kFew = 16;

  // What a thread knows alone: its rows of S, on the scale 2^exponent, and of the last lag's C, on 2^sum_exponent.
  struct State {
    int64_t j0, j1;
    int64_t exponent = kZeroExponent, sum_exponent = kZeroExponent;
    T *sums, *spare;
    // For the Perron certificate: χ of the last lag that was looked at, their sum over the lags, σ of own rows.
    std::vector<T> chi, chi_sum, sigma;
    int64_t seen = 0;
    bool mixes = false;
    std::vector<T> growth;  // g_j of own rows
    bool stale = false;     // whether a tail has replaced C
  };

  static int64_t chunk(int64_t seq_len, int64_t hidden, int64_t workspace_bytes) {
    const int64_t matrix = hidden * padded<T>(hidden) * static_cast<int64_t>(sizeof(T));
    const int64_t needed = std::max<int64_t>(seq_len - 2, 1), budget = std::max<int64_t>(workspace_bytes / matrix, 4);
    return needed <= budget ? needed : budget / 2;
  }
  // Rows of a filtered δ, by threads, or of a filtered h.
  int64_t filtered_size(int64_t threads) const { return T_ * (ld_ + 2 * threads * Simd<T>::width); }

  static int64_t batch_end(int64_t summed, int64_t first_lags) {
    if (summed < first_lags) return first_lags;
    return summed < kSingle ? summed + 1 : 2 * summed;
  }

  // ---- powers -------------------------------------------------------------------------------------------------------

  // W̃ᵀ, and whichever power wide products need.
  Packed<T> first_factor() const { return {packed_first_, H_, H_, kPanel<T>}; }
  Packed<T> wide_factor() const { return {packed_wide_, H_, H_, kPanel<T>}; }
  const T* power(int64_t n) const { return powers_ + n * matrix_; }  // the n-th cached

  void first_power(const SecondTerm<T>& p, const Team& team) {
    if (team.rank == 0) powers_ = big_.empty() ? first_powers_ : big_.data();
    team.wait();
    int64_t first, last;
    team.share(H_, first, last);
    for (int64_t j = first; j < last; ++j) {
      T* row = powers_ + j * ld_;
      for (int64_t k = 0; k < H_; ++k) {
        const T v = p.weight[k * H_ + j] * p.scale;
        row[k] = v * v;
      }
      std::fill(row + H_, row + ld_, T(0));
    }
    if (team.rank == 0) {
      exponents_[0] = p.weight_exponent;
      count_ = 1;
    }
    lost_[team.rank] |= FlushDenormals::lost();
    team.wait();
    pack(first_factor(), powers_, ld_, 1, team, [](T v) { return v; });
    team.wait();
  }

  // Powers 1 … last of the first chunk: one by one, or as many again as there are in one wide product.
  void form(int64_t last, const Team& team) {
    if (last > few_ && big_.empty()) {
      team.wait();
      if (team.rank == 0) {
        big_.resize(chunk_ * matrix_);
        std::copy(powers_, powers_ + count_ * matrix_, big_.data());
        powers_ = big_.data();
      }
      team.wait();
    }
    while (count_ < last) {
      const int64_t have = count_, more = std::min(have, last - have);
      team.wait();
      if (more == 1) {
        multiply(power(have - 1), have - 1, 1, first_factor(), exponents_[0], powers_ + have * matrix_, have, team);
      } else {
        pack_wide(have - 1, team);
        multiply(powers_, 0, more, wide_factor(), exponents_[have - 1], powers_ + have * matrix_, have, team);
      }
      if (team.rank == 0) count_ += more;
      team.wait();
    }
  }

  void pack_wide(int64_t n, const Team& team) {
    pack(wide_factor(), power(n), ld_, 1, team, [](T v) { return v; });
    team.wait();
  }

  // The cached powers times the last of the first chunk.
  void next_chunk(int64_t wanted, bool first, const Team& team) {
    team.wait();
    if (first) {
      if (team.rank == 0) {
        next_.resize(chunk_ * matrix_);
        other_ = next_.data();
        wide_exponent_ = exponents_[chunk_ - 1];
      }
      pack_wide(chunk_ - 1, team);
    }
    multiply(powers_, 0, wanted, wide_factor(), wide_exponent_, other_, 0, team);
    if (team.rank == 0) std::swap(powers_, other_);
    team.wait();
  }

  // to[i] = from[i] · right for i = 0 … count-1, each brought back to a largest entry in [1, 2).
  // from[i] has exponent exponents_[from_at + i], to[i] gets exponents_[to_at + i].
  void multiply(const T* from, int64_t from_at, int64_t count, const Packed<T>& right, int64_t right_exponent, T* to,
                int64_t to_at, const Team& team) {
    // Adding a lag flushes rows that are negligible, rightly; here it would be a loss.
    FlushDenormals::forget();
    int64_t row_first, row_last;
    team.share(H_, row_first, row_last);
    if (team.rank == 0) power_tops_.assign(count * team.size, T(0));
    team.wait();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * matrix_ + row_first * ld_;
      for (int64_t n = 0; n < right.panels(); ++n) {
        Tile<T> t{};
        t.c = to + at + n * right.panel;
        t.c_row = ld_;
        step(t, from + at, ld_, right, n, static_cast<const Product<T>*>(nullptr), row_last - row_first);
      }
      Vec<T> most{};
      for (int64_t j = row_first; j < row_last; ++j) {
        T* row = to + i * matrix_ + j * ld_;
        std::fill(row + H_, row + ld_, T(0));
        for (int64_t k = 0; k < ld_; k += Simd<T>::width) most = maximum<T>(most, load(row + k));
      }
      power_tops_[i * team.size + team.rank] = largest_lane<T>(most);
    }
    team.wait();
    for (int64_t i = 0; i < count; ++i) {
      T top = 0;
      for (int64_t r = 0; r < team.size; ++r) top = std::max(top, power_tops_[i * team.size + r]);
      const int64_t m = top > T(0) ? std::ilogb(top) : 0;
      const T s = std::ldexp(T(1), static_cast<int>(-m));
      for (int64_t at = i * matrix_ + row_first * ld_; m != 0 && at < i * matrix_ + row_last * ld_; at += Simd<T>::width) {
        store(to + at, load(to + at) * s);
      }
      if (team.rank == 0) {
        exponents_[to_at + i] = top > T(0) ? exponents_[from_at + i] + right_exponent + m : kZeroExponent;
      }
    }
    lost_[team.rank] |= FlushDenormals::lost();
    team.wait();
  }

  // ---- lags ---------------------------------------------------------------------------------------------------------

  // Lag 0, Q_0 = I: S[j, j] = Σ_t δ_{t+2}[j] h_t[j].
  void add_diagonal(const SecondTerm<T>& p, State& s) {
    const PairSum<T> sum(p.d.from(1), p.h, T_ - 1, s.j0, s.j1, p.left, p.right);
    if (sum.count == 0) return;
    const int64_t to = sum.largest - kCentre<T>;
    const T alpha = std::ldexp(T(1), static_cast<int>(sum.exponent - to));
    s.exponent = to;
    for (int i = 0; i < sum.count; ++i) {
      const Product<T>& m = sum.products[i];
      for (int64_t t = 0; t < m.depth; ++t) {
        for (int64_t j = s.j0; j < s.j1; ++j) {
          pairs_[j * ld_ + j] += m.a[t * m.a_col + j - s.j0] * alpha * m.b[t * m.b_row + j];
        }
      }
    }
  }

  // C of a lag, this thread's rows, its entries near 2^kCentre at most.
  void sum_pairs(const SecondTerm<T>& p, int64_t lag, State& s) {
    collect(PairSum<T>(p.d.from(lag + 1), p.h, T_ - 1 - lag, s.j0, s.j1, p.left, p.right), s);
  }
  void collect(const PairSum<T>& sum, State& s) {
    s.stale = false;
    if (sum.count == 0) {
      s.sum_exponent = kZeroExponent;
      std::fill(s.sums + s.j0 * ld_, s.sums + s.j1 * ld_, T(0));
      return;
    }
    s.sum_exponent = sum.largest - kCentre<T>;
    sum.multiply(s.sums + s.j0 * ld_, ld_, s.j1 - s.j0, H_,
                 std::ldexp(T(1), static_cast<int>(sum.exponent - s.sum_exponent)));
    for (int64_t j = s.j0; j < s.j1; ++j) std::fill(s.sums + j * ld_ + H_, s.sums + (j + 1) * ld_, T(0));
  }

  // The factor that brings numbers on the scale 2^from to S's own, which grows where it must; zero: negligible.
  T onto(int64_t from, State& s) {
    if (from <= kZeroExponent / 2 || from < s.exponent - kNegligible<T>) return T(0);
    if (from > s.exponent) {
      const T shrink = power_of_two<T>(s.exponent - from);
      for (int64_t at = s.j0 * ld_; at < s.j1 * ld_; at += Simd<T>::width) store(pairs_ + at, load(pairs_ + at) * shrink);
      s.exponent = from;
    }
    return power_of_two<T>(from - s.exponent);
  }

  // S += C ⊙ the n-th cached power.
  void add(int64_t n, State& s) {
    const T scale = exponents_[n] == kZeroExponent ? T(0) : onto(s.sum_exponent + exponents_[n], s);
    if (scale == T(0)) return;
    const T* q = power(n);
    for (int64_t at = s.j0 * ld_; at < s.j1 * ld_; at += Simd<T>::width) {
      store(pairs_ + at, load(pairs_ + at) + load(s.sums + at) * load(q + at) * scale);
    }
  }

  // Lags first … last-1. Since h_t = W̃ h_{t-1} + b, C_n = C_{n+1} W̃ᵀ + (Σ_{s ≥ n+3} δ_s) bᵀ + δ_{n+2} h_0ᵀ: from the
  // last lag's C downwards, in products as deep as H instead of T.
  void add_between(const SecondTerm<T>& p, int64_t first, int64_t last, int64_t base, State& s) {
    const bool moves = p.d.closed().count == 0 && p.h.closed().count == 0;
    const bool descends = moves && p.drive && last - first >= 4 && T_ - 1 - last > H_ + H_ / 4;
    if (!descends) {
      for (int64_t lag = first; lag < last; ++lag) {
        sum_pairs(p, lag, s);
        add(lag - base, s);
      }
      return;
    }
    const int64_t own = padded<T>(s.j1 - s.j0);
    T* const rest = p.left;  // Σ_{s ≥ n+3} δ_s, own entries
    T* const row = rest + own;
    std::fill(rest, rest + 2 * own, T(0));
    int64_t rest_exponent = kZeroExponent;
    const auto add_row = [&](int64_t t) {
      if (p.d.exponent[t] == kZeroExponent) return;
      int64_t largest;
      std::copy(p.d[t] + s.j0, p.d[t] + s.j1, row);
      finish_step(rest, rest_exponent, row, p.d.exponent[t], own, rest_exponent, largest);
    };
    for (int64_t t = T_ - 1; t > last + 1; --t) add_row(t);
    for (int64_t lag = last - 1; lag >= first; --lag) {
      add_row(lag + 2);  // δ_{lag+3}
      descend(p, lag, rest, rest_exponent, s);
      add(lag - base, s);
    }
  }

  // C of the lag from that of the next.
  void descend(const SecondTerm<T>& p, int64_t lag, const T* rest, int64_t rest_exponent, State& s) {
    const Packed<T> w = first_factor();
    const int64_t at = s.j0 * ld_, rows = s.j1 - s.j0;
    for (int64_t n = 0; n < w.panels(); ++n) {
      Tile<T> t{};
      t.c = s.spare + at + n * w.panel;
      t.c_row = ld_;
      step(t, s.sums + at, ld_, w, n, static_cast<const Product<T>*>(nullptr), rows);
    }
    std::swap(s.sums, s.spare);
    const auto pair = [](int64_t a, int64_t b) {
      return a == kZeroExponent || b == kZeroExponent ? kZeroExponent : a + b;
    };
    // Products of two vectors lie near 2^(2 kCentre), C near 2^kCentre.
    const int64_t driven = pair(rest_exponent, p.drive_exponent);
    const int64_t started = pair(p.d.exponent[lag + 1], p.h.exponent[0]);
    const int64_t old = pair(s.sum_exponent, p.weight_exponent), top = std::max({old, driven + kCentre<T>, started + kCentre<T>});
    const T a = power_of_two<T>(old - top);
    const T b = power_of_two<T>(driven + kCentre<T> - top), c = power_of_two<T>(started + kCentre<T> - top);
    const T down = power_of_two<T>(-kCentre<T>);
    Vec<T> most{};
    for (int64_t j = s.j0; j < s.j1; ++j) {
      T* row = s.sums + j * ld_;
      const T bj = b * (rest[j - s.j0] * down), cj = c == T(0) ? T(0) : c * (p.d[lag + 1][j] * down);
      std::fill(row + H_, row + ld_, T(0));
      for (int64_t k = 0; k < ld_; k += Simd<T>::width) {
        Vec<T> v = load(row + k) * a + bj * load(p.drive + k);
        if (cj != T(0)) v += cj * load(p.h[0] + k);
        store(row + k, v);
        most = maximum<T>(most, v);
      }
    }
    s.sum_exponent = top;
    const int64_t shift = kCentre<T> - magnitude(largest_lane<T>(most));
    if (shift > 2 * kCentre<T> || std::abs(shift) <= kSlack) return;  // zero, or near enough
    const T scale = std::ldexp(T(1), static_cast<int>(shift));
    for (int64_t i = at; i < s.j1 * ld_; i += Simd<T>::width) store(s.sums + i, load(s.sums + i) * scale);
    s.sum_exponent -= shift;
  }

  // ---- the Perron certificate ---------------------------------------------------------------------------------------

  // The right (x) and left (u) Perron vectors by power iteration in double, one on either end of the team, u · x = 1,
  // until the Collatz-Wielandt bounds of the eigenvalue agree well enough for all steps. False if they do not.
  bool find_perron(const SecondTerm<T>& p, State& s, const Team& team) {
    const double wanted = p.rtol / 16 / static_cast<double>(T_);
    if (team.rank == 0) {
      x_spread_ = power_iteration(x_, wanted, [this](const double* a, double* out) {
        matrix_vector_wide(first_factor(), a, out);
      });
    }
    if (team.rank == team.size - 1) {
      u_spread_ = power_iteration(u_, wanted, [this](const double* a, double* out) {
        for (int64_t k = 0; k < H_; ++k) {
          Vec<double> dot{};
          for (int64_t j = 0; j < ld_; j += Simd<double>::width) dot += load(a + j) * load_wide(powers_ + k * ld_ + j);
          out[k] = lane_sum<double>(dot);
        }
      });
    }
    team.wait();
    if (!(x_spread_ <= wanted && u_spread_ <= wanted)) return false;
    double least = 1;
    for (int64_t k = 0; k < H_; ++k) least = std::min(least, x_[k] * u_[k]);
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
    growths(p, s, team);
    s.chi.assign(ld_, T(0));
    s.chi_sum.assign(ld_, T(0));
    s.sigma.resize(s.j1 - s.j0);
    return true;
  }

  // The relative distance of the bounds of the eigenvalue; `v` has its largest entry at one.
  template <typename Multiply>
  double power_iteration(std::vector<double>& v, double wanted, const Multiply& multiply) {
    constexpr int kMost = 64, kPatience = 8;
    std::vector<double> next(ld_, 0.0);
    std::fill(v.begin(), v.end(), 0.0);
    std::fill(v.begin(), v.begin() + H_, 1.0);
    double spread = std::numeric_limits<double>::infinity(), before = spread;
    for (int i = 0; i < kMost && spread > wanted; ++i) {
      multiply(v.data(), next.data());
      double low = std::numeric_limits<double>::infinity(), high = 0, top = 0;
      for (int64_t k = 0; k < H_; ++k) {
        const double r = next[k] / v[k];
        low = std::min(low, r);
        high = std::max(high, r);
        top = std::max(top, next[k]);
      }
      if (!(low > 0)) return std::numeric_limits<double>::infinity();
      spread = high / low - 1;
      const double centre = std::sqrt(low) * std::sqrt(high);
      const int m = std::ilogb(centre);
      if (&v == &x_) {
        ratio_ = std::ldexp(centre, -m);
        ratio_exponent_ = exponents_[0] + m;
      }
      double least = 1;
      for (int64_t k = 0; k < H_; ++k) {
        v[k] = next[k] / top;
        least = std::min(least, v[k]);
      }
      // Kept within what a float can hold beside one.
      if (least < 0x1p-100) return std::numeric_limits<double>::infinity();
      if (i % kPatience == kPatience - 1) {
        if (!(spread < before / 2)) return std::numeric_limits<double>::infinity();
        before = spread;
      }
    }
    return spread;
  }

  // g_j ≥ ρ^m δ_{s+m}[j] / δ_s[j] for all s, m: x · δ_s ≥ ρ^m x · δ_{s+m}, so the largest quotient of
  // δ_s[j] / (u_j x · δ_s) over the steps s by the smallest will do; for a closed form, over its basis.
  void growths(const SecondTerm<T>& p, State& s, const Team& team) {
    const Closed<T> closed = p.d.closed();
    const int64_t rows = T_ + closed.count;
    const auto row = [&](int64_t r) -> const T* {
      if (r >= T_) return closed.basis[r - T_];
      return closed.holds(r) || p.d.largest[r] == kZeroExponent ? nullptr : p.d[r];
    };
    int64_t first, last;
    team.share(rows, first, last);
    for (int64_t r = first; r < last; ++r) {
      const T* d = row(r);
      double dot = 0;
      for (int64_t k = 0; d && k < H_; ++k) dot += x_[k] * d[k];
      row_dots_[r] = static_cast<T>(1 / dot);
    }
    team.wait();
    const int64_t own = s.j1 - s.j0;
    std::vector<T> most(own, T(0)), least(own, std::numeric_limits<T>::infinity());
    for (int64_t r = 0; r < rows; ++r) {
      const T* d = row(r);
      if (!d) continue;
      const T scale = row_dots_[r];
      for (int64_t j = 0; j < own; ++j) {
        const T v = d[s.j0 + j] * scale;
        most[j] = std::max(most[j], v);
        least[j] = std::min(least[j], v);
      }
    }
    s.growth.resize(own);
    for (int64_t j = 0; j < own; ++j) s.growth[j] = most[j] / least[j];
  }

  // ρ^n as a mantissa and an exponent.
  void power_of_ratio(int64_t n, double& mantissa, int64_t& exponent) const {
    const double logarithm = std::log2(ratio_) * static_cast<double>(n);
    const double whole = std::floor(logarithm);
    mantissa = std::exp2(logarithm - whole);
    exponent = static_cast<int64_t>(whole) + ratio_exponent_ * n;
  }

  // z = P_lag[k, j] / (ρ^lag x_k u_j) - 1, P_lag the n-th cached power: its norms χ_k by rows, which s gathers, and σ_j
  // by columns, weighted by π = x u. Returns X, the norm of them all.
  double mixing(int64_t lag, int64_t n, State& s, const Team& team) {
    constexpr int64_t width = Simd<T>::width;
    double mantissa;
    int64_t exponent;
    power_of_ratio(lag, mantissa, exponent);
    T* const partial = partial_ + team.rank * ld_;
    std::fill(partial, partial + ld_, T(0));
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T* q = power(n) + j * ld_;
      const T scale = static_cast<T>(std::ldexp(1 / (u_[j] * mantissa), static_cast<int>(exponents_[n] - exponent)));
      const T pi = pi_[j];
      Vec<T> sum{};
      for (int64_t k = 0; k < ld_; k += width) {
        const Vec<T> z = load(q + k) * (scale * load(inverse_x_ + k)) - T(1);
        const Vec<T> squared = z * z;
        sum += squared * load(pi_ + k);
        store(partial + k, load(partial + k) + squared * pi);
      }
      s.sigma[j - s.j0] = std::sqrt(lane_sum<T>(sum));
    }
    team.wait();
    double total = 0;
    for (int64_t k = 0; k < H_; ++k) {
      T squared = 0;
      for (int64_t r = 0; r < team.size; ++r) squared += partial_[r * ld_ + k];
      const T chi = std::sqrt(squared);
      // χ does not grow with the lag: it stands for the lags that were left out, too.
      s.chi_sum[k] += s.chi[k] * static_cast<T>(lag - s.seen - 1) + chi;
      s.chi[k] = chi;
      total += static_cast<double>(pi_[k]) * squared;
    }
    s.seen = lag;
    team.wait();
    return std::sqrt(total);
  }

  // Whether everything after the lag, whose C is at hand, may be replaced by ρ^m x uᵀ.
  bool perron_certifies(const SecondTerm<T>& p, int64_t lag, int64_t n, State& s, double& bound, const Team& team) {
    const double norm = mixing(lag, n, s, team);
    s.mixes = norm < 1;
    if (!s.mixes) return false;
    double mantissa;
    int64_t exponent;
    power_of_ratio(lag, mantissa, exponent);
    if (team.rank == 0) {
      for (int64_t k = 0; k < ld_; ++k) weighted_x_[k] = k < H_ ? x_narrow_[k] * s.chi_sum[k] : T(0);
    }
    team.wait();
    T most = 0;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const double row = u_[j] * s.sigma[j - s.j0] * s.growth[j - s.j0] * mantissa / (1 - norm);
      const T r = static_cast<T>(std::ldexp(row, static_cast<int>(s.sum_exponent + exponent - s.exponent)));
      most = std::max(most, largest_share(p, j, s, [&](int64_t k) {
        return load(s.sums + j * ld_ + k) * (r * load(weighted_x_ + k));
      }));
    }
    const double slack = static_cast<double>(T_) * (x_spread_ + u_spread_);
    const double found = static_cast<double>(largest_of(most, team)) + slack;
    if (!(found <= p.rtol)) return false;
    bound = found;
    return true;
  }

  // The largest f W̃[j, k] · error(k) / κ[j, k] over a row; errors are on the scale of S.
  template <typename Error>
  T largest_share(const SecondTerm<T>& p, int64_t j, const State& s, const Error& error) const {
    constexpr int64_t width = Simd<T>::width;
    const T factor = static_cast<T>(p.factor), first = power_of_two<T>(*p.exponent - s.exponent - p.weight_exponent);
    Vec<T> most{};
    for (int64_t k = 0; k < H_; k += width) {
      Vec<T> w = load(p.weight + j * H_ + k, H_ - k) * p.scale;
      w *= w * factor;
      const Vec<T> kappa = load(p.kappa + j * H_ + k, H_ - k) * first + w * load(pairs_ + j * ld_ + k);
      const Vec<T> share = w * error(k) / (kappa + std::numeric_limits<T>::min());
      most = share <= most ? most : share == share ? share : Vec<T>{} + std::numeric_limits<T>::infinity();
    }
    return largest_lane<T>(most);
  }

  T largest_of(T mine, const Team& team) {
    maxima_[team.rank] = mine;
    team.wait();
    T most = 0;
    for (int64_t r = 0; r < team.size; ++r) most = std::max(most, maxima_[r]);
    team.wait();
    return most;
  }

  // Rows of a filtered sequence: a thread's own entries, or all of them.
  struct Filtered {
    std::vector<int64_t> exponent, largest;
    std::vector<T> coefficients;
    Closed<T> closed;
    T* data;
    int64_t row;

    Filtered(T* memory, int64_t n, int64_t entries) : exponent(n), largest(n), data(memory), row(entries) {}
    Rows<T> rows() { return {data, exponent.data(), largest.data(), row, &closed}; }
    // Brings row t, on the scale 2^e, near the centre; returns the factor that does.
    T centre(int64_t t, int64_t e) {
      T* const out = data + t * row;
      Vec<T> most{};
      for (int64_t k = 0; k < row; k += Simd<T>::width) most = maximum<T>(most, load(out + k));
      const int64_t m = magnitude(largest_lane<T>(most));
      const int64_t shift = m == kZeroExponent || std::abs(kCentre<T> - m) <= kSlack ? 0 : kCentre<T> - m;
      const T scale = std::ldexp(T(1), static_cast<int>(shift));
      for (int64_t k = 0; shift != 0 && k < row; k += Simd<T>::width) store(out + k, load(out + k) * scale);
      exponent[t] = m == kZeroExponent ? kZeroExponent : e - shift;
      largest[t] = m == kZeroExponent ? kZeroExponent : m + shift;
      return scale;
    }
  };
  T* own_memory(const State& s, const Team& team) {
    return filtered_ + T_ * (s.j0 / Simd<T>::width + 2 * team.rank) * Simd<T>::width;
  }

  // S += ρ^{lag+1} (u xᵀ) ⊙ Σ_t E_t h_tᵀ, E_t = δ_{t+lag+3} + ρ E_{t+1}. Where δ has a closed form, so has E: the same
  // basis and the row of E that was reached before.
  void add_perron_tail(const SecondTerm<T>& p, int64_t lag, State& s, const Team& team) {
    const int64_t n = T_ - 2 - lag, own = s.j1 - s.j0;
    const Rows<T> d = p.d.from(lag + 2);
    const Closed<T> closed = d.closed();
    const int64_t begin = std::min(closed.count ? closed.last : 0, n);  // rows before it are in closed form
    Filtered e(own_memory(s, team), n + 1, padded<T>(own));
    const T ratio = static_cast<T>(ratio_);
    std::fill(e.data + n * e.row, e.data + (n + 1) * e.row, T(0));
    e.exponent[n] = e.largest[n] = kZeroExponent;
    for (int64_t t = n - 1; t >= begin; --t) {
      const int64_t from = e.exponent[t + 1] == kZeroExponent ? kZeroExponent : e.exponent[t + 1] + ratio_exponent_;
      const int64_t top = std::max(from, d.exponent[t]);
      const T a = ratio * power_of_two<T>(from - top), b = power_of_two<T>(d.exponent[t] - top);
      T *out = e.data + t * e.row, *before = out + e.row;
      for (int64_t j = 0; j < own; ++j) out[j] = a * before[j] + b * d[t][s.j0 + j];
      std::fill(out + own, out + e.row, T(0));
      e.centre(t, top);
    }
    if (begin > 0) {
      e.closed.last = begin;
      e.closed.count = closed.count + 1;
      e.coefficients.resize(e.closed.count * begin);
      for (int i = 0; i < e.closed.count; ++i) e.closed.coefficients[i] = e.coefficients.data() + i * begin;
      for (int i = 0; i < closed.count; ++i) e.closed.basis[i] = closed.basis[i] + s.j0;
      e.closed.basis[closed.count] = e.data + begin * e.row;
      // E_t = (Σ_i c_i basis_i) · 2^at.
      double c[Closed<T>::kMost] = {};
      c[closed.count] = 1;
      int64_t at = e.exponent[begin];
      for (int64_t t = begin - 1; t >= 0; --t) {
        const int64_t from = at == kZeroExponent ? at : at + ratio_exponent_, top = std::max(from, d.exponent[t]);
        const double a = ratio_ * power_of_two<double>(from - top), b = power_of_two<double>(d.exponent[t] - top);
        double most = 0;
        for (int i = 0; i < e.closed.count; ++i) {
          c[i] = a * c[i] + (i < closed.count ? b * closed.coefficients[i][t] : 0.0);
          most = std::max(most, c[i]);
        }
        at = top;
        if (most > 8 || most < 0.125) {
          const int m = std::ilogb(most);
          for (double& v : c) v = std::ldexp(v, -m);
          at += m;
        }
        for (int i = 0; i < e.closed.count; ++i) e.coefficients[i * begin + t] = static_cast<T>(c[i]);
        e.exponent[t] = at;
        e.largest[t] = kCentre<T> + kSlack + 5;  // a bound
      }
    }
    // Rows of E are this thread's alone.
    collect(PairSum<T>(e.rows(), p.h, n, 0, own, p.left, p.right), s);
    double mantissa;
    int64_t exponent;
    power_of_ratio(lag + 1, mantissa, exponent);
    const T scale = onto(s.sum_exponent + exponent, s);
    if (scale == T(0)) return;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T row = static_cast<T>(u_[j] * mantissa) * scale;
      for (int64_t k = 0; k < ld_; k += Simd<T>::width) {
        const int64_t i = j * ld_ + k;
        store(pairs_ + i, load(pairs_ + i) + load(s.sums + i) * (row * load(x_narrow_ + k)));
      }
    }
    s.stale = true;
  }

  // ---- the certificate by ratios ------------------------------------------------------------------------------------

  // Whether the ratios of the next power to this one are so close, in every column of P or in every row, that the sum of
  // all later lags is enclosed tightly enough; then the middle of the enclosure is added.
  bool ratios_certify(const SecondTerm<T>& p, int64_t lag, State& s, double& bound, const Team& team) {
    if (lag == 0) return false;
    constexpr int64_t width = Simd<T>::width;
    const T infinity = std::numeric_limits<T>::infinity();
    // The share of the lag that has just been added, for a guess whether it is worth the sums below.
    T share = 0;
    const T scale = onto(s.sum_exponent + exponents_[lag - 1], s);
    for (int64_t j = s.j0; j < s.j1; ++j) {
      share = std::max(share, largest_share(p, j, s, [&](int64_t k) {
        return load(s.sums + j * ld_ + k) * load(power(lag - 1) + j * ld_ + k) * scale;
      }));
    }
    form(lag + 1, team);
    if (exponents_[lag] == kZeroExponent) {
      team.wait();
      return false;  // nilpotent: the next lag ends the sum
    }
    const int64_t ratio_exponent = exponents_[lag] - exponents_[lag - 1];
    T* const low = partial_ + 2 * team.rank * ld_;
    T* const high = low + ld_;
    std::fill(low, low + ld_, infinity);
    std::fill(high, high + ld_, T(0));
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T *now = power(lag - 1) + j * ld_, *next = power(lag) + j * ld_;
      Vec<T> least = Vec<T>{} + infinity, most{};
      for (int64_t k = 0; k < ld_; k += width) {
        const Vec<T> a = load(now + k), b = load(next + k);
        const Vec<T> r = b / (a > T(0) ? a : Vec<T>{} + T(1));
        const Vec<T> up = a > T(0) ? r : b > T(0) ? Vec<T>{} + infinity : Vec<T>{};
        const Vec<T> down = a > T(0) ? r : Vec<T>{} + infinity;
        least = down < least ? down : least;
        most = maximum<T>(most, up);
        const Vec<T> l = load(low + k);
        store(low + k, down < l ? down : l);
        store(high + k, maximum<T>(load(high + k), up));
      }
      ratio_high_[j] = largest_lane<T>(most);
      ratio_low_[j] = std::min(ratio_high_[j], -largest_lane<T>(-least));
    }
    team.wait();
    if (team.rank == 0) {
      for (int64_t k = 0; k < ld_; ++k) {
        T a = infinity, b = 0;
        for (int64_t r = 0; r < team.size; ++r) {
          a = std::min(a, partial_[2 * r * ld_ + k]);
          b = std::max(b, partial_[(2 * r + 1) * ld_ + k]);
        }
        row_low_[k] = std::min(a, b);
        row_high_[k] = b;
      }
    }
    team.wait();
    const auto finite = [&](const T* v) { return *std::max_element(v, v + H_) < infinity; };
    return (finite(ratio_high_) && columns_certify(p, lag, ratio_exponent, share, s, bound, team)) ||
           (finite(row_high_) && rows_certify(p, lag, ratio_exponent, share, s, bound, team));
  }

  // By columns of P, which are rows of S: δ is filtered, each thread its own entries.
  bool columns_certify(const SecondTerm<T>& p, int64_t lag, int64_t ratio_exponent, T share, State& s, double& bound,
                       const Team& team) {
    const int64_t n = T_ - 2 - lag, own = s.j1 - s.j0;
    Filtered e(own_memory(s, team), n, padded<T>(own));
    filter(p.d.from(lag + 2), n - 1, -1, s.j0, own, ratio_low_, ratio_high_, ratio_exponent, e, width_ + s.j0);
    const T widest = own > 0 ? *std::max_element(width_ + s.j0, width_ + s.j1) : T(0);
    if (!promises(widest, share, n, p.rtol, team)) return false;
    collect(PairSum<T>(e.rows(), p.h, n, 0, own, p.left, p.right), s);
    return accept(p, lag, s, widest, bound, team, [&](int64_t j, int64_t) { return Vec<T>{} + width_[j]; });
  }

  // By rows: h is filtered, by one thread for all.
  bool rows_certify(const SecondTerm<T>& p, int64_t lag, int64_t ratio_exponent, T share, State& s, double& bound,
                    const Team& team) {
    const int64_t n = T_ - 2 - lag;
    if (team.rank == 0) {
      shared_filter_ = std::make_unique<Filtered>(filtered_, n, ld_);
      filter(p.h, 0, 1, 0, H_, row_low_, row_high_, ratio_exponent, *shared_filter_, width_);
      std::fill(width_ + H_, width_ + ld_, T(0));
    }
    team.wait();
    const T widest = *std::max_element(width_, width_ + H_);
    if (!promises(widest, share, n, p.rtol, team)) return false;
    collect(PairSum<T>(p.d.from(lag + 2), shared_filter_->rows(), n, s.j0, s.j1, p.left, p.right), s);
    const bool accepted =
        accept(p, lag, s, widest, bound, team, [&](int64_t, int64_t k) { return load(width_ + k); });
    return accepted;
  }

  // A guess, before the sums are formed: no bound rests on it.
  bool promises(T widest, T share, int64_t left, double rtol, const Team& team) {
    const double likely = std::min(1.0, static_cast<double>(largest_of(share, team)) * static_cast<double>(left));
    return static_cast<double>(largest_of(widest == widest ? widest : T(1), team)) * likely <= rtol;
  }

  // C holds the filtered sum: times the power it is the tail, wrong by at most the filter's relative half width.
  template <typename Width>
  bool accept(const SecondTerm<T>& p, int64_t lag, State& s, T widest, double& bound, const Team& team,
              const Width& half_width) {
    s.stale = true;
    const T scale = onto(s.sum_exponent + exponents_[lag - 1], s);
    const T* q = power(lag - 1);
    T most = 0;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      most = std::max(most, largest_share(p, j, s, [&](int64_t k) {
        return load(s.sums + j * ld_ + k) * load(q + j * ld_ + k) * (scale * half_width(j, k));
      }));
    }
    // Beside the tail, too, which is part of κ.
    const double found = std::min(largest_of(most, team), largest_of(widest, team));
    if (!(found <= p.rtol)) return false;
    bound = found;
    add(lag - 1, s);
    return true;
  }

  // E_t = ρ (x_t + E_{t'}), t' the row before in the direction `step`, from row `first` on, for every ρ in [low, high] ·
  // 2^exponent: the middles go to `e`, and to `width` the largest half width over the middle.
  void filter(const Rows<T>& in, int64_t first, int64_t step, int64_t j0, int64_t own, const T* low, const T* high,
              int64_t ratio_exponent, Filtered& e, T* width) const {
    const Closed<T> closed = in.closed();
    const int64_t n = static_cast<int64_t>(e.exponent.size());
    std::vector<T> x(own), least(own, T(0)), most(own, T(0));
    std::fill(width, width + own, T(0));
    int64_t before = kZeroExponent;
    for (int64_t i = 0, t = first; i < n; ++i, t += step) {
      std::fill(x.begin(), x.end(), T(0));
      const bool is_closed = closed.holds(t);
      for (int b = 0; b < (is_closed ? closed.count : 1); ++b) {
        const T c = is_closed ? closed.coefficients[b][t] : T(1);
        const T* row = (is_closed ? closed.basis[b] : in[t]) + j0;
        for (int64_t j = 0; in.exponent[t] != kZeroExponent && j < own; ++j) x[j] += c * row[j];
      }
      const int64_t top = std::max(before, in.exponent[t]);
      const T a = before == kZeroExponent ? T(0) : power_of_two<T>(before - top);
      const T b = in.exponent[t] == kZeroExponent ? T(0) : power_of_two<T>(in.exponent[t] - top);
      T* const out = e.data + t * e.row;
      for (int64_t j = 0; j < own; ++j) {
        least[j] = low[j0 + j] * (a * least[j] + b * x[j]);
        most[j] = high[j0 + j] * (a * most[j] + b * x[j]);
        out[j] = (least[j] + most[j]) / 2;
        if (most[j] > T(0)) width[j] = std::max(width[j], (most[j] - least[j]) / (most[j] + least[j]));
      }
      std::fill(out + own, out + e.row, T(0));
      const T scale = e.centre(t, top + ratio_exponent);
      for (int64_t j = 0; j < own; ++j) {
        least[j] *= scale;
        most[j] *= scale;
      }
      before = e.exponent[t];
    }
  }

  // ---- the end ------------------------------------------------------------------------------------------------------

  // κ = κ⁽¹⁾ + factor · W̃ ⊙ S, all rows on one scale.
  void finish(const SecondTerm<T>& p, State& s, const Team& team) {
    const int64_t first = *p.exponent, second = s.exponent <= kZeroExponent / 2 ? kZeroExponent : s.exponent + p.weight_exponent;
    const T factor = static_cast<T>(p.factor);
    T most1 = 0, most2 = 0;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      for (int64_t k = 0; k < H_; ++k) {
        T w = p.weight[j * H_ + k] * p.scale;
        w *= w * factor;
        T& term = pairs_[j * ld_ + k];
        term *= w;
        most1 = std::max(most1, p.kappa[j * H_ + k]);
        most2 = std::max(most2, term);
      }
    }
    const int64_t m1 = magnitude(most1), m2 = magnitude(most2);
    tops_[team.rank] = std::max(m1 == kZeroExponent ? m1 : m1 + first, m2 == kZeroExponent ? m2 : m2 + second);
    team.wait();
    const int64_t top = *std::max_element(tops_.begin(), tops_.begin() + team.size);
    const int64_t result = top <= kZeroExponent / 2 ? 0 : natural_exponent(top + 1);
    const auto to_result = [&](int64_t m, int64_t exponent) {
      return m == kZeroExponent ? T(0) : static_cast<T>(std::ldexp(1.0, static_cast<int>(exponent - result)));
    };
    const T a = to_result(m1, first), b = to_result(m2, second);
    for (int64_t j = s.j0; j < s.j1; ++j) {
      for (int64_t k = 0; k < H_; ++k) p.kappa[j * H_ + k] = a * p.kappa[j * H_ + k] + b * pairs_[j * ld_ + k];
    }
    team.wait();
    if (team.rank == 0) *p.exponent = result;
  }

  int64_t T_, H_, ld_, matrix_, chunk_, few_;
  Workspace<T, 1> memory_;
  T *pairs_, *sums_, *spare_, *first_powers_, *packed_first_, *packed_wide_, *filtered_;
  T *inverse_x_, *x_narrow_, *pi_, *ratio_low_, *ratio_high_, *row_low_, *row_high_, *width_, *weighted_x_, *partial_;
  T *powers_ = nullptr, *other_ = nullptr;
  Buffer<T> big_, next_;
  int64_t count_ = 0, wide_exponent_ = 0, ratio_exponent_ = 0;
  double ratio_ = 1, x_spread_ = 0, u_spread_ = 0;
  std::vector<int64_t> exponents_;
  std::vector<double> x_, u_;
  std::vector<T> row_dots_, power_tops_;
  std::unique_ptr<Filtered> shared_filter_;
  std::vector<int64_t> tops_;
  std::vector<int> lost_;  // by thread
  std::vector<T> maxima_;
};

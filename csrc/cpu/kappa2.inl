// κ⁽²⁾ of one recurrent matrix, in the pass that has just made its chains: S = Σ_n Q_n ⊙ C_n over the lags n, with
// C_n = Σ_t δ_{t+n+2} h_tᵀ and Q_n = (W̃ᵀ)^n, which lies in memory as S does. A few lags are summed one by one; the rest
// follow from one of two certificates (the proofs: reference.kappa2_certified). Each thread owns some rows of S.

template <typename T>
struct SecondTerm {
  Weights<T> weight;  // of W̃
  Rows<T> h, d;    // h_0 … h_{T-1}, δ_1 … δ_T
  const T* drive;  // of h at every step, or null: it varies
  int64_t drive_exponent;
  T* kappa;  // [H, H]: κ⁽¹⁾ comes, κ goes
  int64_t* exponent;
  bool monotone;   // whether δ_t ≥ δ_{t+1}: where every step is an output
  double factor;   // κ⁽²⁾ = factor · W̃ ⊙ S
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
        more_(chunk_ < seq_len - 2 ? chunk_ : 0),
        memory_((3 + chunk_ + more_) * matrix_ + 2 * padded<T>(Packed<T>::size(H_, H_)) + filtered_size(threads) +
                (9 + 2 * threads) * ld_),
        exponents_(chunk_ + 1),
        missing_(chunk_ + 1, 0.0),
        x_(ld_),
        u_(ld_),
        row_dots_(T_ + Closed<T>::kMost),
        tops_(threads),
        lost_(threads, 0),
        flushed_(threads, 0),
        maxima_(threads) {
    pairs_ = memory_.take(matrix_);
    sums_ = memory_.take(matrix_);
    spare_ = memory_.take(matrix_);
    powers_ = memory_.take(chunk_ * matrix_);
    other_ = memory_.take(more_ * matrix_);
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

  void run(SecondTerm<T> p, const Team& team) {
    // A few lags of a small matrix cost less than to ask whether they are needed.
    const double products = 2.0 * static_cast<double>(H_) * static_cast<double>(H_) * static_cast<double>(H_);
    if (T_ - 1 <= kMixing && products * static_cast<double>(T_) < 4e6) p.rtol = 0;
    State s;
    team.share(H_, s.j0, s.j1);
    s.sums = sums_;
    s.spare = spare_;
    std::fill(pairs_ + s.j0 * ld_, pairs_ + s.j1 * ld_, T(0));
    FlushDenormals::forget();
    first_power(p, team);
    int64_t summed = 0, lags = -1;
    double bound = 0;
    if (T_ > 1) {
      FlushDenormals::forget();
      add_diagonal(PairSum<T>(p.d.from(1), p.h, T_ - 1, s.j0, s.j1, p.left, p.right), s);
      summed = 1;
      if (p.rtol > 0 && T_ > 2 && diagonal(s, team)) {
        add_diagonal_tail(p, s, team);
        summed = T_ - 1;
        lags = 1;
      }
      bool perron = false;
      int64_t next_search = 0;
      int64_t base = 1;  // the lag of the first cached power
      while (summed < T_ - 1) {
        if (summed == base + chunk_) {
          next_chunk(std::min(chunk_, T_ - 1 - summed), base == 1, team);
          base += chunk_;
        }
        const int64_t end = std::min({batch_end(summed, p.first_lags), base + chunk_, T_ - 1});
        if (base == 1) form(end - 1, team);
        if (exponents_[summed - base] == kZeroExponent) {  // nilpotent: no more lags
          lost_[team.rank] |= missing_[summed - base] > 0;
          break;
        }
        // The certificates trust every entry of the powers.
        const bool tests = p.rtol > 0 && end < T_ - 1 && end >= p.first_lags && missing_[end - 1 - base] == 0;
        // The last lag first: the tests look at it.
        sum_pairs(p, end - 1, s);
        add(end - 1 - base, s);
        const int64_t lag = end - 1;
        if (p.rtol > 0 && !perron && base == 1 && end >= next_search) {
          perron = find_perron(p, lag, s, team);
          next_search = 2 * end;
        }
        if (perron) {
          for (int64_t n = std::max(s.seen + 1, base); n < std::min(lag, kMixing); ++n) mixing(n, n - base, s, team);
        }
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
      *p.lags = lags < 0 ? summed : lags;
      *p.bound = bound;
    }
    team.wait();
  }

 private:
  // Lags that are tested one by one; from there on their number doubles between tests.
  static constexpr int64_t kSingle = 8;
  // Lags whose χ are all looked at; beyond, they are small.
  static constexpr int64_t kMixing = 16;

  // A product of two vectors has its largest entry near 2^(2 kCentre); C and S keep some bits free for sums.
  static constexpr int64_t kHeadroom = 16, kLargest = 2 * kCentre<T> - kHeadroom;

  // What a thread knows alone: its rows of S, on the scale 2^exponent, and of the last lag's C, on 2^sum_exponent.
  struct State {
    int64_t j0, j1;
    int64_t exponent = kZeroExponent, sum_exponent = kZeroExponent;
    T *sums, *spare;
    // For the Perron certificate: χ of the last lag that was looked at, Σ_m χ_m, Σ_m ρ^m χ_m, and σ of own rows.
    std::vector<T> chi, chi_sum, chi_series, sigma;
    int64_t seen = 0;
    bool mixes = false;
    std::vector<T> growth;  // g_j of own rows
    bool stale = false;     // whether a tail has replaced C
    // What may be missing from an entry of S, and of C, because it underflowed.
    double missing = 0, sum_missing = 0;
  };

  static constexpr double kTiny = std::numeric_limits<T>::min();
  static double power(int64_t n) { return std::ldexp(1.0, static_cast<int>(std::clamp<int64_t>(n, -2000, 2000))); }
  // The largest entry of C, at most.
  double most_of_sum() const { return static_cast<double>(T_) * power(kLargest + 1); }

  static int64_t chunk(int64_t seq_len, int64_t hidden, int64_t workspace_bytes) {
    const int64_t matrix = hidden * padded<T>(hidden) * static_cast<int64_t>(sizeof(T));
    const int64_t needed = std::max<int64_t>(seq_len - 2, 1), budget = std::max<int64_t>(workspace_bytes / matrix, 8);
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
  const T* cached(int64_t n) const { return powers_ + n * matrix_; }

  void first_power(const SecondTerm<T>& p, const Team& team) {
    int64_t first, last;
    team.share(H_, first, last);
    constexpr int64_t kBlock = 16;
    for (int64_t j0 = first; j0 < last; j0 += kBlock) {
      const int64_t j1 = std::min(j0 + kBlock, last);
      for (int64_t k0 = 0; k0 < H_; k0 += kBlock) {
        // By way of a small square: rows of either matrix may lie a power of two apart, on the same cache lines.
        const int64_t k1 = std::min(k0 + kBlock, H_);
        T square[kBlock][kBlock + 1];
        for (int64_t k = k0; k < k1; ++k) {
          for (int64_t j = j0; j < j1; ++j) {
            const T v = p.weight.data[k * H_ + j] * p.weight.column[j] * p.weight.row[k];
            square[j - j0][k - k0] = v * v;
          }
        }
        for (int64_t j = j0; j < j1; ++j) std::copy(square[j - j0], square[j - j0] + (k1 - k0), powers_ + j * ld_ + k0);
      }
      for (int64_t j = j0; j < j1; ++j) std::fill(powers_ + j * ld_ + H_, powers_ + (j + 1) * ld_, T(0));
    }
    if (team.rank == 0) {
      exponents_[0] = p.weight.exponent;
      count_ = 1;
    }
    lost_[team.rank] |= FlushDenormals::lost();
    team.wait();
    pack(first_factor(), powers_, ld_, 1, team, [](T v) { return v; });
    team.wait();
  }

  // Powers 1 … last of the first chunk: one by one, or as many again as there are in one wide product.
  void form(int64_t last, const Team& team) {
    while (count_ < last) {
      const int64_t have = count_, more = std::min(have, last - have);
      team.wait();
      if (more == 1) {
        multiply(cached(have - 1), have - 1, 1, first_factor(), exponents_[0], missing_[0], powers_ + have * matrix_, have,
                 team);
      } else {
        pack_wide(have - 1, team);
        multiply(powers_, 0, more, wide_factor(), exponents_[have - 1], missing_[have - 1], powers_ + have * matrix_, have,
                 team);
      }
      if (team.rank == 0) count_ += more;
      team.wait();
    }
  }

  void pack_wide(int64_t n, const Team& team) {
    pack(wide_factor(), cached(n), ld_, 1, team, [](T v) { return v; });
    team.wait();
  }

  // The cached powers times the last of the first chunk.
  void next_chunk(int64_t wanted, bool first, const Team& team) {
    team.wait();
    if (first) {
      if (team.rank == 0) {
        wide_exponent_ = exponents_[chunk_ - 1];
        wide_missing_ = missing_[chunk_ - 1];
      }
      pack_wide(chunk_ - 1, team);
    }
    multiply(powers_, 0, wanted, wide_factor(), wide_exponent_, wide_missing_, other_, 0, team);
    if (team.rank == 0) std::swap(powers_, other_);
    team.wait();
  }

  // to[i] = from[i] · right for i = 0 … count-1, each brought back to a largest entry in [1, 2).
  // from[i] has exponent exponents_[from_at + i], to[i] gets exponents_[to_at + i]; likewise what may be missing.
  void multiply(const T* from, int64_t from_at, int64_t count, const Packed<T>& right, int64_t right_exponent,
                double right_missing, T* to, int64_t to_at, const Team& team) {
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
    const double rows = 2 * static_cast<double>(H_);  // an entry of a product has so much of the largest error, at most
    std::vector<double> scales(team.rank == 0 ? count : 0);
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
        scales[i] = s;
      }
    }
    flushed_[team.rank] = FlushDenormals::lost();
    team.wait();
    if (team.rank == 0) {
      const bool flushed = std::find(flushed_.begin(), flushed_.begin() + team.size, 1) != flushed_.begin() + team.size;
      for (int64_t i = 0; i < count; ++i) {
        const double own = rows * (missing_[from_at + i] * (1 + right_missing) + right_missing);
        missing_[to_at + i] = scales[i] * (own + (flushed ? rows * kTiny : 0)) + (flushed ? kTiny : 0);
      }
    }
    team.wait();
  }

  // ---- lags ---------------------------------------------------------------------------------------------------------

  // A lag, or a tail, whose power of W̃ is diagonal: S[j, j] += Σ_t d_t[j] h_t[j].
  void add_diagonal(const PairSum<T>& sum, State& s) {
    if (sum.count == 0) return;
    const int64_t to = sum.largest - kLargest;
    const T scale = onto(to, s), alpha = std::ldexp(T(1), static_cast<int>(sum.exponent - to)) * scale;
    for (int i = 0; i < sum.count; ++i) {
      const Product<T>& m = sum.products[i];
      for (int64_t t = 0; t < m.depth; ++t) {
        for (int64_t j = s.j0; j < s.j1; ++j) {
          pairs_[j * ld_ + j] += m.a[t * m.a_col + j - s.j0] * alpha * m.b[t * m.b_row + j];
        }
      }
    }
    s.sum_missing = 0;
    if (sum.drops || FlushDenormals::lost()) {
      s.sum_missing = power(sum.missing + sum.exponent - to);
      s.missing += static_cast<double>(T_) * power(std::numeric_limits<T>::min_exponent + kHighest<T>);
    }
    miss(to, scale, most_of_sum(), 0, s);
  }

  // What S misses of a term, C times entries of at most 2 of which `power_missing` may be missing, that `onto` has scaled.
  void miss(int64_t from, T scale, double most, double power_missing, State& s) const {
    if (from <= kZeroExponent / 2) return;
    const double size = power(from - s.exponent);
    s.missing += size * (most * power_missing + s.sum_missing * (2 + power_missing)) + kTiny;
    if (scale == T(0)) s.missing += size * most * 2;
  }

  // Whether W̃ is diagonal: then its first power tells all the others.
  bool diagonal(const State& s, const Team& team) {
    T beside = 0;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T* q = cached(0) + j * ld_;
      for (int64_t k = 0; k < H_ && beside == T(0); ++k) beside = k == j ? T(0) : q[k];
      ratio_low_[j] = ratio_high_[j] = q[j];
    }
    return largest_of(beside, team) == T(0);
  }
  void add_diagonal_tail(const SecondTerm<T>& p, State& s, const Team& team) {
    const int64_t n = T_ - 2, own = s.j1 - s.j0;
    Filtered e(own_memory(s, team), n, padded<T>(own));
    lost_[team.rank] |=
        !filter(p.d.from(2), n - 1, -1, s.j0, own, ratio_low_, ratio_high_, exponents_[0], e, width_ + s.j0);
    // Rows of E are this thread's alone; so are the columns of h that meet them.
    const PairSum<T> sum(e.rows(), p.h, n, 0, own, p.left, p.right);
    add_diagonal(sum, s);
  }

  // C of a lag, this thread's rows, its entries near 2^kLargest at most.
  void sum_pairs(const SecondTerm<T>& p, int64_t lag, State& s) {
    collect(p, p.d.from(lag + 1), p.h, T_ - 1 - lag, s.j0, s.j1, s);
  }
  void collect(const SecondTerm<T>& p, const Rows<T>& d, const Rows<T>& h, int64_t n, int64_t j0, int64_t j1, State& s) {
    FlushDenormals::forget();
    const PairSum<T> sum(d, h, n, j0, j1, p.left, p.right);
    s.stale = false;
    s.sum_missing = 0;
    if (sum.count == 0) {
      s.sum_exponent = kZeroExponent;
      std::fill(s.sums + s.j0 * ld_, s.sums + s.j1 * ld_, T(0));
      return;
    }
    s.sum_exponent = sum.largest - kLargest;
    sum.multiply(s.sums + s.j0 * ld_, ld_, s.j1 - s.j0, H_,
                 std::ldexp(T(1), static_cast<int>(sum.exponent - s.sum_exponent)));
    for (int64_t j = s.j0; j < s.j1; ++j) std::fill(s.sums + j * ld_ + H_, s.sums + (j + 1) * ld_, T(0));
    if (sum.drops || FlushDenormals::lost()) s.sum_missing = power(sum.missing + sum.exponent - s.sum_exponent) + kTiny;
  }

  // The factor that brings numbers on the scale 2^from to S's own, which grows where it must; zero: negligible.
  T onto(int64_t from, State& s) {
    if (from <= kZeroExponent / 2 || from < s.exponent - kNegligible<T>) return T(0);
    if (from > s.exponent) {
      const T shrink = power_of_two<T>(s.exponent - from);
      if (s.exponent > kZeroExponent / 2) {
        s.missing = s.missing * power(s.exponent - from) + kTiny;
        if (shrink == T(0)) s.missing += power(std::numeric_limits<T>::max_exponent + s.exponent - from);
      }
      for (int64_t at = s.j0 * ld_; at < s.j1 * ld_; at += Simd<T>::width) store(pairs_ + at, load(pairs_ + at) * shrink);
      s.exponent = from;
    }
    return power_of_two<T>(from - s.exponent);
  }

  // The same, with no effect on S: infinite where S would have to grow beyond the dtype.
  static T scale_beside(int64_t from, const State& s) {
    return from <= kZeroExponent / 2 ? T(0) : power_of_two<T>(from - s.exponent);
  }

  // S += C ⊙ the n-th cached power.
  void add(int64_t n, State& s) {
    const int64_t from = exponents_[n] == kZeroExponent ? kZeroExponent : s.sum_exponent + exponents_[n];
    const T scale = onto(from, s);
    miss(from, scale, most_of_sum(), missing_[n], s);
    if (scale == T(0)) return;
    const T* q = cached(n);
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
      descend(p, lag, lag - base, rest, rest_exponent, s);
    }
  }

  // The largest sum of a row of the stored W̃: what C times W̃ᵀ makes of an error, at most.
  double largest_line() const {
    std::vector<double> sums(H_, 0.0);
    const Packed<T> w = first_factor();
    for (int64_t panel = 0; panel < w.panels(); ++panel) {
      for (int64_t k = 0; k < H_; ++k) {
        for (int64_t n = 0; n < w.width(panel); ++n) sums[panel * w.panel + n] += w.begin(panel)[k * w.row(panel) + n];
      }
    }
    return *std::max_element(sums.begin(), sums.end());
  }

  // C of the lag from that of the next, and S += C ⊙ the n-th cached power.
  void descend(const SecondTerm<T>& p, int64_t lag, int64_t n, const T* rest, int64_t rest_exponent, State& s) {
    const Packed<T> w = first_factor();
    const int64_t at = s.j0 * ld_, rows = s.j1 - s.j0;
    FlushDenormals::forget();
    for (int64_t panel = 0; panel < w.panels(); ++panel) {
      Tile<T> t{};
      t.c = s.spare + at + panel * w.panel;
      t.c_row = ld_;
      step(t, s.sums + at, ld_, w, panel, static_cast<const Product<T>*>(nullptr), rows);
    }
    std::swap(s.sums, s.spare);
    const auto pair = [](int64_t a, int64_t b) {
      return a == kZeroExponent || b == kZeroExponent ? kZeroExponent : a + b;
    };
    const int64_t driven = pair(rest_exponent, p.drive_exponent);
    const int64_t started = pair(p.d.exponent[lag + 1], p.h.exponent[0]);
    const int64_t old = pair(s.sum_exponent, p.weight.exponent);
    const int64_t top = std::max({old, driven + kHeadroom, started + kHeadroom});
    const T a = power_of_two<T>(old - top);
    const T b = power_of_two<T>(driven + kHeadroom - top), c = power_of_two<T>(started + kHeadroom - top);
    const T down = power_of_two<T>(-kHeadroom);
    const int64_t from = exponents_[n] == kZeroExponent ? kZeroExponent : top + exponents_[n];
    const T scale = onto(from, s);
    const double sides = 2 * static_cast<double>(H_), most_before = most_of_sum() * sides;
    double missing = s.sum_missing == 0 ? 0 : power(old - top) * s.sum_missing * largest_line();
    if (a == T(0)) missing += power(old - top) * most_before;
    for (const int64_t left_out : {b == T(0) ? driven : kZeroExponent, c == T(0) ? started : kZeroExponent}) {
      if (left_out > kZeroExponent / 2) missing += power(2 * kHighest<T> + left_out - top);
    }
    const T* const q = cached(n);
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
        const int64_t i = j * ld_ + k;
        store(pairs_ + i, load(pairs_ + i) + v * load(q + i) * scale);
      }
    }
    if (FlushDenormals::lost()) missing += power(std::numeric_limits<T>::min_exponent + kHighest<T>) + sides * kTiny;
    s.sum_missing = missing;
    miss(from, scale, most_before, missing_[n], s);
    s.sum_exponent = top;
    const int64_t m = magnitude(largest_lane<T>(most)), shift = kLargest - m;
    if (m == kZeroExponent || std::abs(shift) <= kSlack) return;
    const T centring = std::ldexp(T(1), static_cast<int>(shift));
    FlushDenormals::forget();
    for (int64_t i = at; i < s.j1 * ld_; i += Simd<T>::width) store(s.sums + i, load(s.sums + i) * centring);
    s.sum_exponent -= shift;
    s.sum_missing = s.sum_missing * power(shift) + (FlushDenormals::lost() ? kTiny : 0);
  }

  // ---- the Perron certificate ---------------------------------------------------------------------------------------

  // The right (x) and left (u) Perron vectors by power iteration in double, one on either end of the team, u · x = 1,
  // until the Collatz-Wielandt bounds of the eigenvalue agree well enough for all steps. False if they do not.
  bool find_perron(const SecondTerm<T>& p, int64_t lag, State& s, const Team& team) {
    const double wanted = p.rtol / 64 / static_cast<double>(T_);
    const auto right = [this](const T* q, const double* a, double* out) { multiply_wide<true>(q, a, out); };
    const auto left = [this](const T* q, const double* a, double* out) { multiply_wide<false>(q, a, out); };
    double centre = 0;
    if (team.rank == 0) {
      x_spread_ = power_iteration(x_, lag, wanted, centre, right);
      const int m = x_spread_ <= wanted ? std::ilogb(centre) : 0;
      ratio_ = std::ldexp(centre, -m);
      ratio_exponent_ = exponents_[0] + m;
    }
    if (team.rank == team.size - 1) u_spread_ = power_iteration(u_, lag, wanted, centre, left);
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
    growths(p, s, team);
    s.chi.assign(ld_, T(0));
    s.chi_sum.assign(ld_, T(0));
    s.chi_series.assign(ld_, T(0));
    s.sigma.resize(s.j1 - s.j0);
    return true;
  }

  // The relative distance of the bounds of the eigenvalue, infinite for none, and their middle; `v` has its largest entry
  // at one. Starts with the power of the lag, which is at hand, until its rounding could show.
  template <typename Multiply>
  double power_iteration(std::vector<double>& v, int64_t lag, double wanted, double& centre, const Multiply& multiply) {
    constexpr int kMost = 32, kPatience = 4;
    constexpr double kNone = std::numeric_limits<double>::infinity();
    std::vector<double> next(ld_, 0.0);
    std::fill(v.begin(), v.end(), 0.0);
    std::fill(v.begin(), v.begin() + H_, 1.0);
    double spread = kNone, before = kNone;
    for (int i = 1; i <= kMost; ++i) {
      const bool first = lag == 1 || spread < 0x1p-18;
      multiply(cached(first ? 0 : lag - 1), v.data(), next.data());
      double low = kNone, high = 0, top = 0, least = kNone;
      for (int64_t k = 0; k < H_; ++k) {
        const double r = next[k] / v[k];
        low = std::min(low, r);
        high = std::max(high, r);
        top = std::max(top, next[k]);
        least = std::min(least, next[k]);
      }
      // Entries that a float could not hold beside one are refused.
      if (!(low > 0) || least < top * 0x1p-100) return kNone;
      for (int64_t k = 0; k < H_; ++k) v[k] = next[k] / top;
      spread = high / low - 1;
      centre = std::sqrt(low) * std::sqrt(high);
      if (first && spread <= wanted) return spread;
      if (i % kPatience == 0) {
        if (!(spread < before / 2)) return kNone;
        before = spread;
      }
    }
    return kNone;
  }

  // out = qᵀ a or q a in double, four rows of q at a time.
  template <bool Transposed>
  void multiply_wide(const T* q, const double* a, double* out) const {
    constexpr int64_t width = Simd<double>::width, kRows = 4;
    if (Transposed) std::fill(out, out + ld_, 0.0);
    for (int64_t k = 0; k < H_; k += kRows) {
      const int64_t rows = std::min(kRows, H_ - k);
      const T* row[kRows];
      double s[kRows];
      Vec<double> dot[kRows];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        row[r] = q + (k + std::min(r, rows - 1)) * ld_;
        s[r] = Transposed && r < rows ? a[k + r] : 0.0;
        dot[r] = Vec<double>{};
      }
      for (int64_t j = 0; j < ld_; j += width) {
        Vec<double> y = load((Transposed ? out : a) + j);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; ++r) {
          if (Transposed) y += s[r] * load_wide(row[r] + j);
          else dot[r] += y * load_wide(row[r] + j);
        }
        if (Transposed) store(out + j, y);
      }
      for (int64_t r = 0; !Transposed && r < rows; ++r) out[k + r] = lane_sum<double>(dot[r]);
    }
  }

  // g_j ≥ ρ^m δ_{s+m}[j] / δ_s[j] for all s, m: x · δ_s ≥ ρ^m x · δ_{s+m}, so the largest quotient of
  // δ_s[j] / (u_j x · δ_s) over the steps s by the smallest will do; for a closed form, over its basis.
  void growths(const SecondTerm<T>& p, State& s, const Team& team) {
    std::vector<const T*> rows;
    const Closed<T> closed = p.d.closed();
    for (int64_t t = 0; t < T_; ++t) {
      if (closed.holds(t)) t = closed.last;
      if (t < T_ && p.d.largest[t] != kZeroExponent) rows.push_back(p.d[t]);
    }
    for (int i = 0; i < closed.count; ++i) rows.push_back(closed.basis[i]);
    int64_t first, last;
    team.share(static_cast<int64_t>(rows.size()), first, last);
    for (int64_t r = first; r < last; ++r) {
      Vec<double> dot{};
      for (int64_t k = 0; k < ld_; k += Simd<double>::width) dot += load(x_.data() + k) * load_wide(rows[r] + k);
      row_dots_[r] = static_cast<T>(1 / lane_sum<double>(dot));
    }
    team.wait();
    const int64_t own = s.j1 - s.j0;
    std::vector<T> most(own, T(0)), least(own, std::numeric_limits<T>::infinity());
    for (size_t r = 0; r < rows.size(); ++r) {
      for (int64_t j = 0; j < own; ++j) {
        const T v = rows[r][s.j0 + j] * row_dots_[r];
        most[j] = v > most[j] ? v : most[j];
        least[j] = v < least[j] ? v : least[j];
      }
    }
    s.growth.resize(own);
    for (int64_t j = 0; j < own; ++j) s.growth[j] = most[j] / least[j];
  }

  double ratio() const { return std::ldexp(ratio_, static_cast<int>(std::clamp<int64_t>(ratio_exponent_, -2000, 2000))); }
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
      const T* q = cached(n) + j * ld_;
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
    // ρ^lag, and the sum of the powers left out.
    const double rho = ratio(), power = std::pow(rho, static_cast<double>(lag));
    double others = 0;
    for (int64_t m = s.seen + 1; m < lag; ++m) others += std::pow(rho, static_cast<double>(m));
    for (int64_t k = 0; k < H_; ++k) {
      T squared = 0;
      for (int64_t r = 0; r < team.size; ++r) squared += partial_[r * ld_ + k];
      const T chi = std::sqrt(squared);
      // χ does not grow with the lag: it stands for the lags that were left out, too.
      s.chi_sum[k] += s.chi[k] * static_cast<T>(lag - s.seen - 1) + chi;
      s.chi_series[k] += s.chi[k] * static_cast<T>(others) + chi * static_cast<T>(power);
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
    // Later lags weigh no more than σ_j χ_m[k] each, which shrinks by X every `lag` lags. Where C does not grow, ρ^m stands
    // beside it, and may be enough by itself.
    const double rho = ratio(), infinity = std::numeric_limits<double>::infinity();
    const T decay = static_cast<T>(rho < 1 ? std::pow(rho, static_cast<double>(lag + 1)) / (1 - rho) : infinity);
    const double both = std::pow(rho, static_cast<double>(lag)) * norm;
    const T repeat = static_cast<T>(both < 1 ? 1 / (1 - both) : infinity);
    const auto series_weight = [&](int64_t k) {
      return std::min(s.chi_series[k] + decay * s.chi[k], s.chi_series[k] * repeat);
    };
    T largest_sum = 0, largest_series = 0;
    for (int64_t k = 0; k < H_; ++k) {
      largest_sum = std::max(largest_sum, s.chi_sum[k]);
      largest_series = std::max(largest_series, series_weight(k));
    }
    const bool series = p.monotone && largest_series < (s.mixes ? largest_sum / (1 - norm) : infinity);
    if (!s.mixes && !series) return false;
    if (team.rank == 0) {
      for (int64_t k = 0; k < ld_; ++k) {
        const T weight = series ? series_weight(k) : s.chi_sum[k] / static_cast<T>(1 - norm);
        weighted_x_[k] = k < H_ ? x_narrow_[k] * weight : T(0);
      }
    }
    team.wait();
    double mantissa;
    int64_t exponent;
    power_of_ratio(lag, mantissa, exponent);
    T most = 0;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const double row = u_[j] * s.sigma[j - s.j0] * (series ? T(1) : s.growth[j - s.j0]) * mantissa;
      const T r = static_cast<T>(std::ldexp(row, static_cast<int>(s.sum_exponent + exponent - s.exponent)));
      most = std::max(most, largest_share(p, j, s, [&](int64_t k) {
        return load(s.sums + j * ld_ + k) * (r * load(weighted_x_ + k));
      }));
    }
    // x, u and ρ are themselves known to within their bounds alone.
    const double widest = largest_of(s.sigma.empty() ? T(0) : *std::max_element(s.sigma.begin(), s.sigma.end()), team);
    const double theta = std::expm1(static_cast<double>(T_) * (x_spread_ + u_spread_));
    const double slack = theta * (series ? 2 + widest * static_cast<double>(largest_sum) : 1 + widest / (1 - norm));
    const double found = slack < 1 ? ((1 + theta) * largest_of(most, team) + slack) / (1 - slack) : infinity;
    if (!(found <= p.rtol)) return false;
    bound = found;
    return true;
  }

  // The largest f W̃[j, k] · error(k) / κ[j, k] over a row; errors are on the scale of S.
  template <typename Error>
  T largest_share(const SecondTerm<T>& p, int64_t j, const State& s, const Error& error) const {
    constexpr int64_t width = Simd<T>::width;
    const T factor = static_cast<T>(p.factor), first = power_of_two<T>(*p.exponent - s.exponent - p.weight.exponent);
    Vec<T> most{};
    for (int64_t k = 0; k < H_; k += width) {
      Vec<T> w = load(p.weight.data + j * H_ + k, H_ - k) * load(p.weight.column + k) * p.weight.row[j];
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
    // Brings row t, on the scale 2^e, near the centre; returns two factors that do, as one may be out of range.
    std::pair<T, T> centre(int64_t t, int64_t e) {
      T* const out = data + t * row;
      Vec<T> most{};
      for (int64_t k = 0; k < row; k += Simd<T>::width) most = maximum<T>(most, load(out + k));
      const int64_t m = magnitude(largest_lane<T>(most));
      const int64_t shift = m == kZeroExponent || std::abs(kCentre<T> - m) <= kSlack ? 0 : kCentre<T> - m;
      const T s1 = std::ldexp(T(1), static_cast<int>(shift / 2)), s2 = std::ldexp(T(1), static_cast<int>(shift - shift / 2));
      for (int64_t k = 0; shift != 0 && k < row; k += Simd<T>::width) store(out + k, load(out + k) * s1 * s2);
      exponent[t] = m == kZeroExponent ? kZeroExponent : e - shift;
      largest[t] = m == kZeroExponent ? kZeroExponent : m + shift;
      return {s1, s2};
    }
  };
  // Entries [j0, j0 + own) of row t, near the centre, and their exponent: the rest of the row may be far larger.
  static int64_t own_part(const Rows<T>& rows, const Closed<T>& closed, int64_t t, int64_t j0, int64_t own, T* out) {
    std::fill(out, out + own, T(0));
    if (rows.exponent[t] == kZeroExponent) return kZeroExponent;
    const bool is_closed = closed.holds(t);
    for (int b = 0; b < (is_closed ? closed.count : 1); ++b) {
      const T c = is_closed ? closed.coefficients[b][t] : T(1);
      const T* row = (is_closed ? closed.basis[b] : rows[t]) + j0;
      for (int64_t j = 0; j < own; ++j) out[j] += c * row[j];
    }
    const int64_t m = own > 0 ? magnitude(*std::max_element(out, out + own)) : kZeroExponent, shift = kCentre<T> - m;
    if (m == kZeroExponent) return m;
    if (std::abs(shift) <= kSlack) return rows.exponent[t];
    const T s1 = std::ldexp(T(1), static_cast<int>(shift / 2)), s2 = std::ldexp(T(1), static_cast<int>(shift - shift / 2));
    for (int64_t j = 0; j < own; ++j) out[j] = out[j] * s1 * s2;
    return rows.exponent[t] - shift;
  }
  // 2^(exponent - top) beside a term on the scale 2^top; `dropped`: it is not zero, but too small for the dtype.
  static T beside(int64_t exponent, int64_t top, bool& dropped) {
    const T scale = exponent == kZeroExponent ? T(0) : power_of_two<T>(exponent - top);
    dropped = dropped || (scale == T(0) && exponent != kZeroExponent);
    return scale;
  }
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
    std::vector<T> x(own);
    bool dropped = false;
    FlushDenormals::forget();
    for (int64_t t = n - 1; t >= begin; --t) {
      const int64_t from = e.exponent[t + 1] == kZeroExponent ? kZeroExponent : e.exponent[t + 1] + ratio_exponent_;
      const int64_t given = own_part(d, closed, t, s.j0, own, x.data()), top = std::max(from, given);
      bool left = false;
      const T a = ratio * beside(from, top, left), b = beside(given, top, left);
      T *out = e.data + t * e.row, *before = out + e.row;
      if (left) dropped = dropped || !covers(a > T(0) ? before : x.data(), a > T(0) ? x.data() : before, own);
      for (int64_t j = 0; j < own; ++j) out[j] = a * before[j] + b * x[j];
      std::fill(out + own, out + e.row, T(0));
      e.centre(t, top);
    }
    lost_[team.rank] |= dropped || FlushDenormals::lost();
    if (begin > 0) {
      e.closed.last = begin;
      e.closed.count = closed.count + 1;
      std::fill(e.largest.begin(), e.largest.begin() + begin, kCentre<T> + kSlack + 5);  // a bound
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
        const double c0 = c[0];
        for (int i = 0; i < e.closed.count; ++i) {
          c[i] = a * c[i] + (i < closed.count ? b * closed.coefficients[i][t] : 0.0);
          most = std::max(most, c[i]);
        }
        // δ at rest is alike at every step; once E is, too, so is the rest of it.
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
    // Rows of E are this thread's alone.
    collect(p, e.rows(), p.h, n, 0, own, s);
    double mantissa;
    int64_t exponent;
    power_of_ratio(lag + 1, mantissa, exponent);
    // u may have entries far above one, as x has none.
    const int m = std::ilogb(*std::max_element(u_.begin(), u_.begin() + H_));
    const int64_t from = s.sum_exponent == kZeroExponent ? kZeroExponent : s.sum_exponent + exponent + m;
    const T scale = onto(from, s);
    miss(from, scale, 2 * most_of_sum(), 0, s);
    s.stale = true;
    if (scale == T(0)) return;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T row = static_cast<T>(std::ldexp(u_[j], -m) * mantissa) * scale;
      for (int64_t k = 0; k < ld_; k += Simd<T>::width) {
        const int64_t i = j * ld_ + k;
        store(pairs_ + i, load(pairs_ + i) + load(s.sums + i) * (row * load(x_narrow_ + k)));
      }
    }
  }

  // ---- the certificate by ratios ------------------------------------------------------------------------------------

  // Whether the ratios of the next power to this one are so close, in every column of P or in every row, that the sum of
  // all later lags is enclosed tightly enough; then the middle of the enclosure is added.
  bool ratios_certify(const SecondTerm<T>& p, int64_t lag, State& s, double& bound, const Team& team) {
    constexpr int64_t width = Simd<T>::width;
    const T infinity = std::numeric_limits<T>::infinity();
    form(lag + 1, team);
    // Nilpotent: the next lag ends the sum. What underflowed has no ratio.
    if (exponents_[lag] == kZeroExponent || missing_[lag] > 0) return false;
    const int64_t ratio_exponent = exponents_[lag] - exponents_[lag - 1];
    // The share of the lag that has just been added, for guesses whether it is worth the sums below.
    const T scale = scale_beside(s.sum_exponent + exponents_[lag - 1], s);
    const auto share_of = [&](int64_t j) {
      return largest_share(p, j, s, [&](int64_t k) {
        return load(s.sums + j * ld_ + k) * load(cached(lag - 1) + j * ld_ + k) * scale;
      });
    };
    // One row of S tells for most matrices that it is not.
    if (!promises(s.j0 < s.j1 ? first_half_width(lag, s.j0) : T(0), s.j0 < s.j1 ? share_of(s.j0) : T(0), T_ - 2 - lag,
                  p.rtol, team)) {
      return false;
    }
    T share = 0;
    for (int64_t j = s.j0; j < s.j1; ++j) share = std::max(share, share_of(j));
    T* const low = partial_ + 2 * team.rank * ld_;
    T* const high = low + ld_;
    std::fill(low, low + ld_, infinity);
    std::fill(high, high + ld_, T(0));
    for (int64_t j = s.j0; j < s.j1; ++j) {
      const T *now = cached(lag - 1) + j * ld_, *next = cached(lag) + j * ld_;
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

  // The least half width that a filter with the ratios of row j can have.
  T first_half_width(int64_t lag, int64_t j) const {
    const T *now = cached(lag - 1) + j * ld_, *next = cached(lag) + j * ld_;
    T low = std::numeric_limits<T>::infinity(), high = 0;
    for (int64_t k = 0; k < H_; ++k) {
      if (now[k] == T(0) && next[k] > T(0)) return T(1);
      if (now[k] == T(0)) continue;
      low = std::min(low, next[k] / now[k]);
      high = std::max(high, next[k] / now[k]);
    }
    return high > T(0) ? (high - low) / (high + low) : T(0);
  }

  // By columns of P, which are rows of S: δ is filtered, each thread its own entries.
  bool columns_certify(const SecondTerm<T>& p, int64_t lag, int64_t ratio_exponent, T share, State& s, double& bound,
                       const Team& team) {
    const int64_t n = T_ - 2 - lag, own = s.j1 - s.j0;
    Filtered e(own_memory(s, team), n, padded<T>(own));
    const bool right = filter(p.d.from(lag + 2), n - 1, -1, s.j0, own, ratio_low_, ratio_high_, ratio_exponent, e,
                              width_ + s.j0);
    T widest = own > 0 ? *std::max_element(width_ + s.j0, width_ + s.j1) : T(0);
    if (!right) widest = std::numeric_limits<T>::infinity();
    if (!promises(widest, right ? share : T(1), n, p.rtol, team)) return false;
    collect(p, e.rows(), p.h, n, 0, own, s);
    return accept(p, lag, s, widest, bound, team, [&](int64_t j, int64_t) { return Vec<T>{} + width_[j]; });
  }

  // By rows: h is filtered, by one thread for all.
  bool rows_certify(const SecondTerm<T>& p, int64_t lag, int64_t ratio_exponent, T share, State& s, double& bound,
                    const Team& team) {
    const int64_t n = T_ - 2 - lag;
    if (team.rank == 0) {
      shared_filter_ = std::make_unique<Filtered>(filtered_, n, ld_);
      const bool right = filter(p.h, 0, 1, 0, H_, row_low_, row_high_, ratio_exponent, *shared_filter_, width_);
      std::fill(width_ + H_, width_ + ld_, T(0));
      if (!right) width_[0] = std::numeric_limits<T>::infinity();
    }
    team.wait();
    const T widest = *std::max_element(width_, width_ + H_);
    if (!promises(widest, share, n, p.rtol, team)) return false;
    collect(p, p.d.from(lag + 2), shared_filter_->rows(), n, s.j0, s.j1, s);
    return accept(p, lag, s, widest, bound, team, [&](int64_t, int64_t k) { return load(width_ + k); });
  }

  // A guess, before the sums are formed: no bound rests on it.
  bool promises(T widest, T share, int64_t left, double rtol, const Team& team) {
    const double likely = std::min(1.0, static_cast<double>(largest_of(share, team)) * static_cast<double>(left));
    return static_cast<double>(largest_of(widest, team)) * likely <= rtol;
  }

  // C holds the filtered sum: times the power it is the tail, wrong by at most the filter's relative half width.
  template <typename Width>
  bool accept(const SecondTerm<T>& p, int64_t lag, State& s, T widest, double& bound, const Team& team,
              const Width& half_width) {
    s.stale = true;
    const T scale = scale_beside(s.sum_exponent + exponents_[lag - 1], s);
    const T* q = cached(lag - 1);
    T most = 0;
    for (int64_t j = s.j0; j < s.j1; ++j) {
      most = std::max(most, largest_share(p, j, s, [&](int64_t k) {
        return load(s.sums + j * ld_ + k) * load(q + j * ld_ + k) * (scale * half_width(j, k));
      }));
    }
    // Beside the tail, too, which is part of κ and no less than the lower end of the enclosure.
    const double half = largest_of(widest, team), beside = half < 1 ? half / (1 - half) : std::numeric_limits<double>::infinity();
    const double found = std::min<double>(largest_of(most, team), beside);
    if (!(found <= p.rtol)) return false;
    bound = found;
    add(lag - 1, s);
    return true;
  }

  // E_t = ρ (x_t + E_{t'}), t' the row before in the direction `step`, from row `first` on, for every ρ in [low, high] ·
  // 2^exponent: the middles go to `e`, and to `width` the largest half width over the middle. Returns whether nothing
  // underflowed.
  bool filter(const Rows<T>& in, int64_t first, int64_t step, int64_t j0, int64_t own, const T* low, const T* high,
              int64_t ratio_exponent, Filtered& e, T* width) const {
    const Closed<T> closed = in.closed();
    const int64_t n = static_cast<int64_t>(e.exponent.size());
    Buffer<T> x(e.row, T(0)), least(e.row, T(0)), most(e.row, T(0));
    std::fill(width, width + own, T(0));
    int64_t before = kZeroExponent;
    bool dropped = false;
    FlushDenormals::forget();
    // In explicit vectors: what a compiler makes of a loop with a condition may raise flags for lanes that do not count.
    constexpr int64_t lanes = Simd<T>::width;
    const Vec<T> one = Vec<T>{} + T(1), infinity = Vec<T>{} + std::numeric_limits<T>::infinity();
    for (int64_t i = 0, t = first; i < n; ++i, t += step) {
      const int64_t given = own_part(in, closed, t, j0, own, x.data()), top = std::max(before, given);
      bool left = false;
      const T a = beside(before, top, left), b = beside(given, top, left);
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
    return !dropped && !FlushDenormals::lost();
  }

  // ---- the end ------------------------------------------------------------------------------------------------------

  // κ = κ⁽¹⁾ + factor · W̃ ⊙ S, all rows on one scale.
  void finish(const SecondTerm<T>& p, State& s, const Team& team) {
    const int64_t first = *p.exponent, second = s.exponent <= kZeroExponent / 2 ? kZeroExponent : s.exponent + p.weight.exponent;
    constexpr int64_t width = Simd<T>::width;
    const T factor = static_cast<T>(p.factor);
    Vec<T> largest1{}, largest2{};
    for (int64_t j = s.j0; j < s.j1; ++j) {
      for (int64_t k = 0; k < H_; k += width) {
        const int64_t i = j * H_ + k, n = H_ - k;
        Vec<T> w = load(p.weight.data + i, n) * load(p.weight.column + k) * p.weight.row[j];
        w *= w * factor;
        const Vec<T> term = w * load(pairs_ + j * ld_ + k);
        store(pairs_ + j * ld_ + k, term);
        largest1 = maximum<T>(largest1, load(p.kappa + i, n));
        largest2 = maximum<T>(largest2, term);
      }
    }
    const int64_t m1 = magnitude(largest_lane<T>(largest1)), m2 = magnitude(largest_lane<T>(largest2));
    tops_[team.rank] = std::max(m1 == kZeroExponent ? m1 : m1 + first, m2 == kZeroExponent ? m2 : m2 + second);
    team.wait();
    const int64_t top = *std::max_element(tops_.begin(), tops_.begin() + team.size);
    const int64_t result = result_exponent(top <= kZeroExponent / 2 ? kZeroExponent : top + 1);
    const auto to_result = [&](int64_t m, int64_t exponent) {
      return m == kZeroExponent ? T(0) : static_cast<T>(std::ldexp(1.0, static_cast<int>(exponent - result)));
    };
    const T a = to_result(m1, first), b = to_result(m2, second);
    // Every path that counts in κ⁽²⁾ counts in κ⁽¹⁾: where that is 0, so is all. Elsewhere κ must be far above what S
    // misses, and what underflows in the products with W̃ or, compared with errors, in the certificates.
    const T missing = second == kZeroExponent ? T(0) : static_cast<T>(s.missing * power(second - result + kAbove<T>));
    const T compared = power_of_two<T>(std::numeric_limits<T>::min_exponent + kAbove<T> + 10);
    const T least = std::max(std::numeric_limits<T>::min(), b * compared);
    Ints<T> wrong{};
    for (int64_t j = s.j0; j < s.j1; ++j) {
      for (int64_t k = 0; k < H_; k += width) {
        T* const kappa = p.kappa + j * H_ + k;
        const int64_t n = H_ - k;
        Vec<T> w = load(p.weight.data + j * H_ + k, n) * load(p.weight.column + k) * p.weight.row[j];
        w *= w * factor;
        const Vec<T> own = load(kappa, n), both = a * own + b * load(pairs_ + j * ld_ + k);
        // Written so that a bound that is nan proves nothing.
        const Vec<T> limit = w > T(0) ? w * missing : Vec<T>{};
        wrong |= (own > T(0)) & ~((both >= limit) & (both >= least) & (both <= std::numeric_limits<T>::max()));
        store(kappa, both, n);
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      if (wrong[i]) lost_[team.rank] = 1;
    }
    team.wait();
    if (team.rank == 0) *p.exponent = result;
  }

  int64_t T_, H_, ld_, matrix_, chunk_, more_;
  Workspace<T, 1> memory_;
  T *pairs_, *sums_, *spare_, *powers_, *other_, *packed_first_, *packed_wide_, *filtered_;
  T *inverse_x_, *x_narrow_, *pi_, *ratio_low_, *ratio_high_, *row_low_, *row_high_, *width_, *weighted_x_, *partial_;
  int64_t count_ = 0, wide_exponent_ = 0, ratio_exponent_ = 0;
  double wide_missing_ = 0, ratio_ = 1, x_spread_ = 0, u_spread_ = 0;
  std::vector<int64_t> exponents_;
  std::vector<double> missing_;  // of an entry of the cached powers, at most, because it underflowed
  std::vector<double> x_, u_;
  std::vector<T> row_dots_, power_tops_;
  std::unique_ptr<Filtered> shared_filter_;
  std::vector<int64_t> tops_;
  std::vector<int> lost_, flushed_;  // by thread
  std::vector<T> maxima_;
};

// kappa2, every lag: Q_n = (W̃ᵀ)^n lies in memory as S does, and S = Σ_n Q_n ⊙ Σ_t δ_{t+n+2} h_tᵀ. Each thread owns
// some rows of S through all lags.

template <typename T>
class Kappa2Run {
 public:
  Kappa2Run(const Kappa2<T>& p, int threads)
      : p_(p),
        threads_(threads),
        T_(p.seq_len),
        H_(p.hidden),
        ld_(padded<T>(p.hidden)),
        matrix_(H_ * ld_),
        pairs_(matrix_),
        counterpart_(Packed<T>::size(H_, H_)),
        scans_(threads, T(0)),
        largest_(threads, T(0)),
        lost_(threads, 0),
        pairs_exponents_(threads) {
    // Lag 0 needs the diagonal alone, so powers 1 … T-2 are cached: all of them, or two chunks at a time.
    const int64_t needed = std::max<int64_t>(T_ - 2, 1);
    const int64_t budget =
        std::max<int64_t>(p.workspace_bytes / static_cast<int64_t>(matrix_ * sizeof(T)), 4);
    chunk_ = needed <= budget ? needed : budget / 2;
    powers_.resize(chunk_ * matrix_);
    if (chunk_ < needed) next_.resize(chunk_ * matrix_);
    exponents_.resize(chunk_);
    h_.resize(Packed<T>::size(T_, H_));
    d_.resize(T_ * H_);  // every thread's slice of the rescaled δ, [T, its rows]
  }

  void run() {
    run_team(threads_, [this](const Team& team) { run(team); });
    *p_.lost = std::find(lost_.begin(), lost_.end(), 1) != lost_.end();
  }

 private:
  void run(const Team& team) {
    const Packed<T> h{h_.data(), T_, H_, kPanel<T>};
    pack(h, p_.h, H_, 1, team, [](T v) { return v; });
    int64_t j0, j1;
    team.share(H_, j0, j1);
    std::fill(pairs_.begin() + j0 * ld_, pairs_.begin() + j1 * ld_, T(0));
    T weight_scale;
    int64_t weight_exponent;
    first_power(weight_scale, weight_exponent, team);
    // This thread's rows of pairs_ are on the scale 2^exponent.
    int64_t exponent = kZeroExponent;
    if (T_ >= 2) lag_zero(j0, j1, exponent);
    int64_t count = 1;
    for (int64_t done = 1; done < T_ - 1;) {  // lags below `done` are summed; power `done` is the first of the chunk
      const int64_t wanted = std::min(chunk_, T_ - 1 - done);
      if (done == 1) {
        while (count < wanted) {
          const int64_t more = std::min(count, wanted - count);
          pack_factor(count - 1, team);
          multiply(powers_.data(), 0, more, powers_.data() + count * matrix_, count, team);
          count += more;
        }
      } else {
        if (done == 1 + chunk_) pack_factor(chunk_ - 1, team);  // Q_chunk leads from every chunk to the next
        multiply(powers_.data(), 0, wanted, next_.data(), 0, team);
        if (team.rank == 0) powers_.swap(next_);
        team.wait();
      }
      for (int64_t n = 0; n < wanted; ++n) add_lag(done + n, n, h, j0, j1, exponent);
      done += wanted;
      team.wait();
    }
    result(j0, j1, exponent, weight_scale, weight_exponent, team);
  }

  void first_power(T& weight_scale, int64_t& weight_exponent, const Team& team) {
    int64_t first, last;
    team.share(H_ * H_, first, last);
    scans_[team.rank] = scan(p_.weight_hh + first, last - first);
    team.wait();
    normalise(*std::max_element(scans_.begin(), scans_.begin() + team.size), weight_scale, weight_exponent);
    team.share(H_, first, last);
    for (int64_t j = first; j < last; ++j) {
      T* row = powers_.data() + j * ld_;
      for (int64_t k = 0; k < H_; ++k) {
        const T v = p_.weight_hh[k * H_ + j] * weight_scale;
        row[k] = v * v;
      }
      std::fill(row + H_, row + ld_, T(0));
    }
    if (team.rank == 0) exponents_[0] = weight_exponent;
    lost_[team.rank] = FlushDenormals::lost();
    team.wait();
  }

  void pack_factor(int64_t n, const Team& team) {
    pack(factor(), powers_.data() + n * matrix_, ld_, 1, team, [](T v) { return v; });
    if (team.rank == 0) factor_exponent_ = exponents_[n];
    team.wait();
  }
  Packed<T> factor() { return {counterpart_.data(), H_, H_, kPanel<T>}; }

  // to[i] = from[i] · factor for i = 0 … count-1, each brought back to a largest entry in [1, 2).
  // from[i] has exponent exponents_[from_at + i], to[i] gets exponents_[to_at + i].
  void multiply(const T* from, int64_t from_at, int64_t count, T* to, int64_t to_at, const Team& team) {
    const Packed<T> right = factor();
    // Adding a lag flushes rows that are negligible, rightly; here it would be a loss.
    FlushDenormals::forget();
    int64_t row_first, row_last;
    team.share(H_, row_first, row_last);
    if (team.rank == 0) tops_.assign(count * team.size, T(0));
    team.wait();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * matrix_ + row_first * ld_;
      for (int64_t n = 0; n < right.panels(); ++n) {
        Tile<T> t{};
        t.alpha = 1;
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
      tops_[i * team.size + team.rank] = largest_lane<T>(most);
    }
    team.wait();
    for (int64_t i = 0; i < count; ++i) {
      T top = 0;
      for (int64_t r = 0; r < team.size; ++r) top = std::max(top, tops_[i * team.size + r]);
      const int64_t m = top > T(0) ? std::ilogb(top) : 0;
      const T s = std::ldexp(T(1), static_cast<int>(-m));
      for (int64_t at = i * matrix_ + row_first * ld_; m != 0 && at < i * matrix_ + row_last * ld_; at += Simd<T>::width) {
        store(to + at, load(to + at) * s);
      }
      if (team.rank == 0) {
        exponents_[to_at + i] = top > T(0) ? exponents_[from_at + i] + factor_exponent_ + m : kZeroExponent;
      }
    }
    lost_[team.rank] |= FlushDenormals::lost();
    team.wait();
  }

  // Q_0 = I: S[j, j] = Σ_t δ_{t+2}[j] h_t[j].
  void lag_zero(int64_t j0, int64_t j1, int64_t& exponent) {
    const int64_t top = largest_pair(1);
    if (top == kZeroExponent) return;
    exponent = top + kHeadroom;
    for (int64_t t = 0; t + 1 < T_; ++t) {
      const T s = pair_scale(t, 1, -exponent);
      if (s == T(0)) continue;
      for (int64_t j = j0; j < j1; ++j) pairs_[j * ld_ + j] += p_.delta[(t + 1) * H_ + j] * s * p_.h[t * H_ + j];
    }
  }

  // Bits kept free for the sums over lags and steps.
  static constexpr int64_t kHeadroom = 16;

  int64_t pair_exponent(int64_t t, int64_t shift) const {
    const int64_t d = p_.delta_exponents[t + shift], h = p_.h_exponents[t];
    return d == kZeroExponent || h == kZeroExponent ? kZeroExponent : d + h;
  }
  T pair_scale(int64_t t, int64_t shift, int64_t add) const {
    const int64_t x = pair_exponent(t, shift);
    return x == kZeroExponent ? T(0) : power_of_two<T>(x + add);
  }
  int64_t largest_pair(int64_t shift) const {
    int64_t top = kZeroExponent;
    for (int64_t t = 0; t + shift < T_; ++t) top = std::max(top, pair_exponent(t, shift));
    return top;
  }

  // pairs_ += Q_lag ⊙ Σ_t δ_{t+lag+2} h_tᵀ on rows [j0, j1).
  void add_lag(int64_t lag, int64_t n, const Packed<T>& h, int64_t j0, int64_t j1, int64_t& exponent) {
    const int64_t shift = lag + 1, depth = T_ - shift, rows = j1 - j0;
    if (rows == 0 || exponents_[n] == kZeroExponent) return;
    const int64_t top = largest_pair(shift);
    if (top == kZeroExponent) return;
    const int64_t scale = top + exponents_[n] + kHeadroom;
    if (scale < exponent - kNegligible<T>) return;
    if (scale > exponent) {
      const T s = power_of_two<T>(exponent - scale);
      for (int64_t at = j0 * ld_; at < j1 * ld_; at += Simd<T>::width) {
        store(pairs_.data() + at, load(pairs_.data() + at) * s);
      }
      exponent = scale;
    }
    T* const d = d_.data() + j0 * T_;
    for (int64_t t = 0; t < depth; ++t) {
      const T s = pair_scale(t, shift, exponents_[n] - exponent);
      const T* row = p_.delta + (t + shift) * H_ + j0;
      for (int64_t j = 0; j < rows; ++j) d[t * rows + j] = row[j] * s;
    }
    for (int64_t c = 0; c < h.panels(); ++c) {
      const int64_t at = j0 * ld_ + c * h.panel;
      Product<T> product{d, 1, rows, h.begin(c), h.row(c), depth};
      Tile<T> tile{};
      tile.num_products = 1;
      tile.columns = h.row(c);
      tile.alpha = 1;
      tile.c = pairs_.data() + at;
      tile.c_row = ld_;
      tile.start = tile.c;
      tile.start_row = ld_;
      tile.factor = powers_.data() + n * matrix_ + at;
      tile.factor_row = ld_;
      panel(tile, &product, rows);
    }
  }

  // term = W̃ ⊙ pairs_, every thread's rows brought to one scale.
  void result(int64_t j0, int64_t j1, int64_t mine, T weight_scale, int64_t weight_exponent, const Team& team) {
    pairs_exponents_[team.rank] = mine;
    T most = 0;
    for (int64_t j = j0; j < j1; ++j) {
      for (int64_t k = 0; k < H_; ++k) {
        T v = p_.weight_hh[j * H_ + k] * weight_scale;
        v *= v * pairs_[j * ld_ + k];
        p_.term[j * H_ + k] = v;
        most = std::max(most, v);
      }
    }
    largest_[team.rank] = most;
    team.wait();
    int64_t top = kZeroExponent;
    for (int64_t r = 0; r < team.size; ++r) {
      if (largest_[r] > T(0)) top = std::max(top, pairs_exponents_[r] + std::ilogb(largest_[r]));
    }
    if (top == kZeroExponent) {
      if (team.rank == 0) *p_.exponent = kZeroExponent;
      return;
    }
    const int64_t exponent = natural_exponent(top + weight_exponent);
    if (team.rank == 0) *p_.exponent = exponent;
    const int64_t shift = mine + weight_exponent - exponent;
    const T s = shift < 0 ? power_of_two<T>(shift) : std::ldexp(T(1), static_cast<int>(shift));
    for (int64_t at = j0 * H_; at < j1 * H_; ++at) p_.term[at] *= s;
  }

  const Kappa2<T>& p_;
  int threads_;
  int64_t T_, H_, ld_, matrix_, chunk_, factor_exponent_ = 0;
  Buffer<T> pairs_, powers_, next_, counterpart_, h_, d_;
  std::vector<T> scans_, largest_, tops_;
  std::vector<int> lost_;  // by thread
  std::vector<int64_t> pairs_exponents_, exponents_;
};

template <typename T>
void kappa2(const Kappa2<T>& p, int threads) {
  Kappa2Run<T>(p, threads).run();
}

// S = Σ_n Q_n ⊙ C_n, lag by lag: C_n = Σ_t δ_{t+n+2} h_tᵀ, Q_n = (W̃ᵀ)^n.

template <typename T>
struct SecondTerm {
  int64_t seq_len, hidden;
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

  // factor · W̃, columns from k on of row j.
  Vec<T> weights(int64_t j, int64_t k) const {
    Vec<T> w = load(weight.data + j * hidden + k, hidden - k) * load(weight.column + k) * weight.row[j];
    w *= w * static_cast<T>(factor);
    return w;
  }
};

// What the threads of a team share.
template <typename T>
struct LagMemory {
  T *pairs, *sums, *spare;  // S, C and another C
  T* scans;                 // rows of the scans of δ or h
  std::vector<T> maxima;    // by thread

  static int64_t scan_size(int64_t seq_len, int64_t ld, int64_t threads) {
    return seq_len * (ld + 2 * threads * Simd<T>::width);
  }
};

// What a thread knows alone: its rows of S, on the scale 2^exponent, and of a lag's C, on 2^sum_exponent.
template <typename T>
class Lags {
 public:
  const SecondTerm<T>& p;
  const Powers<T>& powers;
  const Team& team;
  const int64_t T_ = p.seq_len, H_ = p.hidden, ld = padded<T>(H_);
  int64_t j0, j1;
  T *const pairs, *sums;
  int64_t exponent = kZeroExponent, sum_exponent = kZeroExponent;
  bool stale = false;  // whether a tail has replaced C
  double missing = 0;  // what may be missing from an entry of S, because it underflowed
  bool underflowed = false;   // what may matter

  Lags(const SecondTerm<T>& term, const Powers<T>& of_weight, LagMemory<T>& memory, const Team& with)
      : p(term), powers(of_weight), team(with), pairs(memory.pairs), sums(memory.sums), memory_(memory) {
    team.share(H_, j0, j1);
    std::fill(pairs + j0 * ld, pairs + j1 * ld, T(0));
  }

  // For bounds to which kTiny is added: a subnormal result counts as zero, also as a factor, where times_power_of_two serves.
  static double power(int64_t n) { return std::ldexp(1.0, static_cast<int>(std::clamp<int64_t>(n, -2000, 2000))); }
  // The largest entry of C, at most.
  double most_of_sum() const { return static_cast<double>(T_) * power(kLargest + 1); }

  // C of a lag, this thread's rows, its entries near 2^kLargest at most.
  void overlap(int64_t lag) { collect(p.d.from(lag + 1), p.h, T_ - 1 - lag, j0, j1); }
  void collect(const Rows<T>& d, const Rows<T>& h, int64_t n, int64_t first, int64_t last) {
    FlushDenormals::forget();
    const PairSum<T> sum(d, h, n, first, last, p.left, p.right);
    stale = false;
    sum_missing_ = 0;
    if (sum.count == 0) {
      sum_exponent = kZeroExponent;
      std::fill(sums + j0 * ld, sums + j1 * ld, T(0));
      return;
    }
    sum_exponent = sum.largest - kLargest;
    sum.multiply(sums + j0 * ld, ld, j1 - j0, H_, std::ldexp(T(1), static_cast<int>(sum.exponent - sum_exponent)));
    for (int64_t j = j0; j < j1; ++j) std::fill(sums + j * ld + H_, sums + (j + 1) * ld, T(0));
    if (sum.drops || FlushDenormals::underflowed()) sum_missing_ = power(sum.missing + sum.exponent - sum_exponent) + kTiny;
  }

  // The factor that brings numbers on the scale 2^from to S's own, which grows where it must; zero: negligible.
  T onto(int64_t from) {
    if (from <= kZeroExponent / 2 || from < exponent - kNegligible<T>) return T(0);
    if (from > exponent) {
      const T shrink = power_of_two<T>(exponent - from);
      if (exponent > kZeroExponent / 2) {
        missing = times_power_of_two(missing, exponent - from) + kTiny;
        if (shrink == T(0)) missing += power(std::numeric_limits<T>::max_exponent + exponent - from);
      }
      for (int64_t at = j0 * ld; at < j1 * ld; at += Simd<T>::width) store(pairs + at, load(pairs + at) * shrink);
      exponent = from;
    }
    return power_of_two<T>(from - exponent);
  }
  // The same for C times the n-th cached power, with no effect on S: infinite where S would have to grow beyond the dtype.
  T scale_beside(int64_t n) const {
    const int64_t from = sum_exponent + powers.exponent(n);
    return from <= kZeroExponent / 2 ? T(0) : power_of_two<T>(from - exponent);
  }
  // What S misses of a term, C times entries of at most 2 of which `power_missing` may be missing, that `onto` has scaled.
  void miss(int64_t from, T scale, double most, double power_missing) {
    if (from <= kZeroExponent / 2) return;
    const double left_out = scale == T(0) ? 2 * most : 0;
    const double lost = most * power_missing + sum_missing_ * (2 + power_missing) + left_out;
    missing += times_power_of_two(lost, from - exponent) + kTiny;
  }

  // S += C ⊙ the n-th cached power.
  void add(int64_t n) {
    const int64_t from = with_power(sum_exponent, n);
    const T scale = onto(from);
    miss(from, scale, most_of_sum(), powers.missing(n));
    if (scale == T(0)) return;
    const T* q = powers[n];
    for (int64_t at = j0 * ld; at < j1 * ld; at += Simd<T>::width) {
      store(pairs + at, load(pairs + at) + load(sums + at) * load(q + at) * scale);
    }
  }

  // A lag, or a tail, whose power of W̃ is diagonal: S[j, j] += Σ_t d_t[j] h_t[j].
  void add_diagonal(const PairSum<T>& sum) {
    if (sum.count == 0) return;
    const int64_t to = sum.largest - kLargest;
    const T alpha = onto(to) == T(0) ? T(0) : power_of_two<T>(sum.exponent - exponent);
    for (int i = 0; i < sum.count; ++i) {
      const Product<T>& m = sum.products[i];
      for (int64_t t = 0; t < m.depth; ++t) {
        for (int64_t j = j0; j < j1; ++j) pairs[j * ld + j] += m.a[t * m.a_col + j - j0] * alpha * m.b[t * m.b_row + j];
      }
    }
    sum_missing_ = 0;
    if (sum.drops || FlushDenormals::underflowed()) {
      sum_missing_ = power(sum.missing + sum.exponent - to);
      missing += static_cast<double>(T_) * power(std::numeric_limits<T>::min_exponent + kHighest<T>);
    }
    miss(to, alpha, most_of_sum(), 0);
  }

  // Lags first … last-1, `base` that of the first cached power. Since h_t = W̃ h_{t-1} + b,
  // C_n = C_{n+1} W̃ᵀ + (Σ_{s ≥ n+3} δ_s) bᵀ + δ_{n+2} h_0ᵀ: from the last lag's C downwards, in products as deep as H
  // instead of T.
  void add_between(int64_t first, int64_t last, int64_t base) {
    const bool moves = p.d.closed().count == 0 && p.h.closed().count == 0;
    if (!(moves && p.drive && last - first >= 4 && T_ - 1 - last > H_ + H_ / 4)) {
      for (int64_t lag = first; lag < last; ++lag) {
        overlap(lag);
        add(lag - base);
      }
      return;
    }
    const int64_t own = padded<T>(j1 - j0);
    T* const later = p.left;  // Σ_{s ≥ n+3} δ_s, own entries
    T* const row = later + own;
    std::fill(later, later + 2 * own, T(0));
    int64_t later_exponent = kZeroExponent;
    bool flushed = false;  // of any of them
    const auto add_row = [&](int64_t t) {
      if (p.d.exponent[t] == kZeroExponent) return;
      int64_t largest;
      FlushDenormals::forget();
      std::copy(p.d[t] + j0, p.d[t] + j1, row);
      finish_step(later, later_exponent, row, p.d.exponent[t], own, later_exponent, largest);
      flushed = flushed || FlushDenormals::underflowed();
    };
    for (int64_t t = T_ - 1; t > last + 1; --t) add_row(t);
    for (int64_t lag = last - 1; lag >= first; --lag) {
      add_row(lag + 2);  // δ_{lag+3}
      descend(lag, lag - base, later, later_exponent, flushed);
    }
  }

  // An error's factor beside C, which may be far above one: what underflowed counts as the least that does not; nan stays.
  static Vec<T> not_flushed(const Vec<T>& factor) {
    return maximum(Vec<T>{} + std::numeric_limits<T>::min(), factor);
  }

  // The largest f W̃[j, k] · error(k) / κ[j, k] over a row; errors are on the scale of S.
  template <typename Error>
  T largest_share(int64_t j, const Error& error) const {
    const T first = power_of_two<T>(*p.exponent - exponent - p.weight.exponent);
    Vec<T> most{};
    for (int64_t k = 0; k < H_; k += Simd<T>::width) {
      const Vec<T> w = p.weights(j, k);
      const Vec<T> kappa = load(p.kappa + j * H_ + k, H_ - k) * first + w * load(pairs + j * ld + k);
      const Vec<T> share = w * error(k) / (kappa + std::numeric_limits<T>::min());
      most = share <= most ? most : share == share ? share : Vec<T>{} + std::numeric_limits<T>::infinity();
    }
    return largest_lane(most);
  }
  // Over this thread's rows.
  template <typename Error>
  T largest_share(const Error& error) const {
    T most = 0;
    for (int64_t j = j0; j < j1; ++j) most = std::max(most, largest_share(j, [&](int64_t k) { return error(j, k); }));
    return most;
  }

  T largest_of(T mine) const {
    memory_.maxima[team.rank] = mine;
    team.wait();
    T most = 0;
    for (int64_t r = 0; r < team.size; ++r) most = std::max(most, memory_.maxima[r]);
    team.wait();
    return most;
  }

  // Memory for a scan of this thread's entries, or of all.
  T* scans() const { return memory_.scans + T_ * (j0 / Simd<T>::width + 2 * team.rank) * Simd<T>::width; }
  T* shared_scans() const { return memory_.scans; }

 private:
  // A product of two vectors has its largest entry near 2^(2 kCentre); C and S keep some bits free for sums.
  static constexpr int64_t kHeadroom = 16, kLargest = 2 * kCentre<T> - kHeadroom;
  static constexpr double kTiny = std::numeric_limits<T>::min();

  int64_t with_power(int64_t from, int64_t n) const {
    return powers.exponent(n) == kZeroExponent ? kZeroExponent : from + powers.exponent(n);
  }

  // C of the lag from that of the next, and S += C ⊙ the n-th cached power; `flushed`: whether `later` lacks something.
  void descend(int64_t lag, int64_t n, const T* later, int64_t later_exponent, bool flushed) {
    FlushDenormals::forget();
    multiply_packed(sums + j0 * ld, ld, powers.first_factor(), spare_ + j0 * ld, ld, j1 - j0);
    std::swap(sums, spare_);
    const auto pair = [](int64_t a, int64_t b) {
      return a == kZeroExponent || b == kZeroExponent ? kZeroExponent : a + b;
    };
    const int64_t driven = pair(later_exponent, p.drive_exponent);
    const int64_t started = pair(p.d.exponent[lag + 1], p.h.exponent[0]);
    const int64_t old = pair(sum_exponent, p.weight.exponent);
    const int64_t top = std::max({old, driven + kHeadroom, started + kHeadroom});
    const T a = power_of_two<T>(old - top);
    const T b = power_of_two<T>(driven + kHeadroom - top), c = power_of_two<T>(started + kHeadroom - top);
    const int64_t from = with_power(top, n);
    const T scale = onto(from);
    const double sides = 2 * static_cast<double>(H_), most_before = most_of_sum() * sides;
    const double spread = sum_missing_ == 0 ? 0 : sum_missing_ * powers.largest_row_sum();
    double missed = times_power_of_two(spread + (a == T(0) ? most_before : 0), old - top);
    for (const int64_t left_out : {b == T(0) ? driven : kZeroExponent, c == T(0) ? started : kZeroExponent}) {
      if (left_out > kZeroExponent / 2) missed += power(2 * kHighest<T> + left_out - top);
    }
    const T most = add_descended(a, b, c, lag, later, powers[n], scale);
    flushed = flushed || FlushDenormals::underflowed();
    if (flushed) missed += power(std::numeric_limits<T>::min_exponent + kHighest<T>) + sides * kTiny;
    sum_missing_ = missed;
    miss(from, scale, most_before, powers.missing(n));
    sum_exponent = top;
    centre(magnitude(most));
  }
  // C = a C + b (Σ δ) bᵀ + c δ h_0ᵀ, whose largest entry is returned; S += C ⊙ q · scale.
  T add_descended(T a, T b, T c, int64_t lag, const T* later, const T* q, T scale) {
    const T down = power_of_two<T>(-kHeadroom);
    Vec<T> most{};
    for (int64_t j = j0; j < j1; ++j) {
      T* row = sums + j * ld;
      const T bj = b * (later[j - j0] * down), cj = c == T(0) ? T(0) : c * (p.d[lag + 1][j] * down);
      std::fill(row + H_, row + ld, T(0));
      for (int64_t k = 0; k < ld; k += Simd<T>::width) {
        Vec<T> v = load(row + k) * a + bj * load(p.drive + k);
        if (cj != T(0)) v += cj * load(p.h[0] + k);
        store(row + k, v);
        most = maximum(most, v);
        const int64_t i = j * ld + k;
        store(pairs + i, load(pairs + i) + v * load(q + i) * scale);
      }
    }
    return largest_lane(most);
  }
  void centre(int64_t m) {
    const int64_t shift = kLargest - m;
    if (m == kZeroExponent || std::abs(shift) <= kSlack) return;
    FlushDenormals::forget();
    scale(sums + j0 * ld, (j1 - j0) * ld, shift);
    sum_exponent -= shift;
    sum_missing_ = times_power_of_two(sum_missing_, shift) + (FlushDenormals::underflowed() ? kTiny : 0);
  }

  LagMemory<T>& memory_;
  T* spare_ = memory_.spare;
  double sum_missing_ = 0;  // of C
};

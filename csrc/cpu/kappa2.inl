// κ⁽²⁾ of one recurrent matrix, in the pass that has just made its chains, as reference.kappa2_certified. A few lags are
// summed one by one; the rest follow from one of two certificates. Each thread owns some rows of S.

template <typename T>
class Kappa2Run {
 public:
  Kappa2Run(int64_t seq_len, int64_t hidden, int64_t workspace_bytes, int threads)
      : T_(seq_len),
        H_(hidden),
        scans_(LagMemory<T>::scan_size(T_, ld_, threads)),
        powers_(seq_len, hidden, workspace_bytes, threads),
        rank_one_(seq_len, hidden, threads),
        geometric_(hidden, threads),
        shared_{memory_.take(H_ * ld_), memory_.take(H_ * ld_), memory_.take(H_ * ld_), memory_.take(scans_),
                std::vector<T>(threads)},
        tops_(threads),
        underflowed_(threads, 0) {}

  bool underflowed() const { return std::find(underflowed_.begin(), underflowed_.end(), 1) != underflowed_.end(); }

  void run(SecondTerm<T> p, const Team& team) {
    // A few lags of a small matrix cost less than to ask whether they are needed.
    const double products = 2.0 * static_cast<double>(H_) * static_cast<double>(H_) * static_cast<double>(H_);
    if (T_ - 1 <= kMixing && products * static_cast<double>(T_) < 4e6) p.rtol = 0;
    Lags<T> s(p, powers_, shared_, team);
    FlushDenormals::forget();
    s.underflowed = powers_.set_first(p.weight, team);
    double bound = 0;
    const int64_t lags = T_ > 1 ? sum_lags(s, bound) : 0;
    finish(s);
    underflowed_[team.rank] |= s.underflowed;
    if (team.rank == 0) {
      *p.lags = lags;
      *p.bound = bound;
    }
    team.wait();
  }

 private:
  // Lags that are tested one by one; from there on their number doubles between tests.
  static constexpr int64_t kSingle = 8;
  // Lags whose χ are all looked at; beyond, they are small.
  static constexpr int64_t kMixing = 16;

  static int64_t batch_end(int64_t summed, int64_t first_lags) {
    if (summed < first_lags) return first_lags;
    return summed < kSingle ? summed + 1 : 2 * summed;
  }

  // S; returns how many lags were summed one by one.
  int64_t sum_lags(Lags<T>& s, double& bound) {
    const SecondTerm<T>& p = s.p;
    const Team& team = s.team;
    FlushDenormals::forget();
    s.add_diagonal(PairSum<T>(p.d.from(1), p.h, T_ - 1, s.j0, s.j1, p.left, p.right));
    if (p.rtol > 0 && T_ > 2 && geometric_.diagonal(s)) {
      geometric_.add_diagonal_tail(s);
      return 1;
    }
    typename RankOne<T>::Own own;
    bool perron = false, certified = false;
    int64_t next_search = 0, summed = 1, base = 1;  // `base`: the lag of the first cached power
    while (summed < T_ - 1 && !certified) {
      if (summed == base + powers_.chunk) {
        powers_.next_chunk(std::min(powers_.chunk, T_ - 1 - summed), base == 1, team);
        base += powers_.chunk;
      }
      const int64_t end = std::min({batch_end(summed, p.first_lags), base + powers_.chunk, T_ - 1}), lag = end - 1;
      if (base == 1) powers_.form(lag, team);
      if (powers_.exponent(summed - base) == kZeroExponent) {  // nilpotent: no more lags
        s.underflowed |= powers_.missing(summed - base) > 0;
        break;
      }
      // The certificates trust every entry of the powers.
      const bool tests = p.rtol > 0 && end < T_ - 1 && end >= p.first_lags && powers_.missing(lag - base) == 0;
      // The last lag first: the tests look at it.
      s.overlap(lag);
      s.add(lag - base);
      if (p.rtol > 0 && !perron && base == 1 && end >= next_search) {
        perron = rank_one_.perron(s, own, lag);
        next_search = 2 * end;
      }
      for (int64_t n = std::max(own.seen + 1, base); perron && n < std::min(lag, kMixing); ++n) {
        rank_one_.deviation(s, own, n, n - base);
      }
      certified = tests && perron && rank_one_.certifies(s, own, lag, lag - base, bound);
      if (certified) {
        rank_one_.add_tail(s, lag);
      } else if (tests && !own.mixes && base == 1 && lag < powers_.chunk) {
        certified = geometric_.certifies(s, powers_, lag, bound);
      }
      if (lag > summed) {
        if (s.stale) s.overlap(lag);
        s.add_between(summed, lag, base);
      }
      summed = end;
    }
    return summed;
  }

  // κ = κ⁽¹⁾ + factor · W̃ ⊙ S, all rows on one scale.
  void finish(Lags<T>& s) {
    const SecondTerm<T>& p = s.p;
    const int64_t first = *p.exponent;
    const int64_t second = s.exponent <= kZeroExponent / 2 ? kZeroExponent : s.exponent + p.weight.exponent;
    constexpr int64_t width = Simd<T>::width;
    Vec<T> largest1{}, largest2{};
    for (int64_t j = s.j0; j < s.j1; ++j) {
      for (int64_t k = 0; k < H_; k += width) {
        const Vec<T> term = p.weights(j, k) * load(s.pairs + j * ld_ + k);
        store(s.pairs + j * ld_ + k, term);
        largest1 = maximum(largest1, load(p.kappa + j * H_ + k, H_ - k));
        largest2 = maximum(largest2, term);
      }
    }
    const int64_t m1 = magnitude(largest_lane(largest1)), m2 = magnitude(largest_lane(largest2));
    tops_[s.team.rank] = std::max(m1 == kZeroExponent ? m1 : m1 + first, m2 == kZeroExponent ? m2 : m2 + second);
    s.team.wait();
    const int64_t top = *std::max_element(tops_.begin(), tops_.begin() + s.team.size);
    const int64_t result = result_exponent(top <= kZeroExponent / 2 ? kZeroExponent : top + 1);
    // In halves: a scale may be out of range where the entries are not.
    const auto to_result = [&](int64_t m, int64_t exponent) {
      const int64_t shift = exponent - result;
      if (m == kZeroExponent) return std::pair{T(0), T(0)};
      return std::pair{power_of_two<T>(shift / 2), power_of_two<T>(shift - shift / 2)};
    };
    const auto [a, a_rest] = to_result(m1, first);
    const auto [b, b_rest] = to_result(m2, second);
    // Every path that counts in κ⁽²⁾ counts in κ⁽¹⁾: where that is 0, so is all. Elsewhere κ must be far above what S
    // misses, and what underflows in the products with W̃ or, compared with errors, in the certificates.
    constexpr T tiny = std::numeric_limits<T>::min();
    const double missed = times_power_of_two(s.missing, second - result + kAbove<T>);
    const T missing = second == kZeroExponent ? T(0) : std::max(static_cast<T>(missed), tiny);
    const T compared = power_of_two<T>(second - result + std::numeric_limits<T>::min_exponent + kAbove<T> + 10);
    const T least = std::max(tiny, compared);
    Ints<T> wrong{};
    for (int64_t j = s.j0; j < s.j1; ++j) {
      for (int64_t k = 0; k < H_; k += width) {
        T* const kappa = p.kappa + j * H_ + k;
        const Vec<T> w = p.weights(j, k), own = load(kappa, H_ - k);
        const Vec<T> both = own * a * a_rest + load(s.pairs + j * ld_ + k) * b * b_rest;
        // Written so that a bound that is nan proves nothing.
        const Vec<T> limit = w > T(0) ? w * missing : Vec<T>{};
        wrong |= (own > T(0)) & ~((both >= limit) & (both >= least) & (both <= std::numeric_limits<T>::max()));
        store(kappa, both, H_ - k);
      }
    }
    s.underflowed |= any_lane(wrong);
    s.team.wait();
    if (s.team.rank == 0) *p.exponent = result;
  }

  const int64_t T_, H_, ld_ = padded<T>(H_), scans_;
  Powers<T> powers_;
  RankOne<T> rank_one_;
  Geometric<T> geometric_;
  Workspace<T, 1> memory_{3 * H_ * ld_ + scans_};
  LagMemory<T> shared_;
  std::vector<int64_t> tops_;
  std::vector<int> underflowed_;  // by thread
};

// κ⁽¹⁾ of every weight and log γ², from the chains.

template <typename T>
class PathChainResults {
  const Network<T>& n_;

 public:
  std::vector<char> summed = std::vector<char>(n_.C);  // per chain: whether κ of W_hh and the sums are there already

  PathChainResults(const Network<T>& of, const Canonical<T>& canonical, const Boundary<T>& boundary, Sequences<T>& h,
                   Sequences<T>& d, Drives<T>& drives, int threads)
      : n_(of),
        canonical_(canonical),
        boundary_(boundary),
        h_(h),
        d_(d),
        drives_(drives),
        memory_(padded<T>(left_at(n_.H, threads)) + threads * PairSum<T>::right_size(ld_)),
        left_(memory_.take(left_at(n_.H, threads))),
        right_(memory_.take(threads * PairSum<T>::right_size(ld_))) {}

  // This thread's memory for a PairSum: beside its left factors two whole vectors.
  T* left(const Team& team) const { return left_ + left_at(n_.H * team.rank / team.size, team.rank); }
  T* right(const Team& team) const { return right_ + team.rank * PairSum<T>::right_size(ld_); }
  // Σ h_t over the outputs, Σ δ_t.
  typename ChainBlocks<T>::Sums sums(int64_t c) { return {h_sum(c), d_sum(c), &h_sum_exponent_[c], &d_sum_exponent_[c]}; }

  // Those sums, and log γ². Returns whether this thread's are right.
  bool sum(const Team& team) {
    bool held = true;
    for (int64_t e = 0; team.rank == team.size - 1 && e < n_.D; ++e) {
      if (summed[e]) continue;
      const Rows<T> rows = h_[n_.C - n_.D + e].from(1);
      held &= sum_rows(rows, n_.T_ - n_.output_steps(), n_.T_, n_.H, h_sum(e), h_sum_exponent_[e]);
    }
    for (int64_t c = team.rank; n_.wanted() && c < n_.C; c += team.size) {
      if (!summed[c]) held &= sum_rows(d_[c], 0, n_.T_, n_.H, d_sum(c), d_sum_exponent_[c]);
    }
    team.wait();
    if (team.rank == 0) *n_.net.log_path_norm = log_path_norm();
    return held;
  }

  // κ⁽¹⁾; second(c, exponent) adds κ⁽²⁾ of W_hh. Returns whether this thread's are right.
  template <typename F>
  bool kappas(const Team& team, const F& second) {
    const PathChain<T>& net = n_.net;
    int64_t* exponent = net.exponents;
    bool held = true;
    for (int64_t c = 0; c < n_.C; ++c) {
      if (!n_.lowest(c)) held &= input_kappa(c, *exponent, team);
      else if (team.rank == 0) *exponent = first_kappa(d_sum(c), d_sum_exponent_[c], net.kappa_ih[c]);
      ++exponent;
      if (!summed[c]) held &= outer(d_[c], h_[c], net.kappa_hh[c], n_.H, kZeroExponent, *exponent, team);
      second(c, exponent);
      ++exponent;
      if (net.kappa_bias.empty()) continue;
      if (team.rank == 0) *exponent = copy(d_sum(c), d_sum_exponent_[c], n_.H, net.kappa_bias[c]);
      ++exponent;
    }
    if (team.rank != 0) return held;
    if (net.kappa_head) *exponent++ = head_kappa();
    if (net.kappa_head_bias) {
      *net.kappa_head_bias = static_cast<T>(n_.output_steps());
      *exponent++ = 0;
    }
    if (net.kappa_embedding) *exponent++ = embedding_kappa();
    return held && held_;
  }

 private:
  int64_t left_at(int64_t first, int64_t rank) const {
    return PairSum<T>::left_size(n_.T_, first) + 2 * rank * Simd<T>::width;
  }
  T* h_sum(int64_t e) { return h_sum_.data() + e * ld_; }
  T* d_sum(int64_t c) { return d_sum_.data() + c * ld_; }

  bool outer(const Rows<T>& d, const Rows<T>& h, T* out, int64_t row, int64_t beside, int64_t& exponent, const Team& team) {
    return outer_sum(d, h, n_.T_, n_.H, n_.H, out, row, beside, exponent, left(team), right(team), team);
  }
  // What follows, in one thread, leaves in held_ whether it is right.
  int64_t copy(const T* vector, int64_t exponent, int64_t n, T* out, int64_t beside = kZeroExponent) {
    bool held;
    const int64_t result = copy_result(vector, exponent, n, out, held, beside);
    held_ &= held;
    return result;
  }

  // κ⁽¹⁾ of the weights between two layers, whose columns read either direction below on one common exponent.
  bool input_kappa(int64_t c, int64_t& exponent, const Team& team) {
    T* const out = n_.net.kappa_ih[c];
    const int64_t same = c - n_.D, across = n_.opposite(same);
    const Rows<T> own = h_[same].from(1);
    if (n_.D == 1) return outer(d_[c], own, out, n_.H, kZeroExponent, exponent, team);
    const Rows<T> other = drives_.flipped(h_[across].from(1), team);
    const int64_t own_largest = largest_pair(d_[c], own, n_.T_), other_largest = largest_pair(d_[c], other, n_.T_);
    const bool held = outer(d_[c], own, out + n_.column(same), 2 * n_.H, other_largest, exponent, team);
    return outer(d_[c], other, out + n_.column(across), 2 * n_.H, own_largest, exponent, team) && held;
  }

  // Σ_t h_t of the top layer, both directions on one exponent.
  int64_t head_kappa() {
    int64_t top = kZeroExponent;
    for (int64_t e = 0; e < n_.D; ++e) {
      const int64_t m = magnitude(*std::max_element(h_sum(e), h_sum(e) + n_.H));
      if (m != kZeroExponent) top = std::max(top, m + h_sum_exponent_[e]);
    }
    int64_t result = 0;
    for (int64_t e = 0; e < n_.D; ++e) {
      result = copy(h_sum(e), h_sum_exponent_[e], n_.H, n_.net.kappa_head + e * n_.H, top);
    }
    return result;
  }

  // The input is the same at every step: κ⁽¹⁾ = (Σ_t δ_t) · inputᵀ, equal columns for an input of ones.
  int64_t first_kappa(const T* d_sum, int64_t exponent, T* out) {
    if (!n_.net.embedding) return copy(d_sum, exponent, n_.H, out);
    const T* x = boundary_.input.data.data();
    const int64_t md = magnitude(*std::max_element(d_sum, d_sum + n_.H));
    const int64_t mx = magnitude(*std::max_element(x, x + n_.net.input));
    if (md == kZeroExponent || mx == kZeroExponent) {
      std::fill(out, out + n_.H * n_.net.input, T(0));
      return 0;
    }
    const int64_t result = result_exponent(md + exponent + mx + boundary_.input.exponent);
    // Each factor is brought near one first, and the product to its place.
    const T s1 = std::ldexp(T(1), static_cast<int>(-md)), s2 = std::ldexp(T(1), static_cast<int>(-mx));
    const T s = std::ldexp(T(1), static_cast<int>(md + exponent + mx + boundary_.input.exponent - result));
    for (int64_t j = 0; j < n_.H; ++j) {
      T* const row = out + j * n_.net.input;
      for (int64_t k = 0; k < n_.net.input; ++k) row[k] = (d_sum[j] * s1 * s) * (x[k] * s2);
      if (d_sum[j] > T(0)) held_ &= kept(x, row, n_.net.input);
    }
    return result;
  }

  int64_t embedding_kappa() {
    std::vector<double> values(n_.net.input, 0.0);
    std::vector<int64_t> exponents(n_.net.input, 0), row(n_.H);
    Buffer<T> weight(n_.H), sums(padded<T>(n_.net.input));
    Buffer<Int<T>> column(padded<T>(n_.net.input));
    for (int64_t c = 0; c < n_.D; ++c) {
      for (int64_t j = 0; j < n_.H; ++j) {
        const T v = d_sum(c)[j];
        const int64_t m = v > T(0) ? (std::ilogb(v) >> 1) * 2 : kNone;
        weight[j] = v > T(0) ? std::ldexp(v, static_cast<int>(-m)) : T(0);
        row[j] = m - canonical_.unit(c)[j];
      }
      std::fill(column.begin(), column.end(), static_cast<Int<T>>(2 * kNone));
      const Block<T> w = n_.ih(c).block(Team{});
      column_exponents(w, row.data(), column.data());
      column_sums<T>(w, row.data(), column.data(), weight.data(), sums.data());
      for (int64_t k = 0; k < n_.net.input; ++k) add_scaled(values[k], exponents[k], sums[k], column[k] + d_sum_exponent_[c]);
    }
    Scaled<T> result(n_.net.input);
    held_ &= result.set(values, exponents);
    return copy(result.data.data(), result.exponent, n_.net.input, n_.net.kappa_embedding);
  }

  double log_path_norm() {
    double logarithm = -std::numeric_limits<double>::infinity();
    const auto add = [&](double other) {
      const double high = std::max(logarithm, other), low = std::min(logarithm, other);
      logarithm = high + std::log1p(std::exp(low - high));
    };
    for (int64_t e = 0; e < n_.D; ++e) {
      // Both factors are brought near one before they are multiplied.
      const Scaled<T>& head = boundary_.head[e];
      Number dot{0, kCentre<T>};
      const double centre = std::ldexp(1.0, static_cast<int>(-kCentre<T>));
      for (int64_t k = 0; k < n_.H; ++k) dot.mantissa += static_cast<double>(head.data[k]) * centre * h_sum(e)[k];
      // Beside more than this, products that underflow are as nothing; of less they may be all.
      if (dot.mantissa < 0x1p-900) {
        dot = {};
        for (int64_t k = 0; k < n_.H; ++k) {
          dot = dot + Number{head.data[k], 0}.normal() * Number{h_sum(e)[k], 0}.normal();
        }
      }
      if (!(dot.mantissa > 0)) continue;
      // Large exponents of opposite signs cancel as integers, not as rounded logarithms.
      dot = dot.normal();
      add(std::log(dot.mantissa) + (dot.exponent + head.exponent + h_sum_exponent_[e]) * M_LN2);
    }
    if (n_.net.head_bias) {
      const T* const b = n_.net.head_bias;
      double sum = 0;
      int64_t top = kNone;
      for (int64_t o = 0; o < n_.net.outputs; ++o) top = std::max(top, exponent_of(b[o]));
      const double s1 = power_of_two<double>(-top / 2), s2 = power_of_two<double>(-top - -top / 2);
      for (int64_t o = 0; o < n_.net.outputs; ++o) {
        const double v = b[o] * s1 * s2;
        sum += v * v;
      }
      if (sum > 0) add(std::log(sum * static_cast<double>(n_.output_steps())) + 2 * top * M_LN2);
    }
    return logarithm;
  }

  const Canonical<T>& canonical_;
  const Boundary<T>& boundary_;
  Sequences<T> &h_, &d_;
  Drives<T>& drives_;
  const int64_t ld_ = padded<T>(n_.H);
  Workspace<T, 6> memory_;
  T *left_, *right_;
  Buffer<T> h_sum_ = Buffer<T>(n_.D * ld_), d_sum_ = Buffer<T>(n_.wanted() ? n_.C * ld_ : 0);
  std::vector<int64_t> h_sum_exponent_ = std::vector<int64_t>(n_.D), d_sum_exponent_ = std::vector<int64_t>(n_.C);
  bool held_ = true;
};

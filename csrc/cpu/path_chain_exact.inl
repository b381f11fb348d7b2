// path_chain in extended range: every number is a double mantissa with an int64 exponent of its own, so nothing over- or
// underflows, whatever the weights. Nothing but eqs. (3), (9) and (11), step by step, all lags summed; all terms are
// non-negative, so every entry is right to the roundings of its paths.

// Where numbers lie: mantissa 0 with exponent kZeroExponent, or a mantissa in [1, 2).
struct Numbers {
  double* m;
  int64_t* e;
  Numbers operator+(int64_t n) const { return {m + n, e + n}; }
};

// x · 2^exponent, x ≥ 0; subnormal ones too.
inline void set_number(Numbers at, double x, int64_t exponent) {
  int own;
  *at.m = 2 * std::frexp(x, &own);
  *at.e = x == 0 ? kZeroExponent : exponent + own - 1;
}

// Numbers [rows, columns], zeros at first; rows are padded with more zeros.
struct NumberMatrix {
  static constexpr int64_t kVectors = 4, kPanel = kVectors * Simd<double>::width;
  int64_t ld;
  Buffer<double> m;
  Buffer<int64_t> e;

  NumberMatrix(int64_t rows, int64_t columns)
      : ld((columns + kPanel - 1) / kPanel * kPanel), m(rows * ld, 0.0), e(rows * ld, kZeroExponent) {}
  // w[r * row + c * column], squared.
  NumberMatrix(const double* w, int64_t rows, int64_t columns, int64_t row, int64_t column)
      : NumberMatrix(rows, columns) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        int exponent;
        const double x = std::frexp(w[r * row + c * column], &exponent);
        set_number((*this)[r] + c, x * x, 2 * exponent);
      }
    }
  }
  Numbers operator[](int64_t r) { return {m.data() + r * ld, e.data() + r * ld}; }
};

// A vector of sums, each on the exponent of its largest term so far.
class NumberSum {
 public:
  NumberSum() = default;
  explicit NumberSum(Numbers start) : m_(load(start.m)), e_(load(start.e)) {}
  void add(const Vec<double>& m, const Vec<int64_t>& e) {
    const Vec<int64_t> top = e_ > e ? e_ : e;
    // Zero below the normal numbers: beside it stands a term of at least one.
    m_ = m_ * powers_of_two(e_ - top) + m * powers_of_two(e - top);
    e_ = top;
  }
  void write(Numbers out) const {
    Vec<int64_t> bits = bits_of<double>(m_);
    const Vec<int64_t> exponent = e_ + (bits >> 52) - 1023;
    bits = (bits & ((int64_t{1} << 52) - 1)) | (int64_t{1023} << 52);
    const Vec<int64_t> zero = m_ == 0.0;
    store(out.m, from_bits<double>(zero ? Vec<int64_t>{} : bits));
    store(out.e, zero ? Vec<int64_t>{} + kZeroExponent : exponent);
  }

 private:
  Vec<double> m_;
  Vec<int64_t> e_;
};

// out += Σ_k x[k * step] b[k], of rows b[k], `ld` apart, the first `columns`.
inline void add_products(Numbers x, int64_t step, int64_t depth, Numbers b, int64_t ld, int64_t columns, Numbers out) {
  constexpr int64_t width = Simd<double>::width, vectors = NumberMatrix::kVectors;
  for (int64_t n = 0; n < columns; n += NumberMatrix::kPanel) {
    NumberSum sums[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sums[v] = NumberSum(out + n + v * width);
    for (int64_t k = 0; k < depth; ++k) {
      const double m = x.m[k * step];
      if (m == 0) continue;
      const int64_t e = x.e[k * step];
      const Numbers row = b + (k * ld + n);
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) {
        sums[v].add(m * load(row.m + v * width), load(row.e + v * width) + e);
      }
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sums[v].write(out + n + v * width);
  }
}

// out += a ⊙ b.
inline void add_each(Numbers a, Numbers b, int64_t n, Numbers out) {
  for (int64_t k = 0; k < n; k += Simd<double>::width) {
    NumberSum sum(out + k);
    sum.add(load(a.m + k) * load(b.m + k), load(a.e + k) + load(b.e + k));
    sum.write(out + k);
  }
}

class PathChainExact {
 public:
  explicit PathChainExact(const PathChain<double>& net) : net_(net) {
    set_number(one_[0], 1, 0);
    for (int64_t c = 0; c < C_; ++c) {
      const int64_t parts = c < D_ ? 1 : D_, inputs = c < D_ ? net.input : H_, row = parts * inputs;
      for (int64_t p = 0; p < parts; ++p) {
        up_.emplace_back(net.weight_ih[c] + p * H_, inputs, H_, 1, row);
        if (backward_) down_.emplace_back(net.weight_ih[c] + p * H_, H_, inputs, row, 1);
      }
      forward_hh_.emplace_back(net.weight_hh[c], H_, H_, 1, H_);
      if (backward_) backward_hh_.emplace_back(net.weight_hh[c], H_, H_, H_, 1);
      h_.emplace_back(T_ + 1, H_);
      if (backward_) d_.emplace_back(T_, H_);
    }
    if (net.embedding) {
      add_sum(NumberMatrix(net.embedding, net.vocabulary, net.input, net.input, 1), net.vocabulary, net.input, input_[0]);
    } else {
      for (int64_t k = 0; k < net.input; ++k) set_number(input_[0] + k, 1, 0);
    }
    for (int64_t p = 0; p < D_; ++p) {
      if (net.head_weight) {
        add_sum(NumberMatrix(net.head_weight + p * H_, net.outputs, H_, D_ * H_, 1), net.outputs, H_, head_[p]);
      } else {
        for (int64_t k = 0; k < H_; ++k) set_number(head_[p] + k, 1, 0);
      }
    }
  }

  void run(const Team& team) {
    if (team.rank == 0) forward();
    if (backward_ && team.rank == team.size - 1) backward();
    team.wait();
    if (team.rank == 0) {
      *net_.log_path_norm = log_path_norm();
      std::fill(net_.unit_exponents, net_.unit_exponents + C_ * H_, 0);
    }
    if (backward_) kappas(team);
  }

 private:
  // A reverse chain's s-th step is a forward one's step T + 1 - s.
  int64_t seen(int64_t from, int64_t by, int64_t s) const { return (from - by) % D_ == 0 ? s : T_ + 1 - s; }
  // W_ih of chain c, of what direction p of the layer below gives: [inputs, H] forward, [H, inputs] backward.
  NumberMatrix& part(std::vector<NumberMatrix>& list, int64_t c, int64_t p) {
    return list[c < D_ ? c : D_ + (c - D_) * D_ + p];
  }
  // The first chain of c's layer.
  int64_t layer(int64_t c) const { return c - c % D_; }

  // out += Σ of the first `rows` rows.
  void add_sum(NumberMatrix&& matrix, int64_t rows, int64_t columns, Numbers out) {
    add_products(one_[0], 0, rows, matrix[0], matrix.ld, columns, out);
  }
  void add_matrix(Numbers x, NumberMatrix& matrix, int64_t rows, int64_t columns, Numbers out) {
    add_products(x, 1, rows, matrix[0], matrix.ld, columns, out);
  }
  void copy(Numbers from, Numbers to) const {
    std::copy(from.m, from.m + H_, to.m);
    std::copy(from.e, from.e + H_, to.e);
  }

  // h_0 … h_T of every chain.
  void forward() {
    for (int64_t c = 0; c < C_; ++c) {
      NumberMatrix drive(1, H_);
      if (!net_.bias_ih.empty()) {
        for (const double* b : {net_.bias_ih[c], net_.bias_hh[c]}) add_sum(NumberMatrix(b, 1, H_, 0, 1), 1, H_, drive[0]);
      }
      if (c < D_) add_matrix(input_[0], part(up_, c, 0), net_.input, H_, drive[0]);
      NumberMatrix& h = h_[c];
      for (int64_t k = 0; net_.ones_h0 && k < H_; ++k) set_number(h[0] + k, 1, 0);
      for (int64_t s = 1; s <= T_; ++s) {
        copy(drive[0], h[s]);
        for (int64_t p = 0; c >= D_ && p < D_; ++p) {
          const int64_t below = layer(c) - D_ + p;
          add_matrix(h_[below][seen(below, c, s)], part(up_, c, p), H_, H_, h[s]);
        }
        add_matrix(h[s - 1], forward_hh_[c], H_, H_, h[s]);
      }
    }
    const int64_t first = net_.last_only ? T_ : 1;
    for (int64_t p = 0; p < D_; ++p) {
      NumberMatrix& h = h_[C_ - D_ + p];
      add_products(one_[0], 0, T_ + 1 - first, h[first], h.ld, H_, h_sum_[p]);
    }
  }

  // δ_1 … δ_T of every chain, in rows 0 … T-1.
  void backward() {
    for (int64_t c = C_ - 1; c >= 0; --c) {
      NumberMatrix& d = d_[c];
      for (int64_t s = T_; s >= 1; --s) {
        const Numbers row = d[s - 1];
        if (c >= C_ - D_) {
          if (s == T_ || !net_.last_only) copy(head_[c % D_], row);
        } else {
          for (int64_t p = 0; p < D_; ++p) {
            const int64_t above = layer(c) + D_ + p;
            add_matrix(d_[above][seen(above, c, s) - 1], part(down_, above, c % D_), H_, H_, row);
          }
        }
        if (s < T_) add_matrix(d[s], backward_hh_[c], H_, H_, row);
      }
      add_products(one_[0], 0, T_, d[0], d.ld, H_, d_sum_[c]);
    }
  }

  // Of all steps that are outputs.
  double steps() const { return net_.last_only ? 1 : static_cast<double>(T_); }

  double log_path_norm() {
    NumberMatrix sums(1, H_);
    for (int64_t p = 0; p < D_; ++p) add_each(h_sum_[p], head_[p], H_, sums[0]);
    if (net_.head_bias) {
      NumberMatrix bias(1, 1), count(1, 1);
      set_number(count[0], steps(), 0);
      add_sum(NumberMatrix(net_.head_bias, net_.outputs, 1, 1, 0), net_.outputs, 1, bias[0]);
      add_each(bias[0], count[0], 1, sums[0]);
    }
    const int64_t top = *std::max_element(sums.e.begin(), sums.e.end());
    double sum = 0;
    for (int64_t k = 0; k < H_; ++k) sum += std::ldexp(sums.m[k], static_cast<int>(std::max<int64_t>(sums.e[k] - top, -2000)));
    // The exponent is exact: one logarithm is all that is rounded.
    return sum == 0 ? -std::numeric_limits<double>::infinity() : std::log(sum) + static_cast<double>(top) * std::log(2.0);
  }

  void kappas(const Team& team) {
    int64_t first, last, i = 0;
    team.share(H_, first, last);
    const int64_t inputs = net_.embedding ? net_.input : 1;
    for (int64_t c = 0; c < C_; ++c) {
      if (second() && team.rank == 0) net_.lags[c] = lags(c);
      for (int64_t j = first; j < last; ++j) {
        if (c < D_) {
          NumberMatrix row(1, inputs);
          add_products(d_sum_[c] + j, 0, 1, input_[0], 0, inputs, row[0]);
          put(row[0], inputs, net_.kappa_ih[c], i, j * inputs, 1);
        }
        for (int64_t p = 0; c >= D_ && p < D_; ++p) {
          NumberMatrix row(1, H_);
          const int64_t below = layer(c) - D_ + p;
          NumberMatrix& h = h_[below];
          add_products(d_[c][0] + j, d_[c].ld, T_, h[seen(below, c, 1)], (below - c) % D_ == 0 ? h.ld : -h.ld, H_, row[0]);
          put(row[0], H_, net_.kappa_ih[c], i, (j * D_ + p) * H_, 1);
        }
        NumberMatrix column(1, H_);
        add_products(h_[c][0] + j, h_[c].ld, T_, d_[c][0], d_[c].ld, H_, column[0]);
        if (second()) second_term(c, j, column[0]);
        put(column[0], H_, net_.kappa_hh[c], i + 1, j, H_);
      }
      i += 2;
      if (net_.kappa_bias.empty()) continue;
      if (team.rank == 0) put(d_sum_[c], H_, net_.kappa_bias[c], i, 0, 1);
      ++i;
    }
    if (team.rank != 0) return;
    if (net_.kappa_head) {
      for (int64_t p = 0; p < D_; ++p) put(h_sum_[p], H_, net_.kappa_head, i, p * H_, 1);
      ++i;
    }
    if (net_.kappa_head_bias) {
      NumberMatrix count(1, 1);
      set_number(count[0], steps(), 0);
      put(count[0], 1, net_.kappa_head_bias, i++, 0, 1);
    }
    if (net_.kappa_embedding) {
      NumberMatrix sums(1, net_.input);
      for (int64_t c = 0; c < D_; ++c) add_matrix(d_sum_[c], part(down_, c, 0), H_, net_.input, sums[0]);
      put(sums[0], net_.input, net_.kappa_embedding, i++, 0, 1);
    }
    std::fill(net_.exponents, net_.exponents + i, 0);
    if (second()) std::fill(net_.bounds, net_.bounds + C_, 0.0);
  }

  bool second() const { return net_.second_factor > 0; }

  // Column k of f · W̃ ⊙ S. With M_s[j] = Σ_{t < s} h_t[k] (W̃^{s-t-1})[k, j], S[j, k] = Σ_s δ_{s+1}[j] M_s[j], and
  // M_{s+1} = M_s W̃ + h_s[k] e_k: no power of W̃ is needed.
  void second_term(int64_t c, int64_t k, Numbers out) {
    NumberMatrix m(2, H_), sums(1, H_), scaled(1, H_), factor(1, 1);
    for (int64_t s = 1; s < T_; ++s) {
      const Numbers now = m[s & 1];
      std::fill(now.m, now.m + H_, 0.0);
      std::fill(now.e, now.e + H_, kZeroExponent);
      now.m[k] = h_[c][s - 1].m[k];
      now.e[k] = h_[c][s - 1].e[k];
      add_matrix(m[(s - 1) & 1], backward_hh_[c], H_, H_, now);
      add_each(now, d_[c][s], H_, sums[0]);
    }
    set_number(factor[0], net_.second_factor, 0);
    add_products(factor[0], 0, 1, sums[0], 0, H_, scaled[0]);
    add_each(scaled[0], forward_hh_[c][k], H_, out);
  }

  // All lags, unless W̃ is nilpotent: units that n steps can lead to are those that some such unit leads to.
  int64_t lags(int64_t c) {
    std::vector<char> reached(H_, 1), next(H_);
    int64_t left = H_;
    for (int64_t n = 0; n < T_ - 1; ++n) {
      if (left == 0) return n;
      for (int64_t j = 0; j < H_; ++j) {
        const double* row = backward_hh_[c][j].m;
        next[j] = false;
        for (int64_t k = 0; k < H_ && !next[j]; ++k) next[j] = reached[k] && row[k] > 0;
      }
      const int64_t before = left;
      left = std::count(next.begin(), next.end(), 1);
      if (left == before) break;
      reached.swap(next);
    }
    return T_ - 1;
  }

  // Result i, from entry `at` on in steps of `step`.
  void put(Numbers from, int64_t n, double* kappa, int64_t i, int64_t at, int64_t step) const {
    for (int64_t k = 0; k < n; ++k) {
      kappa[at + k * step] = from.m[k];
      net_.entry_exponents[i][at + k * step] = from.m[k] == 0 ? 0 : from.e[k];
    }
  }

  const PathChain<double>& net_;
  const int64_t T_ = net_.seq_len, H_ = net_.hidden, D_ = net_.directions, C_ = net_.num_layers * D_;
  const bool backward_ = !net_.kappa_hh.empty();
  NumberMatrix one_{1, 1}, input_{1, net_.input}, d_sum_{backward_ ? C_ : 0, H_}, h_sum_{D_, H_}, head_{D_, H_};
  std::vector<NumberMatrix> up_, down_, forward_hh_, backward_hh_, h_, d_;
};

inline int64_t path_chain_exact(const PathChain<double>& net, int threads) {
  PathChainExact run(net);
  run_team(threads, [&run](const Team& team) { run.run(team); }, false);
  return -1;
}

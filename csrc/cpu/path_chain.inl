// path_chain: scan of the weights, canonical coordinates, first drives, chains, κ⁽¹⁾; one team of threads runs it all.

// The rows of a matrix of weights that a thread looks at.
template <typename T>
struct Block {
  const T* data;
  int64_t columns, first, last;
  // f(j, k, v): v the vector at column k of row j, 0 beyond the end.
  template <typename F>
  void each(const F& f) const {
    for (int64_t j = first; j < last; ++j) {
      for (int64_t k = 0; k < columns; k += Simd<T>::width) f(j, k, load(data + j * columns + k, columns - k));
    }
  }
};
template <typename T>
inline int64_t highest(const Ints<T>& v) {
  Int<T> m = v[0];
  for (int64_t i = 1; i < Simd<T>::width; ++i) m = std::max(m, v[i]);
  return m;
}

template <typename T>
bool finite(const T* w, int64_t n) {
  constexpr int64_t width = Simd<T>::width;
  Vec<T> check{};
  for (int64_t i = 0; i < n; i += width) {
    const Vec<T> v = load(w + i, n - i);
    check += v - v;  // nan for an infinity or a nan
  }
  return lane_sum<T>(check) == T(0);
}

// out[j] = max(out[j], max_k 2 e(w[j, k]) + add[k]), e(w) = floor(log2 |w|): the exponent of Σ_k w² 2^add, as sums go
// where only the largest counts. `add` is padded.
template <typename T>
void row_exponents(const Block<T>& w, const Int<T>* add, int64_t* out) {
  if (w.columns < Simd<T>::width) {
    for (int64_t j = w.first; j < w.last; ++j) {
      for (int64_t k = 0; k < w.columns; ++k) {
        out[j] = std::max<int64_t>(out[j], 2 * exponent_of(w.data[j * w.columns + k]) + add[k]);
      }
    }
    return;
  }
  for (int64_t j = w.first; j < w.last; ++j) {
    Ints<T> most = Ints<T>{} + Int<T>(2 * kNone);
    Block<T>{w.data, w.columns, j, j + 1}.each([&](int64_t, int64_t k, const Vec<T>& v) {
      const Ints<T> e = 2 * exponents_of<T>(v) + load_ints<T>(add + k);
      most = e > most ? e : most;
    });
    out[j] = std::max(out[j], highest<T>(most));
  }
}
// out[k] = max(out[k], max_j 2 e(w[j, k]) + add[j]); `add` may be null, zeros; `out` is padded.
template <typename T>
void column_exponents(const Block<T>& w, const int64_t* add, Int<T>* out) {
  w.each([&](int64_t j, int64_t k, const Vec<T>& v) {
    const Ints<T> e = 2 * exponents_of<T>(v) + static_cast<Int<T>>(add ? add[j] : 0), most = load_ints<T>(out + k);
    store_ints<T>(out + k, e > most ? e : most);
  });
}

// out[k] = Σ_j (w[j, k] 2^((row[j] - column[k]) / 2))² weight[j], with exponents such that no term is far above 1. In
// blocks of rows, whose sums are added, to keep rounding small.
template <typename T>
void column_sums(const Block<T>& w, const int64_t* row, const Int<T>* column, const T* weight, T* out) {
  constexpr int64_t width = Simd<T>::width, kBlock = 64;
  for (int64_t k = 0; k < w.columns; k += width) {
    const Ints<T> minus = load_ints<T>(column + k) >> 1;
    Vec<T> total{};
    for (int64_t j0 = w.first; j0 < w.last; j0 += kBlock) {
      Vec<T> sum{};
      for (int64_t j = j0; j < std::min(j0 + kBlock, w.last); ++j) {
        const Ints<T> n = static_cast<Int<T>>(row ? row[j] / 2 : 0) - minus;
        const Vec<T> v = times_power<T>(load(w.data + j * w.columns + k, w.columns - k), n);
        sum += v * v * (weight ? weight[j] : T(1));
      }
      total += sum;
    }
    store(out + k, total);
  }
}
// Σ_k (w[k] 2^((column[k] - row) / 2))² weight[k], of one row.
template <typename T>
T row_sum(const T* w, int64_t columns, const Int<T>* column, int64_t row, const T* weight) {
  constexpr int64_t width = Simd<T>::width;
  Vec<T> acc{};
  for (int64_t k = 0; k < columns; k += width) {
    const Ints<T> n = (load_ints<T>(column + k) >> 1) - static_cast<Int<T>>(row / 2);
    const Vec<T> v = times_power<T>(load(w + k, columns - k), n);
    acc += v * v * load(weight + k);
  }
  return lane_sum<T>(acc);
}

// A padded vector with an exponent.
template <typename T>
struct Scaled {
  Buffer<T> data;
  int64_t exponent = kZeroExponent;

  explicit Scaled(int64_t n) : data(padded<T>(n)) {}
  // Takes values[i] · 2^exponents[i], centred; returns whether the dtype holds all of them beside the largest.
  bool set(const std::vector<double>& values, const std::vector<int64_t>& exponents) {
    std::fill(data.begin(), data.end(), T(0));
    exponent = kZeroExponent;
    int64_t top = kZeroExponent;
    for (size_t i = 0; i < values.size(); ++i) {
      if (values[i] > 0) top = std::max(top, exponent_of(values[i]) + exponents[i]);
    }
    if (top == kZeroExponent) return true;
    exponent = top - kCentre<T>;
    bool held = true;
    for (size_t i = 0; i < values.size(); ++i) {
      data[i] = values[i] > 0 ? static_cast<T>(times_power_of_two(values[i], exponents[i] - exponent)) : T(0);
      held = held && !(values[i] > 0 && data[i] < std::numeric_limits<T>::min());
    }
    return held;
  }
};

template <typename T>
class PathChainRun {
 public:
  PathChainRun(const PathChain<T>& net, int threads)
      : net_(net),
        threads_(threads),
        T_(net.seq_len),
        H_(net.hidden),
        L_(net.num_layers),
        D_(net.directions),
        C_(L_ * D_),
        ld_(padded<T>(net.hidden)),
        backward_(!net.kappa_hh.empty()),
        shared_(net.hidden >= kSharedHidden),
        closes_(net.hidden >= (net.second_factor > 0 ? kSharedHidden : kCloseHidden)),
        extents_(threads),
        reach_(C_ * H_),
        read_(C_ * H_),
        drive_exponent_(D_ * H_, 2 * kNone),
        input_exponent_(padded<T>(net.input), 0),
        head_exponent_(padded<T>(D_ * H_), 0),
        side_(padded<T>(D_ * H_), 0),
        halves_(padded<T>(D_ * H_), 0),
        hh_(C_),
        ih_(C_),
        head_(D_, Scaled<T>(net.hidden)),
        input_(net.input),
        first_drive_(D_, Scaled<T>(net.hidden)),
        start_(C_, Scaled<T>(net.hidden)),
        zeros_(ld_),
        bias_(C_, Scaled<T>(net.hidden)),
        input_sums_(padded<T>(net.input), T(1)),
        h_sum_(D_ * ld_),
        drive_sums_(D_ * net.hidden),
        memory_(ld_ * (C_ * (2 * T_ + 1) + (L_ > 1 ? D_ * 2 * T_ + 1 : 0)) +
                padded<T>(left_at(H_, threads)) + padded<T>(threads * PairSum<T>::right_size(ld_))),
        h_sum_exponent_(D_) {
    collect();
    lost_.assign(threads, 0);
    bad_by_.assign(threads, 0);
    partial_exponents_.resize(threads * padded<T>(std::max(D_ * H_, net.input)));
    factors_.reserve(4 * C_);
    copies_.reserve(2 * C_);
    h_ = memory_.take(C_ * (T_ + 1) * ld_);
    h_exponent_.resize(C_ * (T_ + 1));
    h_largest_.resize(C_ * (T_ + 1));
    if (backward_) {
      d_ = memory_.take(C_ * T_ * ld_);
      d_exponent_.resize(C_ * T_);
      d_largest_.resize(C_ * T_);
      d_sum_.resize(C_ * ld_);
      d_sum_exponent_.resize(C_);
      top_exponent_.assign(D_ * T_, kZeroExponent);
    }
    if (L_ > 1) {
      // Drives run with their chain's rows: h has T + 1 of them, its row 0 undriven.
      h_drive_ = memory_.take((T_ + 1) * ld_);
      h_drive_exponent_.resize(T_ + 1);
      d_drive_ = memory_.take(T_ * ld_);
      d_drive_exponent_.resize(T_);
      if (D_ > 1) {
        h_other_ = memory_.take(T_ * ld_);
        h_other_exponent_.resize(T_);
        h_other_largest_.resize(T_);
        d_other_ = memory_.take(T_ * ld_);
        d_other_exponent_.resize(T_);
      }
    }
    summed_.assign(C_, 0);
    h_closed_.resize(C_);
    d_closed_.resize(C_);
    coefficients_.resize(4 * C_ * (T_ + 1));
    if (shared_) {
      scratch_.resize((2 + 6 * threads) * ld_);
      if (closes_) wide_scratch_.resize((2 + 8 * threads) * ld_);
    } else {
      packed_h_.resize(Packed<T>::size(H_, H_));
      packed_d_.resize(Packed<T>::size(H_, H_));
    }
    if (L_ > 1) {
      mixed_h_.resize(Packed<T>::size(H_, H_));
      if (backward_) mixed_d_.resize(Packed<T>::size(H_, H_));
    }
    left_ = memory_.take(left_at(H_, threads));
    right_ = memory_.take(threads * PairSum<T>::right_size(ld_));
    partial_.resize(threads * std::max(padded<T>(D_ * H_), padded<T>(net.input)));
    if (net.second_factor > 0) second_.emplace(T_, H_, net.workspace_bytes, threads);
  }

  // The index of the first tensor that is not finite, in the order of `collect`, or -1.
  int64_t run() {
    // Denormal weights are kept, so that they are noticed.
    run_team(threads_, [this](const Team& team) { run(team); }, false);
    *net_.lost = std::find(lost_.begin(), lost_.end(), 1) != lost_.end() || (second_ && second_->lost());
    return bad_;
  }

 private:
  // From this size on a thread's cache no longer holds W̃, and both chains share one read of it.
  static constexpr int64_t kSharedHidden = 512;
  // From this size on every step reads W from beyond the second-level caches: it is worth less steps of dearer
  // arithmetic. Below, a chain that comes to rest is mostly done as soon; but with the second term, a closed form saves
  // every lag's sum over time, too.
  static constexpr int64_t kCloseHidden = 1024;

  struct Tensor {
    const T* data;
    int64_t rows, columns;
    int64_t size() const { return rows * columns; }
    Block<T> block(const Team& team) const {
      Block<T> b{data, columns, 0, 0};
      team.share(rows, b.first, b.last);
      return b;
    }
  };

  void collect() {
    for (int64_t c = 0; c < C_; ++c) {
      tensors_.push_back({net_.weight_ih[c], H_, c < D_ ? net_.input : D_ * H_});
      tensors_.push_back({net_.weight_hh[c], H_, H_});
      if (!net_.bias_ih.empty()) {
        tensors_.push_back({net_.bias_ih[c], 1, H_});
        tensors_.push_back({net_.bias_hh[c], 1, H_});
      }
    }
    if (net_.head_weight) tensors_.push_back({net_.head_weight, net_.outputs, D_ * H_});
    if (net_.head_bias) tensors_.push_back({net_.head_bias, 1, net_.outputs});
    if (net_.embedding) tensors_.push_back({net_.embedding, net_.vocabulary, net_.input});
  }
  int64_t per_chain() const { return net_.bias_ih.empty() ? 2 : 4; }
  const Tensor& ih(int64_t c) const { return tensors_[per_chain() * c]; }
  const Tensor& hh(int64_t c) const { return tensors_[per_chain() * c + 1]; }
  const Tensor& bias(int64_t c, int64_t which) const { return tensors_[per_chain() * c + 2 + which]; }
  const Tensor& head() const { return tensors_[per_chain() * C_]; }
  const Tensor& head_bias() const { return tensors_[per_chain() * C_ + (net_.head_weight ? 1 : 0)]; }
  const Tensor& embedding() const { return tensors_.back(); }

  // Chain c is direction c % D_ of layer c / D_; of two directions, this is the other one of that layer.
  static int64_t opposite(int64_t c) { return c ^ 1; }
  // Columns of the weights above that read chain c.
  int64_t column(int64_t c) const { return c % D_ * H_; }

  // h_0 … h_T and δ_1 … δ_T (at rows 0 … T-1) of chain c, in its own time.
  Rows<T> h(int64_t c) {
    const int64_t at = c * (T_ + 1);
    return {h_ + at * ld_, h_exponent_.data() + at, h_largest_.data() + at, ld_, &h_closed_[c]};
  }
  Rows<T> d(int64_t c) {
    const int64_t at = c * T_;
    return {d_ + at * ld_, d_exponent_.data() + at, d_largest_.data() + at, ld_, &d_closed_[c]};
  }
  Rows<T> h_after_first(int64_t c) {
    return h(c).from(1);
  }

  void run(const Team& team) {
    const Team alone{};
    // Of a small network one thread is done before another has heard of it.
    if (shared_) find_units(team);
    else if (team.rank == 0) find_units(alone);
    team.wait();
    for (int64_t c = 0; c < C_; ++c) {
      canonical(hh(c), c, c, 1, hh_[c], team);
      if (c >= D_) canonical(ih(c), c, (c / D_ - 1) * D_, D_, ih_[c], team);
    }
    if (!all_finite(team)) return;
    first_sums(team);
    // Nothing has been lost so far but what is negligible beside a term of the same sum; or `lost_` says so.
    FlushDenormals::forget();
    if (shared_) {
      if (L_ == 1 && backward_) {
        for (int64_t c = 0; c < D_; ++c) {
          set_start(c, team);
          run_shared<true, true>(h_chain(c), d_chain(c), hh_[c], team);
        }
      } else {
        for (int64_t i = 0; i < L_; ++i) forward(i, team);
        for (int64_t i = L_ - 1; backward_ && i >= 0; --i) backward(i, team);
      }
    } else if (L_ == 1 && backward_ && !second_) {
      for (int64_t c = 0; c < D_; ++c) only_layer(c, team);
    } else {
      // The network is linear, so that neither h nor δ waits for the other.
      if (team.rank == 0) {
        for (int64_t i = 0; i < L_; ++i) forward(i, alone);
      }
      if (team.rank == team.size - 1 && backward_) {
        for (int64_t i = L_ - 1; i >= 0; --i) backward(i, alone);
      }
    }
    lost_[team.rank] |= FlushDenormals::lost();
    team.wait();
    results(team);
  }

  // ---- canonical coordinates ----------------------------------------------------------------------------------------

  // Per chain, of every unit: the exponents of what drives it first (reach_) and of what reads it first (read_), a sum
  // counting as its largest term; from them its unit exponent, about half the difference. All are even.
  int64_t* reach(int64_t c) { return reach_.data() + c * H_; }
  int64_t* read(int64_t c) { return read_.data() + c * H_; }
  int64_t* unit(int64_t c) { return net_.unit_exponents + c * H_; }
  bool dead(int64_t c, int64_t j) { return is_none(reach(c)[j]) && is_none(read(c)[j]); }

  void find_units(const Team& team) {
    int64_t first, last;
    team.share(H_, first, last);
    if (net_.embedding) columns_over(embedding(), nullptr, input_exponent_, team);
    for (int64_t c = 0; c < C_; ++c) {
      if (c >= D_ && c % D_ == 0) {
        if (team.rank == 0) std::copy(reach(c - D_), reach(c), side_.begin());
        team.wait();
      }
      int64_t* const out = reach(c);
      std::fill(out + first, out + last, net_.ones_h0 ? 0 : 2 * kNone);
      const Block<T> w = ih(c).block(team);
      row_exponents(w, c < D_ ? input_exponent_.data() : side_.data(), c < D_ ? drive_exponent_.data() + c * H_ : out);
      for (int64_t j = first; j < last; ++j) {
        if (c < D_) out[j] = std::max(out[j], drive_exponent_[c * H_ + j]);
        for (int64_t b = 0; b < per_chain() - 2; ++b) out[j] = std::max(out[j], 2 * exponent_of(bias(c, b).data[j]));
      }
      team.wait();
      if (team.rank == 0) spread(hh(c).data, 1, H_, out);
      team.wait();
    }
    for (int64_t i = L_ - 1; i >= 0; --i) {
      if (i == L_ - 1 && net_.head_weight) {
        columns_over(head(), nullptr, head_exponent_, team);
      } else if (i < L_ - 1) {
        for (int64_t c = (i + 1) * D_; c < (i + 2) * D_; ++c) columns_over(ih(c), read(c), side_, team, c % D_ == 0);
      }
      const Buffer<Int<T>>& from = i == L_ - 1 ? head_exponent_ : side_;
      for (int64_t c = i * D_; team.rank == 0 && c < (i + 1) * D_; ++c) {
        std::copy(from.begin() + column(c), from.begin() + column(c) + H_, read(c));
        spread(hh(c).data, H_, 1, read(c));
      }
      team.wait();
    }
    for (int64_t c = 0; team.rank == 0 && c < C_; ++c) {
      // Where one is missing, it is set so that the unit is like the one that counts most.
      int64_t most = 2 * kNone;
      for (int64_t j = 0; j < H_; ++j) most = std::max(most, reach(c)[j] + read(c)[j]);
      most = is_none(most) ? 0 : most;
      for (int64_t j = 0; j < H_; ++j) {
        int64_t in = reach(c)[j], out = read(c)[j];
        if (dead(c, j)) in = out = 0;
        if (is_none(in)) in = most - out;
        if (is_none(out)) out = most - in;
        unit(c)[j] = ((in - out) >> 2) * 2;
      }
    }
  }

  // column_exponents over the team; `fresh`: not beside what `out` holds.
  void columns_over(const Tensor& w, const int64_t* add, Buffer<Int<T>>& out, const Team& team, bool fresh = true) {
    const int64_t n = padded<T>(w.columns);
    Int<T>* const own = partial_exponents_.data() + team.rank * n;
    const Block<T> block = w.block(team);
    std::fill(own, own + n, static_cast<Int<T>>(2 * kNone));
    column_exponents(block, add, own);
    team.wait();
    if (team.rank == 0) {
      for (int64_t k = 0; k < n; ++k) {
        Int<T> most = fresh ? own[k] : std::max(own[k], out[k]);
        for (int64_t r = 1; r < team.size; ++r) most = std::max(most, own[r * n + k]);
        out[k] = most;
      }
    }
    team.wait();
  }

  // Units that none of the exponents `of` is of take theirs from the first step that reaches them,
  // w[k * from + j * to] leading from unit k to unit j.
  void spread(const T* w, int64_t from, int64_t to, int64_t* of) {
    if (std::none_of(of, of + H_, is_none)) return;
    std::vector<int64_t> reached, rest;
    for (int64_t j = 0; j < H_; ++j) (is_none(of[j]) ? rest : reached).push_back(j);
    while (!rest.empty() && !reached.empty()) {
      std::vector<int64_t> next, later;
      for (const int64_t j : rest) {
        int64_t most = 2 * kNone;
        for (const int64_t k : reached) most = std::max(most, 2 * exponent_of(w[k * from + j * to]) + of[k]);
        (is_none(most) ? later : next).push_back(j);
        of[j] = most;
      }
      for (const int64_t j : later) of[j] = kNone;
      reached.swap(next);
      rest.swap(later);
    }
    for (const int64_t j : rest) of[j] = kNone;
  }

  // The weights of chain c that read `sources` chains from `below` on: their factors, or a copy where factors do not do.
  void canonical(const Tensor& w, int64_t c, int64_t below, int64_t sources, Weights<T>& out, const Team& team) {
    constexpr int64_t least = std::numeric_limits<T>::min_exponent - 1, most = std::numeric_limits<T>::max_exponent - 1;
    const auto row = [&](int64_t j) { return dead(c, j) ? kNone : -unit(c)[j] / 2; };
    if (team.rank == 0) {
      for (int64_t k = 0; k < sources * H_; ++k) {
        const int64_t s = below + k / H_, i = k % H_;
        halves_[k] = static_cast<Int<T>>(dead(s, i) ? kNone : unit(s)[i] / 2);
      }
    }
    team.wait();
    const Block<T> block = w.block(team);
    // A subnormal number counts as the smallest normal one: a scale need not be tight.
    constexpr Int<T> mantissa = std::numeric_limits<T>::digits - 1;
    const Ints<T> none = Ints<T>{} + Int<T>(2 * kNone);
    Ints<T> high = none, largest{};
    for (int64_t j = block.first; j < block.last; ++j) {
      const Int<T> own = static_cast<Int<T>>(row(j) - most);
      Block<T>{w.data, w.columns, j, j + 1}.each([&](int64_t, int64_t k, const Vec<T>& v) {
        const Ints<T> bits = bits_of<T>(v) & std::numeric_limits<Int<T>>::max();
        const Ints<T> n = bits > 0 ? (bits >> mantissa) + (load_ints<T>(halves_.data() + k) + own) : none;
        high = n > high ? n : high;
        largest = bits > largest ? bits : largest;
      });
    }
    extents_[team.rank] = highest<T>(high);
    if (highest<T>(largest) >> mantissa > 2 * most) bad_by_[team.rank] = 1;
    team.wait();
    if (team.rank == 0) {
      int64_t top = *std::max_element(extents_.begin(), extents_.begin() + team.size);
      if (is_none(top)) top = 0;
      const auto middle = [](auto exponent, int64_t n, int64_t& spread) {
        int64_t high = 2 * kNone, low = -high;
        for (int64_t i = 0; i < n; ++i) {
          if (is_none(exponent(i))) continue;
          high = std::max<int64_t>(high, exponent(i));
          low = std::min<int64_t>(low, exponent(i));
        }
        spread = high - low;
        return is_none(high) ? 0 : low + (high - low) / 2;
      };
      int64_t row_spread, column_spread;
      const int64_t row_middle = middle(row, H_, row_spread);
      const int64_t column_middle = middle([&](int64_t k) { return halves_[k]; }, sources * H_, column_spread);
      const int64_t shift = row_middle - top;
      const bool fits = row_spread <= 2 * kFactor && column_spread <= 2 * kFactor &&
                        column_middle + shift - kFactor >= least && column_middle + shift + kFactor <= most;
      Buffer<T>& rows = factors_.emplace_back(padded<T>(H_), T(0));
      Buffer<T>& columns = factors_.emplace_back(padded<T>(sources * H_), T(0));
      for (int64_t j = 0; j < H_; ++j) {
        rows[j] = !fits ? T(1) : is_none(row(j)) ? T(0) : power_of_two<T>(row(j) - row_middle);
      }
      for (int64_t k = 0; k < sources * H_; ++k) {
        columns[k] = !fits ? T(1) : is_none(halves_[k]) ? T(0) : power_of_two<T>(halves_[k] + shift);
      }
      out = {w.data, rows.data(), columns.data(), 2 * top};
      if (!fits) {
        out.data = copies_.emplace_back(w.size() + Simd<T>::width).data();
      }
      top_ = top;
    }
    team.wait();
    if (out.data == w.data) return;
    T* const copy = const_cast<T*>(out.data);
    Ints<T> low = -none;
    for (int64_t j = block.first; j < block.last; ++j) {
      const Int<T> own = static_cast<Int<T>>(row(j) - top_);
      Block<T>{w.data, w.columns, j, j + 1}.each([&](int64_t, int64_t k, const Vec<T>& v) {
        const Ints<T> shift = load_ints<T>(halves_.data() + k) + own, n = exponents_of<T>(v) + shift;
        const Ints<T> counted = n > Int<T>(kNone / 2) ? n : -none;
        low = counted < low ? counted : low;
        store(copy + j * w.columns + k, times_power<T>(v, shift), w.columns - k);
      });
    }
    if (-highest<T>(-low) < least) lost_[team.rank] = 1;
    team.wait();
  }

  // Of all tensors; `canonical` has looked at the matrices.
  bool all_finite(const Team& team) {
    for (int64_t i = 0; i < static_cast<int64_t>(tensors_.size()); ++i) {
      const int64_t c = i / per_chain(), kind = i % per_chain();
      if (c < C_ && (kind == 1 || (kind == 0 && c >= D_))) continue;
      const Tensor& w = tensors_[i];
      int64_t first, last;
      team.share(w.size(), first, last);
      if (!finite(w.data + first, last - first)) bad_by_[team.rank] = 1;
    }
    team.wait();
    if (std::find(bad_by_.begin(), bad_by_.begin() + team.size, 1) == bad_by_.begin() + team.size) return true;
    if (team.rank == 0) {
      const auto bad = [](const Tensor& w) { return !finite(w.data, w.size()); };
      bad_ = std::find_if(tensors_.begin(), tensors_.end(), bad) - tensors_.begin();
    }
    return false;
  }

  // ---- both ends ----------------------------------------------------------------------------------------------------

  // column_sums over the team: rank 0 has the result.
  std::vector<double> sums_over(const Tensor& w, const Int<T>* column, const Team& team) {
    const int64_t n = padded<T>(w.columns);
    column_sums<T>(w.block(team), nullptr, column, nullptr, partial_.data() + team.rank * n);
    team.wait();
    std::vector<double> sums(w.columns, 0.0);
    for (int64_t r = 0; team.rank == 0 && r < team.size; ++r) {
      for (int64_t k = 0; k < w.columns; ++k) sums[k] += partial_[r * n + k];
    }
    team.wait();
    return sums;
  }

  // The vectors at both ends: the head's column sums, the input, the first layer's drive, the biases.
  void first_sums(const Team& team) {
    std::vector<double> head_sums(D_ * H_, 1.0);
    if (net_.head_weight) head_sums = sums_over(head(), head_exponent_.data(), team);
    if (net_.embedding) {
      const std::vector<double> sums = sums_over(embedding(), input_exponent_.data(), team);
      if (team.rank == 0) std::copy(sums.begin(), sums.end(), input_sums_.begin());
      team.wait();
    }
    int64_t first, last;
    team.share(H_, first, last);
    for (int64_t c = 0; c < D_; ++c) {
      for (int64_t j = first; j < last; ++j) {
        drive_sums_[c * H_ + j] = row_sum(ih(c).data + j * net_.input, net_.input, input_exponent_.data(),
                                          drive_exponent_[c * H_ + j], input_sums_.data());
      }
    }
    team.wait();
    if (team.rank == 0) set_ends(head_sums);
    team.wait();
  }

  void set_ends(const std::vector<double>& head_sums) {
    bool held = true;
    std::vector<int64_t> exponents(H_);
    std::vector<double> values(H_);
    for (int64_t e = 0; e < D_; ++e) {
      const int64_t* d = unit(C_ - D_ + e);
      for (int64_t k = 0; k < H_; ++k) exponents[k] = head_exponent_[e * H_ + k] + d[k];
      std::copy_n(head_sums.begin() + e * H_, H_, values.begin());
      held &= head_[e].set(values, exponents);
    }
    if (net_.embedding) {
      held &= input_.set({input_sums_.begin(), input_sums_.begin() + net_.input},
                         {input_exponent_.begin(), input_exponent_.begin() + net_.input});
    }
    for (int64_t c = 0; c < C_; ++c) {
      const int64_t* d = unit(c);
      if (net_.ones_h0) {
        std::transform(d, d + H_, exponents.begin(), [](int64_t n) { return -n; });
        held &= start_[c].set(std::vector<double>(H_, 1.0), exponents);
      } else {
        start_[c].set({}, {});
      }
      std::fill(values.begin(), values.end(), 0.0);
      std::fill(exponents.begin(), exponents.end(), 0);
      for (int64_t b = 0; b < per_chain() - 2; ++b) {
        for (int64_t j = 0; j < H_; ++j) {
          const T w = bias(c, b).data[j];
          if (w == T(0)) continue;
          const int64_t e = exponent_of(w);
          const double v = times_power_of_two(std::abs(static_cast<double>(w)), -e);
          add(values[j], exponents[j], v * v, 2 * e - d[j]);
        }
      }
      held &= bias_[c].set(values, exponents);
      if (c >= D_) continue;
      for (int64_t j = 0; j < H_; ++j) {
        add(values[j], exponents[j], drive_sums_[c * H_ + j], drive_exponent_[c * H_ + j] - d[j]);
      }
      held &= first_drive_[c].set(values, exponents);
      if (backward_) {
        for (int64_t t = net_.last_only ? T_ - 1 : 0; t < T_; ++t) top_exponent_[c * T_ + t] = head_[c].exponent;
      }
    }
    if (!held) lost_[0] = 1;
    std::fill(zeros_.begin(), zeros_.end(), T(0));
  }

  // value · 2^exponent += v · 2^e.
  static void add(double& value, int64_t& exponent, double v, int64_t e) {
    if (!(v > 0)) return;
    if (!(value > 0)) {
      value = v;
      exponent = e;
      return;
    }
    const int64_t top = std::max(exponent, e);
    value = times_power_of_two(value, exponent - top) + times_power_of_two(v, e - top);
    exponent = top;
  }

  void set_start(int64_t c, const Team& team) {
    if (team.rank == 0) {
      const Rows<T> rows = h(c);
      std::copy(start_[c].data.begin(), start_[c].data.end(), rows[0]);
      rows.exponent[0] = start_[c].exponent;
      rows.largest[0] = net_.ones_h0 ? kCentre<T> : kZeroExponent;
    }
    team.wait();
  }

  Chain<T> h_chain(int64_t c) {
    const Drive<T> drive = c < D_ ? Drive<T>{first_drive_[c].data.data(), &first_drive_[c].exponent, 0, 0, 0}
                                  : Drive<T>{h_drive_, h_drive_exponent_.data(), ld_, 1, h_constant_};
    return {h(c), 1, 1, h(c)[0], start_[c].exponent, drive, c + D_ < C_,
            {coefficients(2 * c), coefficients(2 * c) + T_ + 1}};
  }
  Chain<T> d_chain(int64_t c) {
    const int64_t e = c % D_;
    const Drive<T> drive = c + D_ >= C_
                               ? Drive<T>{head_[e].data.data(), top_exponent_.data() + e * T_, 0, 1, net_.last_only}
                               : Drive<T>{d_drive_, d_drive_exponent_.data(), ld_, 1, d_constant_};
    return {d(c), T_ - 1, -1, zeros_.data(), kZeroExponent, drive, c >= D_,
            {coefficients(2 * c + 1), coefficients(2 * c + 1) + T_ + 1}};
  }

  T* coefficients(int64_t chain) { return coefficients_.data() + 2 * chain * (T_ + 1); }

  void forward(int64_t i, const Team& team) {
    for (int64_t c = i * D_; c < (i + 1) * D_; ++c) {
      set_start(c, team);
      if (i > 0) {
        drive_h(c, team);
        team.wait();
      }
      run_chain<true>(h_chain(c), hh_[c], packed_h_, team);
    }
  }
  void backward(int64_t i, const Team& team) {
    for (int64_t c = i * D_; c < (i + 1) * D_; ++c) {
      if (i < L_ - 1) {
        drive_d(c, team);
        team.wait();
      }
      run_chain<false>(d_chain(c), hh_[c], packed_d_, team);
    }
  }

  void drive_h(int64_t c, const Team& team) {
    T* const drive = h_drive_ + ld_;
    int64_t* const exponent = h_drive_exponent_.data() + 1;
    const auto mix_up = [&](int64_t below, T* out, int64_t* out_exponent) {
      mix<true>(h_after_first(below), ih_[c], column(below), mixed_h_, out, out_exponent, team);
    };
    mix_up(c - D_, drive, exponent);
    if (D_ > 1) {
      mix_up(opposite(c - D_), h_other_, h_other_exponent_.data());
      add_turned(drive, exponent, h_other_, h_other_exponent_.data(), team);
    }
    add_bias(bias_[c], team);
    // Row t of the drive belongs to step t - 1. What the other direction reaches last comes first here: no rest.
    const Closed<T>& rest = h_closed_[c - D_];
    if (team.rank == 0) h_constant_ = D_ == 1 && rest.last > rest.first ? rest.first - 1 : T_;
  }
  void drive_d(int64_t c, const Team& team) {
    const auto mix_down = [&](int64_t above, T* out, int64_t* exponent) {
      mix<false>(d(above), ih_[above], column(c), mixed_d_, out, exponent, team);
    };
    mix_down(c + D_, d_drive_, d_drive_exponent_.data());
    if (D_ > 1) {
      mix_down(opposite(c + D_), d_other_, d_other_exponent_.data());
      add_turned(d_drive_, d_drive_exponent_.data(), d_other_, d_other_exponent_.data(), team);
    }
    // Row t of the drive belongs to step T - 1 - t.
    const Closed<T>& rest = d_closed_[c + D_];
    if (team.rank == 0) d_constant_ = D_ == 1 && rest.last > rest.first ? T_ - rest.last : T_;
  }

  // Both chains of one layer whose rows nobody else asks for: once it is seen that neither rest nor a closed form ends
  // them, in blocks, if those take less time.
  void only_layer(int64_t c, const Team& team) {
    const bool first = team.rank == 0, last = team.rank == team.size - 1;
    const Team alone{};
    const Chain<T> h = h_chain(c), d = d_chain(c);
    const Packed<T> w_h{packed_h_.data(), H_, H_, kVectorRow * Simd<T>::width}, w_d{packed_d_.data(), H_, H_, w_h.panel};
    const Weights<T>& w = hh_[c];
    int64_t done_h = 0, done_d = 0;
    if (first) {
      set_start(c, alone);
      pack(w_h, w.data, 1, H_, alone, square<true>(w, 0));
      converges_[0] = begin_chain(h, w_h, w.exponent, done_h, T_);
    }
    if (last) {
      pack(w_d, w.data, H_, 1, alone, square<false>(w, 0));
      converges_[1] = begin_chain(d, w_d, w.exponent, done_d, T_);
    }
    team.wait();
    bool stepped = true;
    if (const int64_t log2 = block_log2(converges_[0], converges_[1], team.size)) {
      const bool lost = FlushDenormals::lost();
      if (first) blocks_.emplace(T_, H_, log2, team.size);
      team.wait();
      stepped = !blocks_->run(h, d, w_h, w_d, w.exponent, net_.last_only, net_.kappa_hh[c],
                              net_.exponents + c * (net_.bias_ih.empty() ? 2 : 3) + 1,
                              {h_sum(c), d_sum(c), &h_sum_exponent_[c], &d_sum_exponent_[c]}, team);
      FlushDenormals::forget();
      if (stepped && lost) mark_lost();
    }
    if (first) summed_[c] = !stepped;
    if (stepped && first && converges_[0] > 0) end_chain(h, w_h, w.exponent, done_h, T_);
    if (stepped && last && converges_[1] > 0) end_chain(d, w_d, w.exponent, done_d, T_);
    lost_[team.rank] |= FlushDenormals::lost();
    FlushDenormals::forget();
    team.wait();
  }

  // The best number of steps in a block, its logarithm; 0 if chains that may rest after those steps do as well without.
  int64_t block_log2(int64_t h_steps, int64_t d_steps, int threads) const {
    // Barriers and the steps already done, and what the model leaves out.
    constexpr double kOverhead = 5e5, kWorth = 0.75;
    const double H = static_cast<double>(H_);
    const double steps = static_cast<double>(threads > 1 ? std::max(h_steps, d_steps) : h_steps + d_steps);
    double least = kWorth * H * H * (ChainBlocks<T>::kVector * steps + static_cast<double>(T_) / threads) - kOverhead;
    int64_t best = 0;
    for (int64_t q = 1; q < 12 && (T_ >> q) >= 4; ++q) {
      const double cost = ChainBlocks<T>::cost(T_, H_, q, threads);
      if (cost < least) {
        least = cost;
        best = q;
      }
    }
    return best;
  }

  template <bool Forward>
  void run_chain(const Chain<T>& c, const Weights<T>& w, Buffer<T>& packed, const Team& team) {
    if (shared_) return run_shared<Forward, !Forward>(c, c, w, team);
    const Packed<T> p{packed.data(), H_, H_, kVectorRow * Simd<T>::width};
    pack(p, w.data, Forward ? 1 : H_, Forward ? H_ : 1, team, square<Forward>(w, 0));
    chain(c, p, w.exponent, T_);
  }

  template <bool Forward, bool Backward>
  void run_shared(const Chain<T>& h, const Chain<T>& d, const Weights<T>& w, const Team& team) {
    bool forward = Forward, backward = Backward;
    int64_t from = 0;
    if (closes_ && (!Forward || closable(h)) && (!Backward || closable(d))) {
      from = close_shared(h, d, w, H_, T_, forward, backward, wide_scratch_, team);
    }
    const auto go = [&](auto f, auto b) {
      chains_shared<T, f.value, b.value>(h, d, w, H_, from, T_, scratch_, team);
    };
    if (forward && backward) go(std::true_type{}, std::true_type{});
    else if (forward) go(std::true_type{}, std::false_type{});
    else if (backward) go(std::false_type{}, std::true_type{});
  }
  static bool closable(const Chain<T>& c) { return !c.fill && c.from_nothing(); }

  // What `pack` makes of a weight: columns of W, from `start` on, run down its rows if Forward.
  template <bool Forward>
  static auto square(const Weights<T>& w, int64_t start) {
    return [row = w.row, column = w.column + start](T v, int64_t k, int64_t n) {
      v = v * column[Forward ? k : n] * row[Forward ? n : k];
      return v * v;
    };
  }

  // The drive that one layer gives the next, from columns `start` on of W: rows · W̃ᵀ, or rows · W̃ downwards.
  template <bool Forward>
  void mix(const Rows<T>& rows, const Weights<T>& w, int64_t start, Buffer<T>& packed, T* out, int64_t* exponent,
           const Team& team) {
    const Packed<T> p{packed.data(), H_, H_, kPanel<T>};
    pack(p, w.data + start, Forward ? 1 : D_ * H_, Forward ? D_ * H_ : 1, team, square<Forward>(w, start));
    team.wait();
    int64_t first, last;
    team.share(T_, first, last);
    for (int64_t n = 0; n < p.panels(); ++n) {
      Tile<T> t{};
      t.c = out + first * ld_ + n * p.panel;
      t.c_row = ld_;
      step(t, rows[first], ld_, p, n, static_cast<const Product<T>*>(nullptr), last - first);
    }
    for (int64_t t = first; t < last; ++t) {
      // A row of zeros must not bring its exponent along: it would push aside what it drives.
      const T* row = out + t * ld_;
      const bool zero = std::all_of(row, row + H_, [](T v) { return v == T(0); });
      exponent[t] = zero ? kZeroExponent : rows.exponent[t] + w.exponent;
      std::fill(out + t * ld_ + H_, out + (t + 1) * ld_, T(0));
    }
    team.wait();
  }

  // drive += other, T rows of the opposite direction, whose time runs against the drive's.
  void add_turned(T* drive, int64_t* exponent, const T* other, const int64_t* other_exponent, const Team& team) {
    int64_t first, last, largest;
    team.share(T_, first, last);
    for (int64_t t = first; t < last; ++t) {
      const int64_t s = T_ - 1 - t;
      finish_step(drive + t * ld_, exponent[t], other + s * ld_, other_exponent[s], ld_, exponent[t], largest);
    }
    team.wait();
  }

  void add_bias(const Scaled<T>& b, const Team& team) {
    if (b.exponent == kZeroExponent) return;
    int64_t first, last, largest;
    team.share(T_, first, last);
    for (int64_t t = first + 1; t < last + 1; ++t) {
      finish_step(h_drive_ + t * ld_, h_drive_exponent_[t], b.data.data(), b.exponent, ld_, h_drive_exponent_[t],
                  largest);
    }
    team.wait();
  }

  void results(const Team& team) {
    const bool wanted = !net_.kappa_hh.empty();
    if (team.rank == team.size - 1) {
      for (int64_t e = 0; e < D_; ++e) {
        if (summed_[e]) continue;
        const Rows<T> rows = h_after_first(C_ - D_ + e);
        lost_[team.rank] |= !sum_rows(rows, net_.last_only ? T_ - 1 : 0, T_, H_, h_sum(e), h_sum_exponent_[e]);
      }
    }
    for (int64_t c = 0; wanted && c < C_; ++c) {
      if (team.rank != c % team.size || summed_[c]) continue;
      lost_[team.rank] |= !sum_rows(d(c), 0, T_, H_, d_sum(c), d_sum_exponent_[c]);
    }
    team.wait();
    if (team.rank == 0) *net_.log_path_norm = log_path_norm();
    if (team.rank == 0 && net_.ways) say_ways();
    if (wanted) kappas(team);
  }
  void say_ways() const {
    int64_t* out = net_.ways;
    for (const auto* chains : {&h_closed_, &d_closed_}) {
      for (int64_t c = 0; c < C_; ++c) {
        const Closed<T>& closed = (*chains)[c];
        const int64_t stepped = T_ - (closed.last - closed.first);
        *out++ = summed_[c] ? kBlocks : stepped == T_ ? kSteps : closed.count == 1 ? kRest : kClosedForm;
        *out++ = summed_[c] ? blocks_->steps() : stepped;
      }
    }
  }

  void kappas(const Team& team) {
    int64_t* exponent = net_.exponents;
    for (int64_t c = 0; c < C_; ++c) {
      if (c >= D_) {
        input_kappa(c, *exponent, team);
      } else if (team.rank == 0) {
        *exponent = first_kappa(d_sum(c), d_sum_exponent_[c], net_.kappa_ih[c]);
      }
      ++exponent;
      if (!summed_[c]) outer(d(c), h(c), net_.kappa_hh[c], H_, kZeroExponent, *exponent, team);
      if (second_) second_term(c, exponent, team);
      ++exponent;
      if (!net_.kappa_bias.empty()) {
        if (team.rank == 0) *exponent = copy(d_sum(c), d_sum_exponent_[c], H_, net_.kappa_bias[c]);
        ++exponent;
      }
    }
    if (team.rank != 0) return;
    if (net_.kappa_head) *exponent++ = head_kappa();
    if (net_.kappa_head_bias) {
      *net_.kappa_head_bias = static_cast<T>(output_steps());
      *exponent++ = 0;
    }
    if (net_.kappa_embedding) *exponent++ = embedding_kappa();
  }

  T* h_sum(int64_t e) { return h_sum_.data() + e * ld_; }
  T* d_sum(int64_t c) { return d_sum_.data() + c * ld_; }

  // κ⁽¹⁾ of the weights between two layers, whose columns read either direction below on one common exponent.
  void input_kappa(int64_t c, int64_t& exponent, const Team& team) {
    T* const out = net_.kappa_ih[c];
    const int64_t same = c - D_;
    if (D_ == 1) return outer(d(c), h_after_first(same), out, H_, kZeroExponent, exponent, team);
    const Rows<T> own = h_after_first(same), other = flipped(h_after_first(opposite(same)), team);
    const int64_t own_largest = largest_pair(d(c), own, T_), other_largest = largest_pair(d(c), other, T_);
    outer(d(c), own, out + column(same), D_ * H_, other_largest, exponent, team);
    outer(d(c), other, out + column(opposite(same)), D_ * H_, own_largest, exponent, team);
  }

  // T rows in the time of the other direction. The next call overwrites them.
  Rows<T> flipped(const Rows<T>& rows, const Team& team) {
    team.wait();
    int64_t first, last;
    team.share(T_, first, last);
    for (int64_t t = first; t < last; ++t) {
      const int64_t s = T_ - 1 - t;
      std::copy(rows[s], rows[s] + ld_, h_other_ + t * ld_);
      h_other_exponent_[t] = rows.exponent[s];
      h_other_largest_[t] = rows.largest[s];
    }
    team.wait();
    return {h_other_, h_other_exponent_.data(), h_other_largest_.data(), ld_, &h_other_closed_};
  }

  // Σ_t h_t of the top layer, both directions on one exponent.
  int64_t head_kappa() {
    std::vector<int64_t> largest;
    for (int64_t e = 0; e < D_; ++e) {
      const int64_t m = magnitude(*std::max_element(h_sum(e), h_sum(e) + H_));
      largest.push_back(m == kZeroExponent ? m : m + h_sum_exponent_[e]);
    }
    const int64_t top = *std::max_element(largest.begin(), largest.end());
    const int64_t result = result_exponent(top);
    for (int64_t e = 0; e < D_; ++e) {
      // In two halves: the scale may be out of range where the entries are not.
      const int64_t shift = h_sum_exponent_[e] - result;
      const T s1 = power_of_two<T>(shift / 2), s2 = power_of_two<T>(shift - shift / 2);
      std::transform(h_sum(e), h_sum(e) + H_, net_.kappa_head + e * H_, [=](T v) { return v * s1 * s2; });
      lost_[0] |= !kept(h_sum(e), net_.kappa_head + e * H_, H_);
    }
    return result;
  }

  void second_term(int64_t c, int64_t* exponent, const Team& team) {
    team.wait();  // κ⁽¹⁾ is there
    int64_t first, last;
    team.share(H_, first, last);
    const Scaled<T>* const drive = c < D_ ? &first_drive_[c] : nullptr;
    // The other direction drives the lower layers' δ more and more.
    const bool monotone = !net_.last_only && (D_ == 1 || c + D_ >= C_);
    second_->run({hh_[c], h(c), d(c), drive ? drive->data.data() : nullptr,
                  drive ? drive->exponent : kZeroExponent, net_.kappa_hh[c], exponent, monotone, net_.second_factor,
                  net_.rtol, net_.first_lags.empty() ? 0 : net_.first_lags[c], net_.lags + c, net_.bounds + c,
                  left_ + left_at(first, team.rank), right_ + team.rank * PairSum<T>::right_size(ld_)},
                 team);
  }

  // Where a thread's share of left_ begins, whose rows begin at `first`: beside a PairSum's it holds two whole vectors.
  int64_t left_at(int64_t first, int64_t rank) const {
    return PairSum<T>::left_size(T_, first) + 2 * rank * Simd<T>::width;
  }

  void outer(const Rows<T>& d, const Rows<T>& h, T* out, int64_t row, int64_t beside, int64_t& exponent,
             const Team& team) {
    int64_t first, last;
    team.share(H_, first, last);
    lost_[team.rank] |= !outer_sum(d, h, T_, H_, H_, out, row, beside, exponent,
                                   left_ + left_at(first, team.rank),
                                   right_ + team.rank * PairSum<T>::right_size(ld_), team);
  }
  int64_t copy(const T* vector, int64_t exponent, int64_t n, T* out) {
    bool held;
    const int64_t result = copy_result(vector, exponent, n, out, held);
    lost_[0] |= !held;
    return result;
  }

  // The input is the same at every step: κ⁽¹⁾ = (Σ_t δ_t) · inputᵀ, equal columns for an input of ones.
  int64_t first_kappa(const T* d_sum, int64_t exponent, T* out) {
    if (!net_.embedding) return copy(d_sum, exponent, H_, out);
    const T* x = input_.data.data();
    const int64_t md = magnitude(*std::max_element(d_sum, d_sum + H_));
    const int64_t mx = magnitude(*std::max_element(x, x + net_.input));
    if (md == kZeroExponent || mx == kZeroExponent) {
      std::fill(out, out + H_ * net_.input, T(0));
      return 0;
    }
    const int64_t result = result_exponent(md + exponent + mx + input_.exponent);
    // Each factor is brought near one first, and the product to its place.
    const T s1 = std::ldexp(T(1), static_cast<int>(-md)), s2 = std::ldexp(T(1), static_cast<int>(-mx));
    const T s = std::ldexp(T(1), static_cast<int>(md + exponent + mx + input_.exponent - result));
    for (int64_t j = 0; j < H_; ++j) {
      T* const row = out + j * net_.input;
      for (int64_t k = 0; k < net_.input; ++k) row[k] = (d_sum[j] * s1 * s) * (x[k] * s2);
      if (d_sum[j] > T(0)) lost_[0] |= !kept(x, row, net_.input);
    }
    return result;
  }

  int64_t embedding_kappa() {
    std::vector<double> values(net_.input, 0.0);
    std::vector<int64_t> exponents(net_.input, 0), row(H_);
    Buffer<T> weight(H_), sums(padded<T>(net_.input));
    Buffer<Int<T>> column(padded<T>(net_.input));
    for (int64_t c = 0; c < D_; ++c) {
      for (int64_t j = 0; j < H_; ++j) {
        const T v = d_sum(c)[j];
        const int64_t m = v > T(0) ? (std::ilogb(v) >> 1) * 2 : kNone;
        weight[j] = v > T(0) ? std::ldexp(v, static_cast<int>(-m)) : T(0);
        row[j] = m - unit(c)[j];
      }
      std::fill(column.begin(), column.end(), static_cast<Int<T>>(2 * kNone));
      const Block<T> w = ih(c).block(Team{});
      column_exponents(w, row.data(), column.data());
      column_sums<T>(w, row.data(), column.data(), weight.data(), sums.data());
      for (int64_t k = 0; k < net_.input; ++k) add(values[k], exponents[k], sums[k], column[k] + d_sum_exponent_[c]);
    }
    Scaled<T> result(net_.input);
    if (!result.set(values, exponents)) lost_[0] = 1;
    return copy(result.data.data(), result.exponent, net_.input, net_.kappa_embedding);
  }

  int64_t output_steps() const { return net_.last_only ? 1 : T_; }

  double log_path_norm() {
    double logarithm = -std::numeric_limits<double>::infinity();
    const auto add = [&](double other) {
      const double high = std::max(logarithm, other), low = std::min(logarithm, other);
      logarithm = high + std::log1p(std::exp(low - high));
    };
    for (int64_t e = 0; e < D_; ++e) {
      // Both factors are brought near one before they are multiplied.
      double dot = 0;
      const double centre = std::ldexp(1.0, static_cast<int>(-kCentre<T>));
      for (int64_t k = 0; k < H_; ++k) dot += static_cast<double>(head_[e].data[k]) * centre * h_sum(e)[k];
      if (!(dot > 0)) continue;
      // Large exponents of opposite signs cancel as integers, not as rounded logarithms.
      int own = 0;
      const double mantissa = std::frexp(dot, &own);
      add(std::log(mantissa) + (own + head_[e].exponent + kCentre<T> + h_sum_exponent_[e]) * kLn2);
    }
    if (net_.head_bias) {
      const Tensor& b = head_bias();
      double sum = 0;
      int64_t top = kNone;
      for (int64_t o = 0; o < net_.outputs; ++o) top = std::max(top, exponent_of(b.data[o]));
      const double s1 = power_of_two<double>(-top / 2), s2 = power_of_two<double>(-top - -top / 2);
      for (int64_t o = 0; o < net_.outputs; ++o) {
        const double v = b.data[o] * s1 * s2;
        sum += v * v;
      }
      if (sum > 0) add(std::log(sum * static_cast<double>(output_steps())) + 2 * top * kLn2);
    }
    return logarithm;
  }

  static constexpr double kLn2 = 0.693147180559945309417232121458;

  const PathChain<T>& net_;
  int threads_;
  int64_t T_, H_, L_, D_, C_, ld_;  // C_ = L_ D_ chains of h, and as many of δ
  bool backward_, shared_, closes_;
  int64_t h_constant_ = 0, d_constant_ = 0;
  std::vector<Closed<T>> h_closed_, d_closed_;
  Closed<T> h_other_closed_;  // none
  int64_t bad_ = -1;
  std::vector<Tensor> tensors_;
  std::vector<int> lost_, bad_by_;  // by thread
  std::vector<int64_t> extents_, reach_, read_, drive_exponent_;
  Buffer<Int<T>> input_exponent_, head_exponent_, side_, halves_, partial_exponents_;
  std::vector<Buffer<T>> factors_, copies_;
  std::vector<Weights<T>> hh_, ih_;  // by chains
  int64_t top_ = 0;
  std::vector<Scaled<T>> head_;
  Scaled<T> input_;
  std::vector<Scaled<T>> first_drive_, start_;
  Buffer<T> zeros_;
  std::vector<Scaled<T>> bias_;
  Buffer<T> input_sums_;
  Buffer<T> packed_h_, packed_d_, mixed_h_, mixed_d_, scratch_, partial_, d_sum_, h_sum_, coefficients_;
  Buffer<double> wide_scratch_;
  std::vector<T> drive_sums_;
  Workspace<T> memory_;
  std::optional<Kappa2Run<T>> second_;
  std::optional<ChainBlocks<T>> blocks_;
  std::vector<char> summed_;     // per chain: whether κ and the sums are there already
  std::array<int64_t, 2> converges_;  // of h and δ, as begin_chain tells
  T *h_ = nullptr, *d_ = nullptr, *h_drive_ = nullptr, *d_drive_ = nullptr, *left_ = nullptr,
    *right_ = nullptr;
  T *h_other_ = nullptr, *d_other_ = nullptr;  // T rows from the other direction
  std::vector<int64_t> h_sum_exponent_;
  std::vector<int64_t> h_exponent_, h_largest_, d_exponent_, d_largest_, d_sum_exponent_, top_exponent_,
      h_drive_exponent_, d_drive_exponent_, h_other_exponent_, h_other_largest_, d_other_exponent_;
};

template <typename T>
int64_t path_chain(const PathChain<T>& net, int threads) {
  return PathChainRun<T>(net, threads).run();
}

// path_chain: scan of the weights, first drives, chains, κ⁽¹⁾; one team of threads runs it all.

// The largest |w| of a share of a tensor, nan if any entry is not finite.
template <typename T>
T scan(const T* w, int64_t n) {
  constexpr int64_t width = Simd<T>::width;
  Vec<T> most{}, check{};
  for (int64_t i = 0; i < n; i += width) {
    const Vec<T> v = load(w + i, n - i);
    most = maximum<T>(most, maximum<T>(v, -v));
    check += v - v;  // nan for an infinity or a nan
  }
  return lane_sum<T>(check) == T(0) ? largest_lane<T>(most) : std::numeric_limits<T>::quiet_NaN();
}

// The power of two that brings the largest weight to [1, 2), and the exponent of squares formed with it.
template <typename T>
void normalise(T largest, T& scale, int64_t& exponent) {
  int64_t m = largest > T(0) ? std::ilogb(largest) : 0;
  // The inverse of the very largest powers is subnormal: they are brought to [2, 4) instead.
  m = std::min<int64_t>(m, -(std::numeric_limits<T>::min_exponent - 1));
  scale = std::ldexp(T(1), static_cast<int>(-m));
  exponent = 2 * m;
}

// Σ_rows (w · scale)², by columns, of rows [first, last): in blocks, whose sums are added, to keep rounding small.
template <typename T>
void square_columns(const T* w, int64_t columns, T scale, int64_t first, int64_t last, T* out) {
  constexpr int64_t width = Simd<T>::width, kBlock = 64;
  for (int64_t k = 0; k < columns; k += width) {
    Vec<T> total{};
    for (int64_t j0 = first; j0 < last; j0 += kBlock) {
      Vec<T> sum{};
      for (int64_t j = j0; j < std::min(j0 + kBlock, last); ++j) {
        const Vec<T> v = load(w + j * columns + k, columns - k) * scale;
        sum += v * v;
      }
      total += sum;
    }
    store(out + k, total);
  }
}

// A padded vector with an exponent.
template <typename T>
struct Scaled {
  Buffer<T> data;
  int64_t exponent = kZeroExponent;

  explicit Scaled(int64_t n) : data(padded<T>(n)) {}
  // Takes doubles, which hold squares of anything scanned and scaled, and centres them.
  void set(const std::vector<double>& values, int64_t values_exponent) {
    const double most = values.empty() ? 0 : *std::max_element(values.begin(), values.end());
    std::fill(data.begin(), data.end(), T(0));
    exponent = kZeroExponent;
    if (most == 0) return;
    const int64_t shift = kCentre<T> - std::ilogb(most);
    for (size_t i = 0; i < values.size(); ++i) {
      data[i] = static_cast<T>(std::ldexp(values[i], static_cast<int>(shift)));
    }
    exponent = values_exponent - shift;
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
        head_(D_, Scaled<T>(net.hidden)),
        input_(1, Scaled<T>(net.input)),
        first_drive_(D_, Scaled<T>(net.hidden)),
        start_(ld_),
        zeros_(ld_),
        bias_(C_, Scaled<T>(net.hidden)),
        h_sum_(D_ * ld_),
        drive_sums_(D_ * net.hidden),
        memory_(ld_ * (C_ * (2 * T_ + 1) + (L_ > 1 ? D_ * 2 * T_ + 1 : 0)) +
                padded<T>(PairSum<T>::left_size(T_, H_)) + padded<T>(threads * PairSum<T>::right_size(ld_))),
        h_sum_exponent_(D_) {
    collect();
    scans_.resize(tensors_.size() * threads);
    lost_.assign(threads, 0);
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
    left_ = memory_.take(PairSum<T>::left_size(T_, H_));
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
    int64_t size;
    T scale;           // brings the largest entry to [1, 2)
    int64_t exponent;  // of its squares: true w² = (w · scale)² · 2^exponent
  };

  void collect() {
    for (int64_t c = 0; c < C_; ++c) {
      tensors_.push_back({net_.weight_ih[c], H_ * (c < D_ ? net_.input : D_ * H_), T(1), 0});
      tensors_.push_back({net_.weight_hh[c], H_ * H_, T(1), 0});
      if (!net_.bias_ih.empty()) {
        tensors_.push_back({net_.bias_ih[c], H_, T(1), 0});
        tensors_.push_back({net_.bias_hh[c], H_, T(1), 0});
      }
    }
    if (net_.head_weight) tensors_.push_back({net_.head_weight, net_.outputs * D_ * H_, T(1), 0});
    if (net_.head_bias) tensors_.push_back({net_.head_bias, net_.outputs, T(1), 0});
    if (net_.embedding) tensors_.push_back({net_.embedding, net_.vocabulary * net_.input, T(1), 0});
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
    if (!scan_all(team)) return;
    first_sums(team);
    const Team alone{};
    if (shared_) {
      if (L_ == 1 && backward_) {
        for (int64_t c = 0; c < D_; ++c) {
          set_start(c, team);
          run_shared<true, true>(h_chain(c), d_chain(c), hh(c), team);
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
    lost_[team.rank] = FlushDenormals::lost();
    team.wait();
    results(team);
  }

  bool scan_all(const Team& team) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      int64_t first, last;
      team.share(tensors_[i].size, first, last);
      scans_[i * team.size + team.rank] = scan(tensors_[i].data + first, last - first);
    }
    team.wait();
    if (team.rank == 0) {
      for (size_t i = 0; i < tensors_.size(); ++i) {
        T most = 0;
        for (int64_t r = 0; r < team.size; ++r) {
          const T part = scans_[i * team.size + r];
          most = part > most || part != part ? part : most;
          if (most != most) break;
        }
        if (most != most) {
          bad_ = static_cast<int64_t>(i);
          break;
        }
        normalise(most, tensors_[i].scale, tensors_[i].exponent);
      }
    }
    team.wait();
    return bad_ < 0;
  }

  // Squared column sums of one matrix [rows, columns] over the team, in equal parts; all of them see the results in
  // rank 0's vectors.
  void column_sums(const Tensor& w, int64_t rows, int64_t columns, std::vector<Scaled<T>>& parts, const Team& team) {
    int64_t first, last;
    team.share(rows, first, last);
    const int64_t stride = padded<T>(columns);
    square_columns(w.data, columns, w.scale, first, last, partial_.data() + team.rank * stride);
    team.wait();
    if (team.rank == 0) {
      std::vector<double> sums(columns, 0.0);
      for (int64_t r = 0; r < team.size; ++r) {
        for (int64_t k = 0; k < columns; ++k) sums[k] += partial_[r * stride + k];
      }
      const int64_t part = columns / static_cast<int64_t>(parts.size());
      auto from = sums.begin();
      for (Scaled<T>& out : parts) {
        out.set(std::vector<double>(from, from + part), w.exponent);
        from += part;
      }
    }
    team.wait();
  }

  // The vectors at both ends: the head's column sums, the input, the first layer's drive, the biases.
  void first_sums(const Team& team) {
    if (net_.head_weight) {
      column_sums(head(), net_.outputs, D_ * H_, head_, team);
    } else if (team.rank == 0) {
      for (Scaled<T>& ones : head_) ones.set(std::vector<double>(H_, 1.0), 0);
    }
    if (net_.embedding) {
      column_sums(embedding(), net_.vocabulary, net_.input, input_, team);
    } else if (team.rank == 0) {
      input_[0].set(std::vector<double>(net_.input, 1.0), 0);
    }
    team.wait();
    int64_t first, last;
    team.share(H_, first, last);
    for (int64_t c = 0; c < D_; ++c) {
      const Tensor& w = ih(c);
      for (int64_t j = first; j < last; ++j) drive_sums_[c * H_ + j] = row_sum(w.data + j * net_.input, w.scale);
    }
    team.wait();
    if (team.rank != 0) {
      team.wait();
      return;
    }
    for (int64_t c = 0; c < C_ && !net_.bias_ih.empty(); ++c) {
      const Tensor &b1 = bias(c, 0), &b2 = bias(c, 1);
      const int64_t top = std::max(b1.exponent, b2.exponent);
      std::vector<double> sums(H_);
      for (int64_t j = 0; j < H_; ++j) {
        const double s1 = b1.data[j] * b1.scale, s2 = b2.data[j] * b2.scale;
        sums[j] = scaled(s1 * s1, b1.exponent - top) + scaled(s2 * s2, b2.exponent - top);
      }
      bias_[c].set(sums, top);
    }
    for (int64_t c = 0; c < D_; ++c) {
      const int64_t from = input_[0].exponent + ih(c).exponent;
      const int64_t top = std::max(from, bias_[c].exponent);
      std::vector<double> sums(H_);
      for (int64_t j = 0; j < H_; ++j) {
        sums[j] = scaled(drive_sums_[c * H_ + j], from - top) + scaled(bias_[c].data[j], bias_[c].exponent - top);
      }
      first_drive_[c].set(sums, top);
      if (backward_) {
        for (int64_t t = net_.last_only ? T_ - 1 : 0; t < T_; ++t) top_exponent_[c * T_ + t] = head_[c].exponent;
      }
    }
    std::fill(start_.begin(), start_.end(), T(0));
    std::fill(zeros_.begin(), zeros_.end(), T(0));
    if (net_.ones_h0) std::fill(start_.begin(), start_.begin() + H_, std::ldexp(T(1), static_cast<int>(kCentre<T>)));
    team.wait();
  }

  static double scaled(double x, int64_t exponent) {
    return exponent < -2000 ? 0.0 : std::ldexp(x, static_cast<int>(exponent));
  }

  // Σ_k (w[k] · scale)² · input[k].
  T row_sum(const T* w, T scale) const {
    constexpr int64_t width = Simd<T>::width;
    Vec<T> acc{};
    for (int64_t k = 0; k < net_.input; k += width) {
      const Vec<T> v = load(w + k, net_.input - k) * scale;
      acc += v * v * load(input_[0].data.data() + k);
    }
    return lane_sum<T>(acc);
  }

  void set_start(int64_t c, const Team& team) {
    if (team.rank == 0) {
      const Rows<T> rows = h(c);
      std::copy(start_.begin(), start_.end(), rows[0]);
      rows.exponent[0] = net_.ones_h0 ? -kCentre<T> : kZeroExponent;
      rows.largest[0] = net_.ones_h0 ? kCentre<T> : kZeroExponent;
    }
    team.wait();
  }

  Chain<T> h_chain(int64_t c) {
    const Drive<T> drive = c < D_ ? Drive<T>{first_drive_[c].data.data(), &first_drive_[c].exponent, 0, 0, 0}
                                  : Drive<T>{h_drive_, h_drive_exponent_.data(), ld_, 1, h_constant_};
    return {h(c), 1, 1, h(c)[0], net_.ones_h0 ? -kCentre<T> : kZeroExponent, drive, c + D_ < C_,
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
      run_chain<true>(h_chain(c), hh(c), 1, H_, packed_h_, team);
    }
  }
  void backward(int64_t i, const Team& team) {
    for (int64_t c = i * D_; c < (i + 1) * D_; ++c) {
      if (i < L_ - 1) {
        drive_d(c, team);
        team.wait();
      }
      run_chain<false>(d_chain(c), hh(c), H_, 1, packed_d_, team);
    }
  }

  void drive_h(int64_t c, const Team& team) {
    T* const drive = h_drive_ + ld_;
    int64_t* const exponent = h_drive_exponent_.data() + 1;
    const auto mix_up = [&](int64_t below, T* out, int64_t* out_exponent) {
      mix(h_after_first(below), ih(c), column(below), 1, D_ * H_, mixed_h_, out, out_exponent, team);
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
      mix(d(above), ih(above), column(c), D_ * H_, 1, mixed_d_, out, exponent, team);
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
    const Team alone{};
    const Chain<T> h = h_chain(c), d = d_chain(c);
    const Packed<T> w_h{packed_h_.data(), H_, H_, kVectorRow * Simd<T>::width}, w_d{packed_d_.data(), H_, H_, w_h.panel};
    const Tensor& w = hh(c);
    int64_t done_h = 0, done_d = 0;
    if (team.rank == 0) {
      set_start(c, alone);
      pack(w_h, w.data, 1, H_, alone, square(w.scale));
      rests_[0] = begin_chain(h, w_h, w.exponent, done_h, T_);
    }
    if (team.rank == team.size - 1) {
      pack(w_d, w.data, H_, 1, alone, square(w.scale));
      rests_[1] = begin_chain(d, w_d, w.exponent, done_d, T_);
    }
    team.wait();
    const int64_t log2 = block_log2(rests_[0], rests_[1], team.size);
    if (log2 > 0) {
      if (team.rank == 0) blocks_.emplace(T_, H_, log2, team.size);
      team.wait();
      const bool fine = blocks_->run(
          h, d, w_h, w_d, w.exponent, net_.last_only, net_.kappa_hh[c],
          net_.exponents + c * (net_.bias_ih.empty() ? 2 : 3) + 1,
          {h_sum(c), d_sum(c), &h_sum_exponent_[c], &d_sum_exponent_[c]}, team);
      team.wait();
      if (team.rank == 0) summed_[c] = fine;
      if (fine) return team.wait();
    }
    if (team.rank == 0 && rests_[0] > 0) end_chain(h, w_h, w.exponent, done_h, T_);
    if (team.rank == team.size - 1 && rests_[1] > 0) end_chain(d, w_d, w.exponent, done_d, T_);
    team.wait();
  }

  // The best number of steps in a block, its logarithm; 0 if chains that may rest after those steps do as well without.
  int64_t block_log2(int64_t h_rests, int64_t d_rests, int threads) const {
    constexpr double kOverhead = 5e5;
    const double H = static_cast<double>(H_);
    const double steps = static_cast<double>(threads > 1 ? std::max(h_rests, d_rests) : h_rests + d_rests);
    double least = H * H * (ChainBlocks<T>::kVector * steps + static_cast<double>(T_) / threads) - kOverhead;
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
  void run_chain(const Chain<T>& c, const Tensor& w, int64_t row, int64_t column, Buffer<T>& packed,
                 const Team& team) {
    if (shared_) return run_shared<Forward, !Forward>(c, c, w, team);
    const Packed<T> p{packed.data(), H_, H_, kVectorRow * Simd<T>::width};
    pack(p, w.data, row, column, team, square(w.scale));
    chain(c, p, w.exponent, T_);
  }

  template <bool Forward, bool Backward>
  void run_shared(const Chain<T>& h, const Chain<T>& d, const Tensor& w, const Team& team) {
    bool forward = Forward, backward = Backward;
    int64_t from = 0;
    if (closes_ && (!Forward || closable(h)) && (!Backward || closable(d))) {
      from = close_shared(h, d, w.data, w.scale, w.exponent, H_, T_, forward, backward, wide_scratch_, team);
    }
    const auto go = [&](auto f, auto b) {
      chains_shared<T, f.value, b.value>(h, d, w.data, w.scale, w.exponent, H_, from, T_, scratch_, team);
    };
    if (forward && backward) go(std::true_type{}, std::true_type{});
    else if (forward) go(std::true_type{}, std::false_type{});
    else if (backward) go(std::false_type{}, std::true_type{});
  }
  static bool closable(const Chain<T>& c) { return !c.fill && c.from_nothing(); }

  static auto square(T scale) {
    return [scale](T v) {
      v *= scale;
      return v * v;
    };
  }

  // The drive that one layer gives the next: rows · W̃, W̃(k, n) = weight[start + k * row + n * column] squared.
  void mix(const Rows<T>& rows, const Tensor& w, int64_t start, int64_t row, int64_t column, Buffer<T>& packed,
           T* out, int64_t* exponent, const Team& team) {
    const Packed<T> p{packed.data(), H_, H_, kPanel<T>};
    pack(p, w.data + start, row, column, team, square(w.scale));
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
        sum_rows(h_after_first(C_ - D_ + e), net_.last_only ? T_ - 1 : 0, T_, h_sum(e), h_sum_exponent_[e]);
      }
    }
    for (int64_t c = 0; wanted && c < C_; ++c) {
      if (team.rank == c % team.size && !summed_[c]) sum_rows(d(c), 0, T_, d_sum(c), d_sum_exponent_[c]);
    }
    team.wait();
    if (team.rank == 0) *net_.log_path_norm = log_path_norm();
    if (wanted) kappas(team);
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
        if (team.rank == 0) *exponent = copy_result(d_sum(c), d_sum_exponent_[c], H_, net_.kappa_bias[c]);
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
    const Rows<T> own = h_after_first(same), other = turned(h_after_first(opposite(same)), team);
    const int64_t own_largest = largest_pair(d(c), own, T_), other_largest = largest_pair(d(c), other, T_);
    note_gap(own_largest, other_largest, team);
    outer(d(c), own, out + column(same), D_ * H_, other_largest, exponent, team);
    outer(d(c), other, out + column(opposite(same)), D_ * H_, own_largest, exponent, team);
  }

  // T rows in the time of the other direction. The next call overwrites them.
  Rows<T> turned(const Rows<T>& rows, const Team& team) {
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

  // Of two parts with one exponent, the smaller keeps half of the dtype's range for its entries, or they may be lost.
  void note_gap(int64_t a, int64_t b, const Team& team) {
    if (std::min(a, b) == kZeroExponent) return;
    if (std::abs(a - b) > -std::numeric_limits<T>::min_exponent / 2) lost_[team.rank] = 1;
  }

  // Σ_t h_t of the top layer, both directions on one exponent.
  int64_t head_kappa() {
    std::vector<int64_t> largest;
    for (int64_t e = 0; e < D_; ++e) {
      const int64_t m = magnitude(*std::max_element(h_sum(e), h_sum(e) + H_));
      largest.push_back(m == kZeroExponent ? m : m + h_sum_exponent_[e]);
    }
    const int64_t top = *std::max_element(largest.begin(), largest.end());
    const int64_t result = top == kZeroExponent ? 0 : natural_exponent(top);
    if (D_ > 1) note_gap(largest[0], largest[1], Team{});
    for (int64_t e = 0; e < D_; ++e) {
      // In two halves: the scale may be out of range where the entries are not.
      const int64_t shift = h_sum_exponent_[e] - result;
      const T s1 = power_of_two<T>(shift / 2), s2 = power_of_two<T>(shift - shift / 2);
      std::transform(h_sum(e), h_sum(e) + H_, net_.kappa_head + e * H_, [=](T v) { return v * s1 * s2; });
    }
    return result;
  }

  void second_term(int64_t c, int64_t* exponent, const Team& team) {
    team.wait();  // κ⁽¹⁾ is there
    int64_t first, last;
    team.share(H_, first, last);
    const Tensor& w = hh(c);
    const Scaled<T>* const drive = c < D_ ? &first_drive_[c] : nullptr;
    // The other direction drives the lower layers' δ more and more.
    const bool monotone = !net_.last_only && (D_ == 1 || c + D_ >= C_);
    second_->run({w.data, w.scale, w.exponent, h(c), d(c), drive ? drive->data.data() : nullptr,
                  drive ? drive->exponent : kZeroExponent, net_.kappa_hh[c], exponent, monotone, net_.second_factor,
                  net_.rtol, net_.first_lags.empty() ? 0 : net_.first_lags[c], net_.lags + c, net_.bounds + c,
                  left_ + PairSum<T>::left_size(T_, first), right_ + team.rank * PairSum<T>::right_size(ld_)},
                 team);
  }

  void outer(const Rows<T>& d, const Rows<T>& h, T* out, int64_t row, int64_t beside, int64_t& exponent,
             const Team& team) {
    int64_t first, last;
    team.share(H_, first, last);
    outer_sum(d, h, T_, H_, H_, out, row, beside, exponent, left_ + PairSum<T>::left_size(T_, first),
              right_ + team.rank * PairSum<T>::right_size(ld_), team);
  }

  // The input is the same at every step: κ⁽¹⁾ = (Σ_t δ_t) · inputᵀ, equal columns for an input of ones.
  int64_t first_kappa(const T* d_sum, int64_t exponent, T* out) const {
    if (!net_.embedding) return copy_result(d_sum, exponent, H_, out);
    const Scaled<T>& input = input_[0];
    const T* x = input.data.data();
    const int64_t md = magnitude(*std::max_element(d_sum, d_sum + H_));
    const int64_t mx = magnitude(*std::max_element(x, x + net_.input));
    if (md == kZeroExponent || mx == kZeroExponent) {
      std::fill(out, out + H_ * net_.input, T(0));
      return 0;
    }
    const int64_t result = natural_exponent(md + exponent + mx + input.exponent);
    // Each factor is brought near one first, and the product to its place.
    const T s1 = std::ldexp(T(1), static_cast<int>(-md)), s2 = std::ldexp(T(1), static_cast<int>(-mx));
    const T s = std::ldexp(T(1), static_cast<int>(md + exponent + mx + input.exponent - result));
    for (int64_t j = 0; j < H_; ++j) {
      for (int64_t k = 0; k < net_.input; ++k) out[j * net_.input + k] = (d_sum[j] * s1 * s) * (x[k] * s2);
    }
    return result;
  }

  int64_t embedding_kappa() {
    int64_t from = kZeroExponent;
    for (int64_t c = 0; c < D_; ++c) from = std::max(from, d_sum_exponent_[c] + ih(c).exponent);
    std::vector<double> sums(net_.input, 0.0);
    for (int64_t c = 0; c < D_; ++c) {
      const Tensor& w = ih(c);
      const double scale = scaled(1.0, d_sum_exponent_[c] + w.exponent - from);
      for (int64_t j = 0; j < H_; ++j) {
        const double dj = scale * d_sum(c)[j];
        for (int64_t k = 0; k < net_.input; ++k) {
          const double v = static_cast<double>(w.data[j * net_.input + k] * w.scale);
          sums[k] += v * v * dj;
        }
      }
    }
    const int64_t m = magnitude(*std::max_element(sums.begin(), sums.end()));
    const int64_t result = m == kZeroExponent ? 0 : natural_exponent(m + from);
    for (int64_t k = 0; k < net_.input; ++k) net_.kappa_embedding[k] = static_cast<T>(scaled(sums[k], from - result));
    return result;
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
      for (int64_t o = 0; o < net_.outputs; ++o) {
        const double v = static_cast<double>(b.data[o] * b.scale);
        sum += v * v;
      }
      if (sum > 0) add(std::log(sum * static_cast<double>(output_steps())) + b.exponent * kLn2);
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
  std::vector<T> scans_;
  std::vector<int> lost_;  // by thread
  std::vector<Scaled<T>> head_, input_, first_drive_;  // by direction; of the input one
  Buffer<T> start_, zeros_;
  std::vector<Scaled<T>> bias_;
  Buffer<T> packed_h_, packed_d_, mixed_h_, mixed_d_, scratch_, partial_, d_sum_, h_sum_, coefficients_;
  Buffer<double> wide_scratch_;
  std::vector<T> drive_sums_;
  Workspace<T> memory_;
  std::optional<Kappa2Run<T>> second_;
  std::optional<ChainBlocks<T>> blocks_;
  std::vector<char> summed_;     // per chain: whether κ and the sums are there already
  std::array<int64_t, 2> rests_;  // of h and δ, as begin_chain tells
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

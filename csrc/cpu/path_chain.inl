// path_chain: canonical coordinates, the vectors at both ends, the chains, κ; one team of threads runs it all.

template <typename T>
class PathChainRun {
 public:
  // Of `shared` chains: from this size on a thread's cache no longer holds W̃, and both share one read of it.
  static constexpr int64_t kSharedHidden = 512;

  PathChainRun(const PathChain<T>& net, int threads, bool copies)
      : net_(net), threads_(threads), canonical_(n_, threads, copies), boundary_(n_, canonical_, threads),
        results_(n_, canonical_, boundary_, h_, d_, drives_, threads), underflowed_(threads, 0), finite_(threads, 1) {
    if (net.second_factor > 0) second_.emplace(T_, H_, net.workspace_bytes, threads);
  }

  // The index of the first tensor that is not finite, in the order of Network::tensors, or -1.
  int64_t run() {
    // Denormal weights are kept, so that they are noticed.
    run_team(threads_, [this](const Team& team) { run(team); }, false);
    const auto any = [](const std::vector<int>& v, int of) { return std::find(v.begin(), v.end(), of) != v.end(); };
    *net_.underflowed = any(underflowed_, 1) || (second_ && second_->underflowed());
    return any(finite_, 0) ? n_.first_not_finite() : -1;
  }

 private:
  // From so many entries on W̃ is read once for both chains, the first-level cache not holding it.
  static constexpr int64_t kFirstLevel = (int64_t{1} << 15) / static_cast<int64_t>(sizeof(T));
  // From this size on every step reads W from beyond the second-level caches: it is worth less steps of dearer
  // arithmetic. Below, a chain that converges has mostly done so as soon; but with the second term, a closed form saves
  // every lag's sum over time, too.
  static constexpr int64_t kCloseHidden = 1024;

  void run(const Team& team) {
    const Team alone{};
    bool finite = true, underflowed = false;
    // Of a small network one thread is done before another has heard of it.
    if (shared_) canonical_.find_units(team);
    else if (team.rank == 0) canonical_.find_units(alone);
    team.wait();
    canonical_.rescale(team, finite, underflowed);
    finite_[team.rank] = n_.all_finite(team) && finite;
    team.wait();
    if (std::find(finite_.begin(), finite_.begin() + team.size, 0) != finite_.begin() + team.size) return;
    underflowed |= !boundary_.find(team);
    if (team.rank == 0) drives_.set_outputs();
    team.wait();
    // Nothing has been lost so far but what is negligible beside a term of the same sum; or `underflowed` says so.
    FlushDenormals::forget();
    const int64_t C = n_.C, D = n_.D;
    if (C == D && n_.wanted() && (shared_ || !second_)) {
      for (int64_t c = 0; c < C; ++c) underflowed |= only_layer(c, team);
    } else {
      // The network is linear, so that neither h nor δ waits for the other.
      const Team& own = shared_ ? team : alone;
      for (int64_t c = 0; (shared_ || team.rank == 0) && c < C; ++c) {
        run_chain<true>(h_chain(c, own), canonical_.hh[c], packed_h_, own);
      }
      for (int64_t c = C - D; n_.wanted() && (shared_ || team.rank == team.size - 1) && c >= 0; c -= D) {
        for (int64_t e = 0; e < D; ++e) run_chain<false>(d_chain(c + e, own), canonical_.hh[c + e], packed_d_, own);
      }
    }
    underflowed |= FlushDenormals::underflowed();
    team.wait();
    underflowed |= !results_.sum(team);
    if (team.rank == 0 && net_.ways) say_ways();
    const auto second = [&](int64_t c, int64_t* exponent) {
      if (second_) add_second_term(c, exponent, team);
    };
    if (n_.wanted()) underflowed |= !results_.kappas(team, second);
    underflowed_[team.rank] = underflowed;
  }

  Chain<T> h_chain(int64_t c, const Team& team) {
    const Rows<T> rows = h_[c];
    const Scaled<T>& start = boundary_.start[c];
    if (team.rank == 0) {
      std::copy(start.data.begin(), start.data.end(), rows[0]);
      rows.exponent[0] = start.exponent;
      rows.largest[0] = net_.ones_h0 ? kCentre<T> : kZeroExponent;
    }
    team.wait();
    return {rows, 1, 1, rows[0], start.exponent, drives_.of_h(c, team), !n_.top(c),
            {coefficients(4 * c), coefficients(4 * c + 1)}};
  }
  Chain<T> d_chain(int64_t c, const Team& team) {
    return {d_[c], T_ - 1, -1, zeros_.data(), kZeroExponent, drives_.of_d(c, team), !n_.lowest(c),
            {coefficients(4 * c + 2), coefficients(4 * c + 3)}};
  }
  T* coefficients(int64_t i) { return coefficients_.data() + i * (T_ + 1); }

  Packed<T> packed(Buffer<T>& memory) const { return {memory.data(), H_, H_, kVectorRow * Simd<T>::width}; }
  // W̃, or its transpose.
  template <bool Forward>
  void pack_weight(const Packed<T>& to, const Weights<T>& w, const Team& team) const {
    pack(to, w.data, Forward ? 1 : H_, Forward ? H_ : 1, team, square<Forward>(w, 0));
  }

  // W̃ for walk_both.
  Buffer<T> interleave(const Weights<T>& w) const {
    Buffer<T> result((H_ + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce * ld_);
    T* out = result.data();
    for (int64_t j = 0; j < H_; j += kRowsAtOnce) {
      for (int64_t k = 0; k < ld_; k += Simd<T>::width) {
        for (int64_t r = j; r < j + kRowsAtOnce; ++r, out += Simd<T>::width) {
          const Vec<T> v = r < H_ ? load(w.data + r * H_ + k, H_ - k) * load(w.column + k) * w.row[r] : Vec<T>{};
          store(out, v * v);
        }
      }
    }
    return result;
  }

  // begin_chain, by one thread.
  template <bool Forward>
  int64_t begin_packed(const Chain<T>& c, const Packed<T>& to, const Weights<T>& w, int64_t& done) const {
    pack_weight<Forward>(to, w, Team{});
    return begin_chain(c, to, w.exponent, done, T_);
  }

  template <bool Forward>
  void run_chain(const Chain<T>& c, const Weights<T>& w, Buffer<T>& memory, const Team& team) {
    if (shared_) return run_shared<Forward, !Forward>(c, c, w, team);
    const Packed<T> p = packed(memory);
    pack_weight<Forward>(p, w, team);
    chain(c, p, w.exponent, T_);
  }

  template <bool Forward, bool Backward>
  void run_shared(const Chain<T>& h, const Chain<T>& d, const Weights<T>& w, const Team& team) {
    const auto closable = [](const Chain<T>& c) { return !c.fill && c.from_nothing(); };
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

  // Both chains of one layer whose rows nobody else asks for: once it is seen that they neither converge nor have a closed
  // form, in blocks, if those take less time. Returns whether anything underflowed.
  bool only_layer(int64_t c, const Team& team) {
    const bool first = team.rank == 0, last = team.rank == team.size - 1;
    const Chain<T> h = h_chain(c, team), d = d_chain(c, team);
    const Weights<T>& w = canonical_.hh[c];
    if (shared_) {
      run_shared<true, true>(h, d, w, team);
      return false;
    }
    const Packed<T> w_h = packed(packed_h_), w_d = packed(packed_d_);
    int64_t done_h = 0, done_d = 0;
    bool h_ended = false, d_ended = false;
    if (team.size == 1 && H_ * ld_ > kFirstLevel) {
      const Buffer<T> both = interleave(w);
      done_h = done_d = walk_both(h, d, both.data(), H_, w.exponent, std::min(kFirstLook, T_), T_, h_ended, d_ended);
      h_ended |= done_h == T_;
      d_ended |= done_d == T_;
    }
    if (first) {
      converges_[0] = h_ended ? 0 : begin_packed<true>(h, w_h, w, done_h);
      flushed_[0] = FlushDenormals::underflowed();
    }
    if (last) {
      converges_[1] = d_ended ? 0 : begin_packed<false>(d, w_d, w, done_d);
      flushed_[1] = FlushDenormals::underflowed();
    }
    team.wait();
    bool stepped = true;
    // Blocks take the squares as they are: where some of these may have underflowed, it is for the steps to say so.
    const int64_t log2 = flushed_[0] || flushed_[1] ? 0 : block_log2(converges_[0], converges_[1], team.size);
    if (log2 > 0) {
      // Not packed yet for chains that had ended before.
      if (h_ended) pack_weight<true>(w_h, w, team);
      if (d_ended) pack_weight<false>(w_d, w, team);
      if (first) blocks_.emplace(T_, H_, log2, team.size);
      team.wait();
      int64_t* const exponent = net_.exponents + c * (n_.biases ? 3 : 2) + 1;
      stepped = !blocks_->run(h, d, w_h, w_d, w.exponent, net_.last_only, net_.kappa_hh[c], exponent, results_.sums(c), team);
      FlushDenormals::forget();
    }
    if (first) results_.summed[c] = !stepped;
    if (stepped && first && converges_[0] > 0) walk(h, w_h, w.exponent, done_h, T_, T_);
    if (stepped && last && converges_[1] > 0) walk(d, w_d, w.exponent, done_d, T_, T_);
    const bool underflowed = FlushDenormals::underflowed();
    FlushDenormals::forget();
    team.wait();
    return underflowed;
  }

  // The best number of steps in a block, its logarithm; 0 if chains that may converge after those steps do as well without:
  // after none, if they have ended.
  int64_t block_log2(int64_t h_steps, int64_t d_steps, int threads) const {
    // Barriers and the steps already done, and what the model leaves out.
    constexpr double kOverhead = 5e5, kWorth = 0.75;
    const double H = static_cast<double>(H_);
    const double steps = static_cast<double>(threads > 1 ? std::max(h_steps, d_steps) : h_steps + d_steps);
    // Of a chain that has ended there are few vectors to be summed.
    const double pairs = h_steps > 0 && d_steps > 0 ? static_cast<double>(T_) / threads : 0;
    double least = kWorth * H * H * (ChainBlocks<T>::kVector * steps + pairs) - kOverhead;
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

  void say_ways() {
    int64_t* out = net_.ways;
    for (auto* chains : {&h_, &d_}) {
      for (int64_t c = 0; c < n_.C; ++c) {
        const Closed<T>& closed = *(*chains)[c].closed_form;
        const int64_t stepped = T_ - (closed.last - closed.first);
        const bool summed = results_.summed[c];
        *out++ = summed ? kBlocks : stepped == T_ ? kSteps : closed.count == 1 ? kConverged : kClosedForm;
        *out++ = summed ? blocks_->steps() : stepped;
      }
    }
  }

  void add_second_term(int64_t c, int64_t* exponent, const Team& team) {
    team.wait();  // κ⁽¹⁾ is there
    const Scaled<T>* const drive = n_.lowest(c) ? &boundary_.first_drive[c] : nullptr;
    // The other direction drives the lower layers' δ more and more.
    const bool monotone = !net_.last_only && (n_.D == 1 || n_.top(c));
    second_->run({T_, H_, canonical_.hh[c], h_[c], d_[c], drive ? drive->data.data() : nullptr,
                  drive ? drive->exponent : kZeroExponent, net_.kappa_hh[c], exponent, monotone, net_.second_factor,
                  net_.rtol, net_.first_lags.empty() ? 0 : net_.first_lags[c], net_.lags + c, net_.bounds + c,
                  results_.left(team), results_.right(team)},
                 team);
  }

  const PathChain<T>& net_;
  const int threads_;
  const Network<T> n_{net_};
  const int64_t T_ = n_.T_, H_ = n_.H, ld_ = padded<T>(H_);
  const bool shared_ = H_ >= kSharedHidden, closes_ = H_ >= (net_.second_factor > 0 ? kSharedHidden : kCloseHidden);
  Canonical<T> canonical_;
  Boundary<T> boundary_;
  // h_0 … h_T and δ_1 … δ_T (at rows 0 … T-1) of every chain, in its own time.
  Workspace<T> memory_{n_.C * (2 * T_ + 1) * ld_};
  Sequences<T> h_{n_.C, T_ + 1, ld_, memory_.take(n_.C * (T_ + 1) * ld_)};
  Sequences<T> d_{n_.C, T_, ld_, memory_.take(n_.C * T_ * ld_)};
  Drives<T> drives_{n_, canonical_, boundary_, h_, d_};
  PathChainResults<T> results_;
  Buffer<T> zeros_ = Buffer<T>(ld_, T(0)), coefficients_ = Buffer<T>(4 * n_.C * (T_ + 1));
  Buffer<T> packed_h_ = Buffer<T>(shared_ ? 0 : Packed<T>::size(H_, H_)), packed_d_ = Buffer<T>(packed_h_.size());
  Buffer<T> scratch_ = Buffer<T>(shared_ ? SharedRows<T>::size(ld_, threads_, 4) : 0);
  Buffer<double> wide_scratch_ = Buffer<double>(closes_ ? SharedRows<double>::size(ld_, threads_, 6) : 0);
  std::optional<Kappa2Run<T>> second_;
  std::optional<ChainBlocks<T>> blocks_;
  std::array<int64_t, 2> converges_;  // of h and δ, as begin_chain tells
  std::array<bool, 2> flushed_;       // whether anything underflowed up to there
  std::vector<int> underflowed_, finite_;    // by thread
};

template <typename T>
int64_t path_chain(const PathChain<T>& net, int threads) {
  const int64_t bad = PathChainRun<T>(net, threads, false).run();
  // Shared chains apply the factors of rows to sums, before which more underflows than in canonical coordinates. Those
  // decide, so that a network rescaled by powers of two is computed in the same dtype.
  if (bad >= 0 || !*net.underflowed || net.hidden < PathChainRun<T>::kSharedHidden) return bad;
  return PathChainRun<T>(net, threads, true).run();
}

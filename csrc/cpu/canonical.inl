// Canonical coordinates: every unit's even exponent d, and the weights times 2^((d_source - d_target) / 2).

// A matrix of weights there: its squares are (data[j, k] · column[k] · row[j])² · 2^exponent, none above 4 · 2^exponent. No
// factor of a row is below 1, so that what underflows there does so before `row` is applied, too.
template <typename T>
struct Weights {
  const T* data;
  const T *row, *column;  // padded, powers of two or 0
  int64_t exponent;
};

// out[j] = max(out[j], max_k 2 e(w[j, k]) + add[k]), e(w) = floor(log2 |w|): the exponent of Σ_k w² 2^add, as sums go
// where only the largest counts. `add` is padded.
template <typename T>
void row_exponents(const Block<T>& w, const Int<T>* add, int64_t* out) {
  for (int64_t j = w.first; j < w.last; ++j) {
    if (w.columns < Simd<T>::width) {
      for (int64_t k = 0; k < w.columns; ++k) {
        out[j] = std::max<int64_t>(out[j], 2 * exponent_of(w.data[j * w.columns + k]) + add[k]);
      }
      continue;
    }
    Ints<T> most = Ints<T>{} + Int<T>(2 * kNone);
    w.row(j, [&](int64_t k, const Vec<T>& v) { most = maximum(most, 2 * exponents_of<T>(v) + load(add + k)); });
    out[j] = std::max<int64_t>(out[j], largest_lane(most));
  }
}
// out[k] = max(out[k], max_j 2 e(w[j, k]) + add[j]); `add` may be null, zeros; `out` is padded.
template <typename T>
void column_exponents(const Block<T>& w, const int64_t* add, Int<T>* out) {
  for (int64_t j = w.first; j < w.last; ++j) {
    const Int<T> own = static_cast<Int<T>>(add ? add[j] : 0);
    w.row(j, [&](int64_t k, const Vec<T>& v) { store(out + k, maximum(load(out + k), 2 * exponents_of<T>(v) + own)); });
  }
}

template <typename T>
class Canonical {
  const Network<T>& n_;

 public:
  std::vector<Weights<T>> hh{static_cast<size_t>(n_.C)}, ih = hh;  // by chains
  // Of the sums over an embedding's and the head's columns, and of the first layer's drives.
  Buffer<Int<T>> input_exponent = zeros(n_.net.input), head_exponent = zeros(n_.D * n_.H);
  std::vector<int64_t> drive_exponent = std::vector<int64_t>(n_.D * n_.H, 2 * kNone);

  // `copies`: always copies, never factors.
  Canonical(const Network<T>& of, int threads, bool copies) : n_(of), copies_always_(copies), extents_(threads) {
    factors_.reserve(4 * n_.C);
    copies_.reserve(2 * n_.C);
    partial_.resize(threads * padded<T>(std::max(n_.D * n_.H, n_.net.input)));
  }

  int64_t* unit(int64_t c) const { return n_.net.unit_exponents + c * n_.H; }

  void find_units(const Team& team) {
    find_reach(team);
    find_read(team);
    for (int64_t c = 0; team.rank == 0 && c < n_.C; ++c) {
      // Where one is missing, it is set so that the unit is like the one that counts most.
      int64_t most = 2 * kNone;
      for (int64_t j = 0; j < n_.H; ++j) most = std::max(most, reach(c)[j] + read(c)[j]);
      most = is_none(most) ? 0 : most;
      for (int64_t j = 0; j < n_.H; ++j) {
        int64_t in = reach(c)[j], out = read(c)[j];
        if (dead(c, j)) in = out = 0;
        if (is_none(in)) in = most - out;
        if (is_none(out)) out = most - in;
        unit(c)[j] = ((in - out) >> 2) * 2;
      }
    }
  }

  // The weights between units. Says of this thread's rows whether they are finite, and whether anything underflowed.
  void rescale(const Team& team, bool& finite, bool& underflowed) {
    for (int64_t c = 0; c < n_.C; ++c) {
      rescale(n_.hh(c), c, c, 1, hh[c], team, finite, underflowed);
      if (!n_.lowest(c)) rescale(n_.ih(c), c, n_.layer_below(c), n_.D, ih[c], team, finite, underflowed);
    }
  }

 private:
  static constexpr Int<T> kMantissa = std::numeric_limits<T>::digits - 1;
  // Of the factors of rows, and of columns: above, sums before `row` is applied might underflow where they need not.
  static constexpr int64_t kSpread = 16;
  static constexpr int64_t kLeast = std::numeric_limits<T>::min_exponent - 1, kMost = std::numeric_limits<T>::max_exponent - 1;

  // Per chain, of every unit: the exponents of what drives it first (reach_) and of what reads it first (read_), a sum
  // counting as its largest term; from them its unit exponent, about half the difference. All are even.
  int64_t* reach(int64_t c) { return reach_.data() + c * n_.H; }
  int64_t* read(int64_t c) { return read_.data() + c * n_.H; }
  bool dead(int64_t c, int64_t j) { return is_none(reach(c)[j]) && is_none(read(c)[j]); }
  int64_t row(int64_t c, int64_t j) { return dead(c, j) ? kNone : -unit(c)[j] / 2; }

  void find_reach(const Team& team) {
    const int64_t H = n_.H, D = n_.D;
    int64_t first, last;
    team.share(H, first, last);
    if (n_.net.embedding) columns_over(n_.embedding(), nullptr, input_exponent, team);
    for (int64_t c = 0; c < n_.C; ++c) {
      if (!n_.lowest(c) && c % D == 0) {
        if (team.rank == 0) std::copy(reach(c - D), reach(c), side_.begin());
        team.wait();
      }
      int64_t* const out = reach(c);
      std::fill(out + first, out + last, n_.net.ones_h0 ? 0 : 2 * kNone);
      const Block<T> w = n_.ih(c).block(team);
      if (n_.lowest(c)) row_exponents(w, input_exponent.data(), drive_exponent.data() + c * H);
      else row_exponents(w, side_.data(), out);
      for (int64_t j = first; j < last; ++j) {
        if (n_.lowest(c)) out[j] = std::max(out[j], drive_exponent[c * H + j]);
        for (int64_t b = 0; b < n_.biases; ++b) out[j] = std::max(out[j], 2 * exponent_of(n_.bias(c, b).data[j]));
      }
      team.wait();
      if (team.rank == 0) spread(n_.hh(c).data, 1, H, out);
      team.wait();
    }
  }

  void find_read(const Team& team) {
    const int64_t H = n_.H, D = n_.D;
    for (int64_t top = n_.C - D; top >= 0; top -= D) {  // the first chain of a layer
      const bool last = n_.top(top);
      if (last && n_.net.head_weight) columns_over(n_.head(), nullptr, head_exponent, team);
      for (int64_t c = top + D; !last && c < top + 2 * D; ++c) columns_over(n_.ih(c), read(c), side_, team, c % D == 0);
      const Buffer<Int<T>>& from = last ? head_exponent : side_;
      for (int64_t c = top; team.rank == 0 && c < top + D; ++c) {
        std::copy(from.begin() + n_.column(c), from.begin() + n_.column(c) + H, read(c));
        spread(n_.hh(c).data, H, 1, read(c));
      }
      team.wait();
    }
  }

  // column_exponents over the team; `fresh`: not beside what `out` holds.
  void columns_over(const Matrix<T>& w, const int64_t* add, Buffer<Int<T>>& out, const Team& team, bool fresh = true) {
    const int64_t n = padded<T>(w.columns);
    Int<T>* const own = partial_.data() + team.rank * n;
    std::fill(own, own + n, static_cast<Int<T>>(2 * kNone));
    column_exponents(w.block(team), add, own);
    team.wait();
    for (int64_t k = 0; team.rank == 0 && k < n; ++k) {
      Int<T> most = fresh ? own[k] : std::max(own[k], out[k]);
      for (int64_t r = 1; r < team.size; ++r) most = std::max(most, own[r * n + k]);
      out[k] = most;
    }
    team.wait();
  }

  // Units that none of the exponents `of` is of take theirs from the first step that reaches them,
  // w[k * from + j * to] leading from unit k to unit j.
  void spread(const T* w, int64_t from, int64_t to, int64_t* of) {
    if (std::none_of(of, of + n_.H, is_none)) return;
    std::vector<int64_t> reached, rest;
    for (int64_t j = 0; j < n_.H; ++j) (is_none(of[j]) ? rest : reached).push_back(j);
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
  void rescale(const Matrix<T>& w, int64_t c, int64_t below, int64_t sources, Weights<T>& out, const Team& team,
               bool& finite, bool& underflowed) {
    for (int64_t k = 0; team.rank == 0 && k < sources * n_.H; ++k) {
      const int64_t s = below + k / n_.H, i = k % n_.H;
      halves_[k] = static_cast<Int<T>>(dead(s, i) ? kNone : unit(s)[i] / 2);
    }
    team.wait();
    const Block<T> block = w.block(team);
    extents_[team.rank] = extent(block, c, finite);
    team.wait();
    if (team.rank == 0) out = fitted(w, c, sources, team);
    team.wait();
    if (out.data == w.data) return;
    underflowed |= copy(block, c, const_cast<T*>(out.data)) < kLeast;
    team.wait();
  }

  // The largest exponent of a rescaled weight. A subnormal number counts as the smallest normal one: a scale need not be
  // tight.
  int64_t extent(const Block<T>& block, int64_t c, bool& finite) {
    const Ints<T> none = Ints<T>{} + Int<T>(2 * kNone);
    Ints<T> high = none, largest{};
    for (int64_t j = block.first; j < block.last; ++j) {
      const Int<T> own = static_cast<Int<T>>(row(c, j) - kMost);
      block.row(j, [&](int64_t k, const Vec<T>& v) {
        const Ints<T> bits = bits_of<T>(v) & std::numeric_limits<Int<T>>::max();
        high = maximum(high, bits > 0 ? (bits >> kMantissa) + (load(halves_.data() + k) + own) : none);
        largest = maximum(largest, bits);
      });
    }
    if (largest_lane(largest) >> kMantissa > 2 * kMost) finite = false;
    return largest_lane(high);
  }

  Weights<T> fitted(const Matrix<T>& w, int64_t c, int64_t sources, const Team& team) {
    const int64_t columns_of = sources * n_.H;
    top_ = *std::max_element(extents_.begin(), extents_.begin() + team.size);
    if (is_none(top_)) top_ = 0;
    // A dead unit's exponent is far below all others: factors do not do.
    const auto range = [](auto exponent, int64_t n) {
      std::pair<int64_t, int64_t> found{exponent(0), exponent(0)};
      for (int64_t i = 1; i < n; ++i) {
        found.first = std::min<int64_t>(found.first, exponent(i));
        found.second = std::max<int64_t>(found.second, exponent(i));
      }
      return found;
    };
    const auto [row_low, row_high] = range([&](int64_t j) { return row(c, j); }, n_.H);
    const auto [column_low, column_high] = range([&](int64_t k) { return halves_[k]; }, columns_of);
    const int64_t shift = row_low - top_;
    const bool fits = !copies_always_ && row_high - row_low <= kSpread && column_high - column_low <= kSpread &&
                      column_low + shift >= kLeast && column_high + shift <= kMost;
    const auto factor = [fits](int64_t exponent) { return fits ? power_of_two<T>(exponent) : T(1); };
    Buffer<T>& rows = factors_.emplace_back(padded<T>(n_.H), T(0));
    Buffer<T>& columns = factors_.emplace_back(padded<T>(columns_of), T(0));
    for (int64_t j = 0; j < n_.H; ++j) rows[j] = factor(row(c, j) - row_low);
    for (int64_t k = 0; k < columns_of; ++k) columns[k] = factor(halves_[k] + shift);
    const T* const data = fits ? w.data : copies_.emplace_back(w.size() + Simd<T>::width).data();
    return {data, rows.data(), columns.data(), 2 * top_};
  }

  // Returns the least exponent of a weight that is not 0.
  int64_t copy(const Block<T>& block, int64_t c, T* out) {
    const Ints<T> none = Ints<T>{} - Int<T>(2 * kNone);
    Ints<T> low = none;
    for (int64_t j = block.first; j < block.last; ++j) {
      const Int<T> own = static_cast<Int<T>>(row(c, j) - top_);
      block.row(j, [&](int64_t k, const Vec<T>& v) {
        const Ints<T> shift = load(halves_.data() + k) + own, n = exponents_of<T>(v) + shift;
        const Ints<T> counted = n > Int<T>(kNone / 2) ? n : none;
        low = counted < low ? counted : low;
        store(out + j * block.columns + k, times_power<T>(v, shift), block.columns - k);
      });
    }
    return -largest_lane(-low);
  }

  static Buffer<Int<T>> zeros(int64_t n) { return Buffer<Int<T>>(padded<T>(n), 0); }

  std::vector<int64_t> reach_ = std::vector<int64_t>(n_.C * n_.H), read_ = reach_;
  Buffer<Int<T>> side_ = head_exponent, halves_ = side_, partial_;
  const bool copies_always_;
  std::vector<int64_t> extents_;  // by thread
  int64_t top_ = 0;
  std::vector<Buffer<T>> factors_, copies_;
};

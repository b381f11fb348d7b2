// path_chain: scan, first drives, chains, κ⁽¹⁾; one team of threads runs it all.

// The largest entry of a chain's vector is kept within 2^(kCentre ± kSlack): high enough that an entry 2^-126 below
// it is still normal, low enough that products of h and δ, summed over T and H, stay finite.
template <typename T>
constexpr int64_t kCentre = std::is_same<T, float>::value ? 40 : 400;
constexpr int64_t kSlack = 6;
// Rows this far below the largest cannot reach the smallest number that the result can hold beside it.
template <typename T>
constexpr int64_t kNegligible = std::is_same<T, float>::value ? 240 : 1900;

// 2^n, zero where the dtype has no normal number for it.
template <typename T>
inline T power_of_two(int64_t n) {
  return n < std::numeric_limits<T>::min_exponent - 1 ? T(0) : std::ldexp(T(1), static_cast<int>(n));
}
template <typename T>
inline int64_t magnitude(T largest) {
  return largest > T(0) ? std::ilogb(largest) : kZeroExponent;
}
template <typename T>
inline T largest_lane(const Vec<T>& v) {
  T m = v[0];
  for (int64_t i = 1; i < Simd<T>::width; ++i) m = std::max(m, v[i]);
  return m;
}
template <typename T>
inline Vec<T> maximum(const Vec<T>& a, const Vec<T>& b) {
  return a > b ? a : b;
}

// Uninitialised, aligned memory: what is read of it has been written, padding included.
template <typename T>
using Buffer = std::vector<T, Aligned<T>>;

// The exponent of a result whose largest entry is about 2^m: 0, so that the factor is κ itself, where that is at home
// in the dtype.
inline int64_t natural_exponent(int64_t m) { return m >= 0 && m <= 60 ? 0 : m; }

// Rows of [n, row] with an exponent and the magnitude of the largest entry each.
template <typename T>
struct Rows {
  T* data;
  int64_t* exponent;
  int64_t* largest;
  int64_t row;
  T* operator[](int64_t t) const { return data + t * row; }
};

// A drive of T rows; row 0 means that one row serves all steps.
template <typename T>
struct Drive {
  const T* data;
  const int64_t* exponent;  // kZeroExponent: no drive at that step
  int64_t row, exponent_step;
};

// out = out · 2^from + drive · 2^drive_exponent, renormalised.
template <typename T>
void finish_step(T* out, int64_t from, const T* drive, int64_t drive_exponent, int64_t n, int64_t& exponent,
                 int64_t& largest) {
  constexpr int64_t width = Simd<T>::width;
  exponent = std::max(from, drive_exponent);
  const T a = power_of_two<T>(from - exponent);
  const T b = drive_exponent == kZeroExponent ? T(0) : power_of_two<T>(drive_exponent - exponent);
  Vec<T> most{};
  if (b != T(0)) {
    for (int64_t k = 0; k < n; k += width) {
      const Vec<T> r = a * load(out + k) + b * load(drive + k);
      store(out + k, r);
      most = maximum<T>(most, r);
    }
  } else {
    for (int64_t k = 0; k < n; k += width) most = maximum<T>(most, load(out + k));
  }
  largest = magnitude(largest_lane<T>(most));
  if (largest == kZeroExponent) {
    exponent = kZeroExponent;
  } else if (largest < kCentre<T> - kSlack || largest > kCentre<T> + kSlack) {
    // In two halves: a drive can lie further from the centre than one power of two reaches.
    const int64_t shift = kCentre<T> - largest;
    const T s1 = std::ldexp(T(1), static_cast<int>(shift / 2)), s2 = std::ldexp(T(1), static_cast<int>(shift - shift / 2));
    for (int64_t k = 0; k < n; k += width) store(out + k, load(out + k) * s1 * s2);
    exponent -= shift;
    largest += shift;
  }
}

// out = W a for one vector, W packed in panels of up to kVectorRow vectors: enough chains of additions to hide their
// latency.
constexpr int kVectorRow = 8;

template <typename T, int Vectors>
void vector_panel(const T* a, const T* b, int64_t depth, T* out) {
  constexpr int64_t width = Simd<T>::width;
  Vec<T> acc[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) acc[v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k, b += Vectors * width) {
    const T s = a[k];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) acc[v] += s * load(b + v * width);
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) store(out + v * width, acc[v]);
}
template <typename T, int... V>
constexpr std::array<void (*)(const T*, const T*, int64_t, T*), sizeof...(V)> vector_table(
    std::integer_sequence<int, V...>) {
  return {{&vector_panel<T, V + 1>...}};
}
template <typename T>
void matrix_vector(const Packed<T>& w, const T* a, T* out) {
  constexpr auto table = vector_table<T>(std::make_integer_sequence<int, kVectorRow>());
  for (int64_t p = 0; p < w.panels(); ++p) {
    table[w.row(p) / Simd<T>::width - 1](a, w.begin(p), w.depth, out + p * w.panel);
  }
}

// A chain that lies in `out`: `start`, then one row a step from `first` on in steps of `stride` rows.
template <typename T>
struct Chain {
  Rows<T> out;
  int64_t first, stride;
  const T* start;  // padded
  int64_t start_exponent;
  Drive<T> drive;
};

// All steps by one thread: W̃ is packed and small enough for its cache.
template <typename T>
void chain(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t steps) {
  const T* before = c.start;
  int64_t exponent = c.start_exponent;
  for (int64_t s = 0, t = c.first; s < steps; ++s, t += c.stride) {
    T* out = c.out[t];
    matrix_vector(w, before, out);
    // The drive's rows run with the output's.
    finish_step(out, exponent + w_exponent, c.drive.data + t * c.drive.row,
                c.drive.exponent[t * c.drive.exponent_step], c.out.row, c.out.exponent[t], c.out.largest[t]);
    exponent = c.out.exponent[t];
    before = out;
  }
}

// Both chains (or one) by a whole team over a W that no cache holds: each thread reads its rows of W once a step and
// uses them for h (a dot product a row) and for δ (a multiple of the row); W is squared in registers.
template <typename T, bool Forward, bool Backward>
void chains_shared(const Chain<T>& h, const Chain<T>& d, const T* weight, T scale, int64_t w_exponent, int64_t hidden,
                   int64_t steps, Buffer<T>& scratch, const Team& team) {
  constexpr int64_t width = Simd<T>::width;
  constexpr int64_t kRows = 4;
  const int64_t ld = padded<T>(hidden);
  // Double-buffered by the parity of the step, so that one barrier a step is enough; then every thread finishes the
  // whole step for itself.
  T* const raw_h = scratch.data();
  T* const partial = raw_h + 2 * ld;
  T* const own_h = partial + 2 * team.size * ld + 2 * team.rank * ld;
  T* const own_d = own_h + ld;
  int64_t h_exponent = 0, d_exponent = 0, largest;
  if (Forward) std::copy(h.start, h.start + ld, own_h), h_exponent = h.start_exponent;
  if (Backward) std::copy(d.start, d.start + ld, own_d), d_exponent = d.start_exponent;
  int64_t row_first, row_last;
  team.share(hidden, row_first, row_last);

  for (int64_t s = 0; s < steps; ++s) {
    T* const next_h = raw_h + (s & 1) * ld;
    T* const next_d = partial + ((s & 1) * team.size + team.rank) * ld;
    if (Backward) std::fill(next_d, next_d + ld, T(0));
    for (int64_t j = row_first; j < row_last; j += kRows) {
      const int64_t rows = std::min(kRows, row_last - j);
      const T* w[kRows];
      T dj[kRows];
      Vec<T> dot[kRows];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        // Rows past the end repeat the last one, with a zero for δ; their dot products are not stored.
        w[r] = weight + (j + std::min(r, rows - 1)) * hidden;
        dj[r] = Backward && r < rows ? own_d[j + r] : T(0);
        dot[r] = Vec<T>{};
      }
      for (int64_t k = 0; k < hidden; k += width) {
        Vec<T> x{}, y{};
        if (Forward) x = load(own_h + k);
        if (Backward) y = load(next_d + k);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; ++r) {
          Vec<T> v = load(w[r] + k, hidden - k);
          v *= scale;
          v *= v;
          if (Forward) dot[r] += v * x;
          if (Backward) y += v * dj[r];
        }
        if (Backward) store(next_d + k, y);
      }
      if (Forward) {
        for (int64_t r = 0; r < rows; ++r) {
          T sum = 0;
          for (int64_t i = 0; i < width; ++i) sum += dot[r][i];
          next_h[j + r] = sum;
        }
      }
    }
    team.wait();
    if (Forward) {
      const int64_t t = h.first + s * h.stride;
      std::copy(next_h, next_h + hidden, own_h);
      finish_step(own_h, h_exponent + w_exponent, h.drive.data + t * h.drive.row,
                  h.drive.exponent[t * h.drive.exponent_step], ld, h_exponent, largest);
      if (team.rank == 0) {
        std::copy(own_h, own_h + ld, h.out[t]);
        h.out.exponent[t] = h_exponent;
        h.out.largest[t] = largest;
      }
    }
    if (Backward) {
      const int64_t t = d.first + s * d.stride;
      const T* parts = partial + (s & 1) * team.size * ld;
      for (int64_t k = 0; k < ld; k += width) {
        Vec<T> sum = load(parts + k);
        for (int64_t r = 1; r < team.size; ++r) sum += load(parts + r * ld + k);
        store(own_d + k, sum);
      }
      finish_step(own_d, d_exponent + w_exponent, d.drive.data + t * d.drive.row,
                  d.drive.exponent[t * d.drive.exponent_step], ld, d_exponent, largest);
      if (team.rank == team.size - 1) {
        std::copy(own_d, own_d + ld, d.out[t]);
        d.out.exponent[t] = d_exponent;
        d.out.largest[t] = largest;
      }
    }
  }
  team.wait();
}

// Σ_t row_t as a vector with an exponent: rows first … last-1, `out` padded.
template <typename T>
void sum_rows(const Rows<T>& rows, int64_t first, int64_t last, T* out, int64_t& exponent) {
  constexpr int64_t width = Simd<T>::width;
  int64_t top = kZeroExponent;
  for (int64_t t = first; t < last; ++t) top = std::max(top, rows.exponent[t]);
  std::fill(out, out + rows.row, T(0));
  Vec<T> most{};
  for (int64_t t = first; t < last; ++t) {
    const T s = power_of_two<T>(rows.exponent[t] - top);
    if (s == T(0)) continue;
    const T* row = rows[t];
    for (int64_t k = 0; k < rows.row; k += width) store(out + k, load(out + k) + s * load(row + k));
  }
  for (int64_t k = 0; k < rows.row; k += width) most = maximum<T>(most, load(out + k));
  const int64_t m = magnitude(largest_lane<T>(most));
  exponent = m == kZeroExponent ? 0 : natural_exponent(m + top);
  if (m == kZeroExponent) return;
  const T s = std::ldexp(T(1), static_cast<int>(top - exponent));
  for (int64_t k = 0; k < rows.row; k += width) store(out + k, load(out + k) * s);
}

// out[j, k] = Σ_t d_t[j] h_t[k] with its exponent: κ⁽¹⁾ of a matrix, split by rows over the team. `scratch` is [n, row].
template <typename T>
void outer_sum(const Rows<T>& d, const Rows<T>& h, int64_t n, int64_t rows, int64_t columns, T* out, int64_t& exponent,
               T* scratch, const Team& team) {
  int64_t top = kZeroExponent, most = kZeroExponent, least = -kZeroExponent;
  for (int64_t t = 0; t < n; ++t) {
    if (d.largest[t] == kZeroExponent || h.largest[t] == kZeroExponent) continue;
    const int64_t x = d.exponent[t] + h.exponent[t];
    top = std::max(top, x);
    least = std::min(least, x);
    most = std::max(most, x + d.largest[t] + h.largest[t]);
  }
  int64_t row_first, row_last;
  team.share(rows, row_first, row_last);
  if (most == kZeroExponent) {
    if (team.rank == 0) exponent = 0;
    std::fill(out + row_first * columns, out + row_last * columns, T(0));
    return;
  }
  const int64_t result = natural_exponent(most);
  if (team.rank == 0) exponent = result;
  // Steps outside [first, last) contribute less than the dtype can hold beside the largest.
  const auto counts = [&](int64_t t) { return d.exponent[t] + h.exponent[t] >= top - kNegligible<T>; };
  int64_t first = 0, last = n;
  while (!counts(first)) ++first;
  while (!counts(last - 1)) --last;

  const T* a = d[first];
  if (least != top) {
    int64_t begin, end;
    team.share(last - first, begin, end);
    for (int64_t t = first + begin; t < first + end; ++t) {
      const T s = power_of_two<T>(d.exponent[t] + h.exponent[t] - top);
      for (int64_t k = 0; k < d.row; k += Simd<T>::width) store(scratch + t * d.row + k, load(d[t] + k) * s);
    }
    a = scratch + first * d.row;
    team.wait();
  }
  for (int64_t column = 0; column < columns; column += kPanel<T>) {
    Product<T> product{a + row_first, 1, d.row, h[first] + column, h.row, last - first};
    Tile<T> t{};
    t.num_products = 1;
    t.columns = std::min(kPanel<T>, columns - column);
    t.c = out + row_first * columns + column;
    t.c_row = columns;
    t.alpha = std::ldexp(T(1), static_cast<int>(top - result));
    panel(t, &product, row_last - row_first);
  }
  team.wait();  // scratch is free again
}

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
  T bad = 0;
  for (int64_t i = 0; i < width; ++i) bad += check[i];
  return bad == T(0) ? largest_lane<T>(most) : std::numeric_limits<T>::quiet_NaN();
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
        ld_(padded<T>(net.hidden)),
        backward_(!net.kappa_hh.empty() || !net.delta.empty()),
        shared_(net.hidden >= kSharedHidden),
        head_(net.hidden),
        input_(net.input),
        first_drive_(net.hidden),
        start_(ld_),
        zeros_(ld_),
        bias_(L_, Scaled<T>(net.hidden)),
        h_sum_(ld_),
        drive_sums_(net.hidden) {
    collect();
    scans_.resize(tensors_.size() * threads);
    h_.resize(L_ * (T_ + 1) * ld_);
    h_exponent_.resize(L_ * (T_ + 1));
    h_largest_.resize(L_ * (T_ + 1));
    if (backward_) {
      d_.resize(L_ * T_ * ld_);
      d_exponent_.resize(L_ * T_);
      d_largest_.resize(L_ * T_);
      d_sum_.resize(L_ * ld_);
      d_sum_exponent_.resize(L_);
      top_exponent_.assign(T_, kZeroExponent);
    }
    if (L_ > 1) {
      // Drives run with their chain's rows: h has T + 1 of them, its row 0 undriven.
      h_drive_.resize((T_ + 1) * ld_);
      h_drive_exponent_.resize(T_ + 1);
      d_drive_.resize(T_ * ld_);
      d_drive_exponent_.resize(T_);
    }
    if (!shared_) {
      packed_h_.resize(Packed<T>::size(H_, H_));
      packed_d_.resize(Packed<T>::size(H_, H_));
    } else {
      scratch_.resize((2 + 4 * threads) * ld_);
    }
    if (L_ > 1) {
      mixed_h_.resize(Packed<T>::size(H_, H_));
      mixed_d_.resize(Packed<T>::size(H_, H_));
    }
    if (!net.kappa_hh.empty()) outer_.resize(T_ * ld_);
    partial_.resize(threads * std::max(ld_, padded<T>(net.input)));
  }

  // The index of the first tensor that is not finite, in the order of `collect`, or -1.
  int64_t run() {
    run_team(threads_, [this](const Team& team) { run(team); });
    return bad_;
  }

 private:
  // From this size on a thread's cache no longer holds W̃, and both chains share one read of it.
  static constexpr int64_t kSharedHidden = 512;

  struct Tensor {
    const T* data;
    int64_t size;
    T scale;           // brings the largest entry to [1, 2)
    int64_t exponent;  // of its squares: true w² = (w · scale)² · 2^exponent
  };

  void collect() {
    for (int64_t i = 0; i < L_; ++i) {
      tensors_.push_back({net_.weight_ih[i], H_ * (i ? H_ : net_.input), T(1), 0});
      tensors_.push_back({net_.weight_hh[i], H_ * H_, T(1), 0});
      if (!net_.bias_ih.empty()) {
        tensors_.push_back({net_.bias_ih[i], H_, T(1), 0});
        tensors_.push_back({net_.bias_hh[i], H_, T(1), 0});
      }
    }
    if (net_.head_weight) tensors_.push_back({net_.head_weight, net_.outputs * H_, T(1), 0});
    if (net_.head_bias) tensors_.push_back({net_.head_bias, net_.outputs, T(1), 0});
    if (net_.embedding) tensors_.push_back({net_.embedding, net_.vocabulary * net_.input, T(1), 0});
  }
  int64_t per_layer() const { return net_.bias_ih.empty() ? 2 : 4; }
  const Tensor& ih(int64_t i) const { return tensors_[per_layer() * i]; }
  const Tensor& hh(int64_t i) const { return tensors_[per_layer() * i + 1]; }
  const Tensor& bias(int64_t i, int64_t which) const { return tensors_[per_layer() * i + 2 + which]; }
  const Tensor& head() const { return tensors_[per_layer() * L_]; }
  const Tensor& head_bias() const { return tensors_[per_layer() * L_ + (net_.head_weight ? 1 : 0)]; }
  const Tensor& embedding() const { return tensors_.back(); }

  // h_0 … h_T and δ_1 … δ_T (at rows 0 … T-1) of layer i.
  Rows<T> h(int64_t i) {
    const int64_t at = i * (T_ + 1);
    return {h_.data() + at * ld_, h_exponent_.data() + at, h_largest_.data() + at, ld_};
  }
  Rows<T> d(int64_t i) {
    const int64_t at = i * T_;
    return {d_.data() + at * ld_, d_exponent_.data() + at, d_largest_.data() + at, ld_};
  }
  Rows<T> h_after_first(int64_t i) {
    const Rows<T> r = h(i);
    return {r[1], r.exponent + 1, r.largest + 1, ld_};
  }

  void run(const Team& team) {
    if (!scan_all(team)) return;
    first_sums(team);
    const Team alone{};
    if (shared_) {
      if (L_ == 1 && backward_) {
        set_start(0, team);
        chains_shared<T, true, true>(h_chain(0), d_chain(0), hh(0).data, hh(0).scale, hh(0).exponent, H_, T_, scratch_,
                                     team);
      } else {
        for (int64_t i = 0; i < L_; ++i) forward(i, team);
        for (int64_t i = L_ - 1; backward_ && i >= 0; --i) backward(i, team);
      }
    } else {
      // The network is linear, so neither direction waits for the other.
      if (team.rank == 0) {
        for (int64_t i = 0; i < L_; ++i) forward(i, alone);
      }
      if (team.rank == team.size - 1 && backward_) {
        for (int64_t i = L_ - 1; i >= 0; --i) backward(i, alone);
      }
    }
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

  // Squared column sums of one matrix [rows, columns] over the team; all of them see the result in rank 0's vector.
  void column_sums(const Tensor& w, int64_t rows, int64_t columns, Scaled<T>& out, const Team& team) {
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
      out.set(sums, w.exponent);
    }
    team.wait();
  }

  // The vectors at both ends: the head's column sums, the input, the first layer's drive, the biases.
  void first_sums(const Team& team) {
    if (net_.head_weight) {
      column_sums(head(), net_.outputs, H_, head_, team);
    } else if (team.rank == 0) {
      head_.set(std::vector<double>(H_, 1.0), 0);
    }
    if (net_.embedding) {
      column_sums(embedding(), net_.vocabulary, net_.input, input_, team);
    } else if (team.rank == 0) {
      input_.set(std::vector<double>(net_.input, 1.0), 0);
    }
    team.wait();
    const Tensor& w = ih(0);
    int64_t first, last;
    team.share(H_, first, last);
    for (int64_t j = first; j < last; ++j) drive_sums_[j] = row_sum(w.data + j * net_.input, w.scale);
    team.wait();
    if (team.rank != 0) {
      team.wait();
      return;
    }
    for (int64_t i = 0; i < L_ && !net_.bias_ih.empty(); ++i) {
      const Tensor &b1 = bias(i, 0), &b2 = bias(i, 1);
      const int64_t top = std::max(b1.exponent, b2.exponent);
      std::vector<double> sums(H_);
      for (int64_t j = 0; j < H_; ++j) {
        const double s1 = b1.data[j] * b1.scale, s2 = b2.data[j] * b2.scale;
        sums[j] = scaled(s1 * s1, b1.exponent - top) + scaled(s2 * s2, b2.exponent - top);
      }
      bias_[i].set(sums, top);
    }
    const int64_t from = input_.exponent + w.exponent;
    const int64_t top = std::max(from, bias_[0].exponent);
    std::vector<double> sums(H_);
    for (int64_t j = 0; j < H_; ++j) {
      sums[j] = scaled(drive_sums_[j], from - top) + scaled(bias_[0].data[j], bias_[0].exponent - top);
    }
    first_drive_.set(sums, top);
    if (backward_) {
      for (int64_t t = net_.last_only ? T_ - 1 : 0; t < T_; ++t) top_exponent_[t] = head_.exponent;
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
      acc += v * v * load(input_.data.data() + k);
    }
    T sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += acc[i];
    return sum;
  }

  void set_start(int64_t i, const Team& team) {
    if (team.rank == 0) {
      const Rows<T> rows = h(i);
      std::copy(start_.begin(), start_.end(), rows[0]);
      rows.exponent[0] = net_.ones_h0 ? -kCentre<T> : kZeroExponent;
      rows.largest[0] = net_.ones_h0 ? kCentre<T> : kZeroExponent;
    }
    team.wait();
  }

  Chain<T> h_chain(int64_t i) {
    const Drive<T> drive = i == 0 ? Drive<T>{first_drive_.data.data(), &first_drive_.exponent, 0, 0}
                                  : Drive<T>{h_drive_.data(), h_drive_exponent_.data(), ld_, 1};
    return {h(i), 1, 1, h(i)[0], net_.ones_h0 ? -kCentre<T> : kZeroExponent, drive};
  }
  Chain<T> d_chain(int64_t i) {
    const Drive<T> drive = i == L_ - 1 ? Drive<T>{head_.data.data(), top_exponent_.data(), 0, 1}
                                       : Drive<T>{d_drive_.data(), d_drive_exponent_.data(), ld_, 1};
    return {d(i), T_ - 1, -1, zeros_.data(), kZeroExponent, drive};
  }

  void forward(int64_t i, const Team& team) {
    set_start(i, team);
    if (i > 0) {
      mix(h_after_first(i - 1), ih(i), 1, H_, mixed_h_, h_drive_.data() + ld_, h_drive_exponent_.data() + 1, team);
      add_bias(bias_[i], team);
    }
    run_chain(h_chain(i), i, 1, H_, packed_h_, std::true_type(), team);
  }
  void backward(int64_t i, const Team& team) {
    if (i < L_ - 1) mix(d(i + 1), ih(i + 1), H_, 1, mixed_d_, d_drive_.data(), d_drive_exponent_.data(), team);
    run_chain(d_chain(i), i, H_, 1, packed_d_, std::false_type(), team);
  }

  template <typename IsForward>
  void run_chain(const Chain<T>& c, int64_t i, int64_t row, int64_t column, Buffer<T>& packed, IsForward,
                 const Team& team) {
    const Tensor& w = hh(i);
    if (shared_) {
      chains_shared<T, IsForward::value, !IsForward::value>(c, c, w.data, w.scale, w.exponent, H_, T_, scratch_, team);
      return;
    }
    const Packed<T> p{packed.data(), H_, H_, kVectorRow * Simd<T>::width};
    pack(p, w.data, row, column, team, square(w.scale));
    chain(c, p, w.exponent, T_);
  }

  static auto square(T scale) {
    return [scale](T v) {
      v *= scale;
      return v * v;
    };
  }

  // The drive that one layer gives the next: rows · W̃, W̃(k, n) = weight[k * row + n * column] squared.
  void mix(const Rows<T>& rows, const Tensor& w, int64_t row, int64_t column, Buffer<T>& packed, T* out,
           int64_t* exponent, const Team& team) {
    const Packed<T> p{packed.data(), H_, H_, kPanel<T>};
    pack(p, w.data, row, column, team, square(w.scale));
    team.wait();
    int64_t first, last;
    team.share(T_, first, last);
    for (int64_t n = 0; n < p.panels(); ++n) {
      Tile<T> t{};
      t.alpha = 1;
      t.c = out + first * ld_ + n * p.panel;
      t.c_row = ld_;
      step(t, rows[first], ld_, p, n, static_cast<const Product<T>*>(nullptr), last - first);
    }
    for (int64_t t = first; t < last; ++t) {
      exponent[t] = rows.exponent[t] == kZeroExponent ? kZeroExponent : rows.exponent[t] + w.exponent;
      std::fill(out + t * ld_ + H_, out + (t + 1) * ld_, T(0));
    }
    team.wait();
  }

  void add_bias(const Scaled<T>& b, const Team& team) {
    if (b.exponent == kZeroExponent) return;
    int64_t first, last, largest;
    team.share(T_, first, last);
    for (int64_t t = first + 1; t < last + 1; ++t) {
      finish_step(h_drive_.data() + t * ld_, h_drive_exponent_[t], b.data.data(), b.exponent, ld_, h_drive_exponent_[t],
                  largest);
    }
    team.wait();
  }

  void results(const Team& team) {
    const bool wanted = !net_.kappa_hh.empty();
    if (team.rank == team.size - 1) {
      sum_rows(h_after_first(L_ - 1), net_.last_only ? T_ - 1 : 0, T_, h_sum_.data(), h_sum_exponent_);
    }
    for (int64_t i = 0; wanted && i < L_; ++i) {
      if (team.rank == i % team.size) sum_rows(d(i), 0, T_, d_sum_.data() + i * ld_, d_sum_exponent_[i]);
    }
    team.wait();
    if (team.rank == 0) *net_.log_path_norm = log_path_norm();
    if (wanted) kappas(team);
    for (int64_t i = 0; i < static_cast<int64_t>(net_.h.size()); ++i) {
      if (team.rank == 0) copy_rows(h(i), net_.h[i], net_.h_exponents + i * T_);
      if (team.rank == team.size - 1) copy_rows(d(i), net_.delta[i], net_.delta_exponents + i * T_);
    }
  }

  void copy_rows(const Rows<T>& rows, T* out, int64_t* exponents) {
    for (int64_t t = 0; t < T_; ++t) std::copy(rows[t], rows[t] + H_, out + t * H_);
    std::copy(rows.exponent, rows.exponent + T_, exponents);
  }

  void kappas(const Team& team) {
    int64_t* exponent = net_.exponents;
    for (int64_t i = 0; i < L_; ++i) {
      const T* d_sum = d_sum_.data() + i * ld_;
      if (i > 0) {
        outer_sum(d(i), h_after_first(i - 1), T_, H_, H_, net_.kappa_ih[i], *exponent, outer_.data(), team);
      } else if (team.rank == 0) {
        *exponent = first_kappa(d_sum, d_sum_exponent_[0]);
      }
      ++exponent;
      outer_sum(d(i), h(i), T_, H_, H_, net_.kappa_hh[i], *exponent++, outer_.data(), team);
      if (!net_.kappa_bias.empty()) {
        if (team.rank == 0) {
          std::copy(d_sum, d_sum + H_, net_.kappa_bias[i]);
          *exponent = d_sum_exponent_[i];
        }
        ++exponent;
      }
    }
    if (team.rank != 0) return;
    if (net_.kappa_head) {
      std::copy(h_sum_.begin(), h_sum_.begin() + H_, net_.kappa_head);
      *exponent++ = h_sum_exponent_;
    }
    if (net_.kappa_head_bias) {
      *net_.kappa_head_bias = static_cast<T>(output_steps());
      *exponent++ = 0;
    }
    if (net_.kappa_embedding) *exponent++ = embedding_kappa();
  }

  // The input is the same at every step: κ⁽¹⁾ = (Σ_t δ_t) · inputᵀ, equal columns for an input of ones.
  int64_t first_kappa(const T* d_sum, int64_t exponent) {
    T* out = net_.kappa_ih[0];
    if (!net_.embedding) {
      std::copy(d_sum, d_sum + H_, out);
      return exponent;
    }
    const T* x = input_.data.data();
    const int64_t md = magnitude(*std::max_element(d_sum, d_sum + H_));
    const int64_t mx = magnitude(*std::max_element(x, x + net_.input));
    if (md == kZeroExponent || mx == kZeroExponent) {
      std::fill(out, out + H_ * net_.input, T(0));
      return 0;
    }
    const int64_t result = natural_exponent(md + exponent + mx + input_.exponent);
    // Each factor is brought near one first, and the product to its place.
    const T s1 = std::ldexp(T(1), static_cast<int>(-md)), s2 = std::ldexp(T(1), static_cast<int>(-mx));
    const T s = std::ldexp(T(1), static_cast<int>(md + exponent + mx + input_.exponent - result));
    for (int64_t j = 0; j < H_; ++j) {
      for (int64_t k = 0; k < net_.input; ++k) out[j * net_.input + k] = (d_sum[j] * s1 * s) * (x[k] * s2);
    }
    return result;
  }

  int64_t embedding_kappa() {
    const Tensor& w = ih(0);
    std::vector<double> sums(net_.input, 0.0);
    for (int64_t j = 0; j < H_; ++j) {
      for (int64_t k = 0; k < net_.input; ++k) {
        const double v = static_cast<double>(w.data[j * net_.input + k] * w.scale);
        sums[k] += v * v * d_sum_[j];
      }
    }
    const int64_t m = magnitude(*std::max_element(sums.begin(), sums.end()));
    const int64_t from = d_sum_exponent_[0] + w.exponent;
    const int64_t result = m == kZeroExponent ? 0 : natural_exponent(m + from);
    for (int64_t k = 0; k < net_.input; ++k) net_.kappa_embedding[k] = static_cast<T>(scaled(sums[k], from - result));
    return result;
  }

  int64_t output_steps() const { return net_.last_only ? 1 : T_; }

  double log_path_norm() {
    // Both factors are brought near one before they are multiplied.
    double dot = 0;
    const double centre = std::ldexp(1.0, static_cast<int>(-kCentre<T>));
    for (int64_t k = 0; k < H_; ++k) dot += static_cast<double>(head_.data[k]) * centre * h_sum_[k];
    double logarithm = dot > 0 ? std::log(dot) + (head_.exponent + kCentre<T> + h_sum_exponent_) * kLn2
                               : -std::numeric_limits<double>::infinity();
    if (net_.head_bias) {
      const Tensor& b = head_bias();
      double sum = 0;
      for (int64_t o = 0; o < net_.outputs; ++o) {
        const double v = static_cast<double>(b.data[o] * b.scale);
        sum += v * v;
      }
      if (sum > 0) {
        const double other = std::log(sum * static_cast<double>(output_steps())) + b.exponent * kLn2;
        const double high = std::max(logarithm, other), low = std::min(logarithm, other);
        logarithm = high + std::log1p(std::exp(low - high));
      }
    }
    return logarithm;
  }

  static constexpr double kLn2 = 0.693147180559945309417232121458;

  const PathChain<T>& net_;
  int threads_;
  int64_t T_, H_, L_, ld_;
  bool backward_, shared_;
  int64_t bad_ = -1;
  std::vector<Tensor> tensors_;
  std::vector<T> scans_;
  Scaled<T> head_, input_, first_drive_;
  Buffer<T> start_, zeros_;
  std::vector<Scaled<T>> bias_;
  Buffer<T> h_, d_, h_drive_, d_drive_, packed_h_, packed_d_, mixed_h_, mixed_d_, scratch_, outer_, partial_, d_sum_;
  Buffer<T> h_sum_;
  std::vector<T> drive_sums_;
  int64_t h_sum_exponent_ = 0;
  std::vector<int64_t> h_exponent_, h_largest_, d_exponent_, d_largest_, d_sum_exponent_, top_exponent_,
      h_drive_exponent_, d_drive_exponent_;
};

template <typename T>
int64_t path_chain(const PathChain<T>& net, int threads) {
  return PathChainRun<T>(net, threads).run();
}

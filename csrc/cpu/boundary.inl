// The vectors at both ends of the chains: the head's column sums, the input, the first layer's drive, the biases, h_0.

// out[k] = Σ_j (w[j, k] 2^((row[j] - column[k]) / 2))² weight[j], with exponents such that no term is far above 1. In
// blocks of rows, whose sums are added, to keep rounding small.
template <typename T>
void column_sums(const Block<T>& w, const int64_t* row, const Int<T>* column, const T* weight, T* out) {
  constexpr int64_t width = Simd<T>::width, kBlock = 64;
  for (int64_t k = 0; k < w.columns; k += width) {
    const Ints<T> minus = load(column + k) >> 1;
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
    const Ints<T> n = (load(column + k) >> 1) - static_cast<Int<T>>(row / 2);
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

// value · 2^exponent += v · 2^e.
inline void add_scaled(double& value, int64_t& exponent, double v, int64_t e) {
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

template <typename T>
class Boundary {
  const Network<T>& n_;

 public:
  using Vectors = std::vector<Scaled<T>>;
  Vectors head = Vectors(n_.D, Scaled<T>(n_.H)), first_drive = head;         // by directions
  Vectors start = Vectors(n_.C, Scaled<T>(n_.H)), bias = start;              // by chains
  Scaled<T> input{n_.net.input};

  Boundary(const Network<T>& of, const Canonical<T>& canonical, int threads)
      : n_(of), canonical_(canonical), partial_(threads * padded<T>(std::max(n_.D * n_.H, n_.net.input))) {}

  // Returns, on the first thread, whether the dtype holds all of them.
  bool find(const Team& team) {
    const int64_t inputs = n_.net.input;
    std::vector<double> head_sums(n_.D * n_.H, 1.0);
    if (n_.net.head_weight) head_sums = sums_over(n_.head(), canonical_.head_exponent.data(), team);
    if (n_.net.embedding) {
      const std::vector<double> sums = sums_over(n_.embedding(), canonical_.input_exponent.data(), team);
      if (team.rank == 0) std::copy(sums.begin(), sums.end(), input_sums_.begin());
      team.wait();
    }
    int64_t first, last;
    team.share(n_.H, first, last);
    for (int64_t c = 0; c < n_.D; ++c) {
      for (int64_t j = first; j < last; ++j) {
        drive_sums_[c * n_.H + j] = row_sum(n_.ih(c).data + j * inputs, inputs, canonical_.input_exponent.data(),
                                            canonical_.drive_exponent[c * n_.H + j], input_sums_.data());
      }
    }
    team.wait();
    const bool held = team.rank != 0 || set(head_sums);
    team.wait();
    return held;
  }

 private:
  // column_sums over the team: rank 0 has the result.
  std::vector<double> sums_over(const Matrix<T>& w, const Int<T>* column, const Team& team) {
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

  bool set(const std::vector<double>& head_sums) {
    const int64_t H = n_.H;
    bool held = true;
    std::vector<int64_t> exponents(H);
    std::vector<double> values(H);
    for (int64_t e = 0; e < n_.D; ++e) {
      const int64_t* d = canonical_.unit(n_.C - n_.D + e);
      for (int64_t k = 0; k < H; ++k) exponents[k] = canonical_.head_exponent[e * H + k] + d[k];
      std::copy_n(head_sums.begin() + e * H, H, values.begin());
      held &= head[e].set(values, exponents);
    }
    if (n_.net.embedding) {
      const auto& of = canonical_.input_exponent;
      held &= input.set({input_sums_.begin(), input_sums_.begin() + n_.net.input}, {of.begin(), of.begin() + n_.net.input});
    }
    for (int64_t c = 0; c < n_.C; ++c) held &= set_chain(c, values, exponents);
    return held;
  }
  bool set_chain(int64_t c, std::vector<double>& values, std::vector<int64_t>& exponents) {
    const int64_t* const d = canonical_.unit(c);
    const int64_t H = n_.H;
    std::transform(d, d + H, exponents.begin(), [](int64_t n) { return -n; });
    std::fill(values.begin(), values.end(), n_.net.ones_h0 ? 1.0 : 0.0);
    bool held = start[c].set(values, exponents);
    std::fill(values.begin(), values.end(), 0.0);
    for (int64_t b = 0; b < n_.biases; ++b) {
      for (int64_t j = 0; j < H; ++j) {
        const T w = n_.bias(c, b).data[j];
        if (w == T(0)) continue;
        const int64_t e = exponent_of(w);
        const double v = times_power_of_two(std::abs(static_cast<double>(w)), -e);
        add_scaled(values[j], exponents[j], v * v, 2 * e - d[j]);
      }
    }
    held &= bias[c].set(values, exponents);
    if (!n_.lowest(c)) return held;
    for (int64_t j = 0; j < H; ++j) {
      const int64_t at = c * H + j;
      add_scaled(values[j], exponents[j], drive_sums_[at], canonical_.drive_exponent[at] - d[j]);
    }
    return first_drive[c].set(values, exponents) && held;
  }

  const Canonical<T>& canonical_;
  Buffer<T> input_sums_ = Buffer<T>(padded<T>(n_.net.input), T(1)), partial_;
  std::vector<T> drive_sums_ = std::vector<T>(n_.D * n_.H);
};

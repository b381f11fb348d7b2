// path_step: a step of the optimisers entry by entry. Runs of entries are brought to canonical coordinates (ops.h), which
// is exact, and all arithmetic is done there by the same vector loops whatever the scaling. U is what it is done in.

constexpr int64_t kRun = 256;

template <typename U>
struct alignas(64) Run {
  U gradient[kRun], weight[kRun], kappa[kRun], first[kRun], second[kRun], step[kRun];
};

template <typename U>
inline Vec<U> all(double value) {
  return Vec<U>{} + static_cast<U>(value);
}

inline double power_of_two(int64_t exponent) {  // within ±1022
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Calls f(row, column, j, m) for the pieces [i + j, i + j + m) of entries [i, i + n) that lie in one row.
template <typename F>
inline void for_rows(int64_t columns, int64_t i, int64_t n, const F& f) {
  int64_t row = i / columns, column = i % columns;
  for (int64_t j = 0; j < n; ++row, column = 0) {
    const int64_t m = std::min(columns - column, n - j);
    f(row, column, j, m);
    j += m;
  }
}

// out = in · 2^e, or in · 2^-e: into canonical coordinates and back.
template <bool down, typename U, typename T, typename In, typename Out>
void shift(const StepWeight<T>& w, int64_t i, int64_t n, const In* in, Out* out) {
  const T* const rows = down ? w.row_down : w.row_up;
  const T* const columns = down ? w.column_down : w.column_up;
  for_rows(w.columns, i, n, [&](int64_t row, int64_t column, int64_t j, int64_t m) {
    const In* from = in + j;
    Out* to = out + j;
    if (w.tables) {
      const U r = rows ? rows[row] : T(1);
      if (columns) {
        const T* const c = columns + column;
#pragma GCC ivdep
        for (int64_t q = 0; q < m; ++q) to[q] = static_cast<Out>(static_cast<U>(from[q]) * (r * static_cast<U>(c[q])));
      } else {
#pragma GCC ivdep
        for (int64_t q = 0; q < m; ++q) to[q] = static_cast<Out>(static_cast<U>(from[q]) * r);
      }
      return;
    }
    const int64_t r = w.row ? w.row[row] : 0;
    for (int64_t q = 0; q < m; ++q) {
      const int64_t e = std::clamp<int64_t>(r + (w.column ? w.column[column + q] : 0), -1000, 1000);
      to[q] = static_cast<Out>(static_cast<double>(from[q]) * power_of_two(down ? -e : e));
    }
  });
}

// The run's κ, without `exponent`, in whole vectors: entries beyond the last are 1.
template <typename T, typename U>
const U* gather_kappa(const StepWeight<T>& w, int64_t i, int64_t n, U* out) {
  const bool dense = w.row_stride == w.columns && w.column_stride == 1;
  if constexpr (std::is_same_v<T, U>) {
    if (dense && !w.entry_exponents && n % Simd<U>::width == 0) return w.kappa + i;
  }
  for_rows(w.columns, i, n, [&](int64_t row, int64_t column, int64_t j, int64_t m) {
    const int64_t at = row * w.row_stride + column * w.column_stride;
    const T* const from = w.kappa + at;
    if (w.column_stride == 0) {
      std::fill(out + j, out + j + m, static_cast<U>(*from));
    } else {
      for (int64_t q = 0; q < m; ++q) out[j + q] = static_cast<U>(from[q]);
    }
    if (w.entry_exponents) {
      const int64_t* const e = w.entry_exponents + at;
      for (int64_t q = 0; q < m; ++q) {
        out[j + q] *= static_cast<U>(power_of_two(std::clamp<int64_t>(e[q * w.column_stride], -1000, 1000)));
      }
    }
  });
  std::fill(out + n, out + padded<U>(n), U(1));
  return out;
}

template <typename T, typename U>
void gather_gradient(const StepWeight<T>& w, int64_t i, int64_t n, Run<U>& run) {
  // κ's coordinates: a gradient scales as 1/weight does.
  shift<true, U>(w, i, n, w.gradient + i, run.gradient);
  std::fill(run.gradient + n, run.gradient + padded<U>(n), U(0));
}

template <typename T, typename U>
void gather_weight(const StepWeight<T>& w, int64_t i, int64_t n, Run<U>& run) {
  shift<false, U>(w, i, n, w.weight + i, run.weight);
  std::fill(run.weight + n, run.weight + padded<U>(n), U(0));
}

// Σ a b² in double, side by side, in a fixed order.
template <typename U>
struct SquareSum {
  Vec<double> sums[sizeof(double) / sizeof(U)] = {};

  void add(const U* a, const U* b) {
    constexpr int64_t width = Simd<double>::width;
    typedef U Part __attribute__((vector_size(sizeof(U) * width)));
    for (size_t s = 0; s < sizeof(double) / sizeof(U); ++s) {
      Part x, y;
      std::memcpy(&y, b + s * width, sizeof(y));
      const Vec<double> wide = __builtin_convertvector(y, Vec<double>);
      if (a) {
        std::memcpy(&x, a + s * width, sizeof(x));
        sums[s] += wide * wide * __builtin_convertvector(x, Vec<double>);
      } else {
        sums[s] += wide * wide;
      }
    }
  }
  double total() const {
    Vec<double> sum = sums[0];
    if constexpr (sizeof(U) < sizeof(double)) sum += sums[1];
    double result = 0;
    for (int64_t l = 0; l < Simd<double>::width; ++l) result += sum[l];
    return result;
  }
};

// A vector's lanes are all ones where a comparison holds.
template <typename M>
bool any(const M& mask) {
  bool result = false;
  for (size_t l = 0; l < sizeof(M) / sizeof(mask[0]); ++l) result |= mask[l] != 0;
  return result;
}

// Whether a finite gradient's quotient, in run.step, is too large in the weight's own coordinates.
template <typename T, typename U>
bool lost_entries(const StepWeight<T>& w, double limit, int64_t i, int64_t n, Run<U>& run) {
  double own[kRun];
  shift<true, double>(w, i, n, run.step, own);
  bool lost = false;
  for (int64_t j = 0; j < n; ++j) lost |= std::isfinite(w.gradient[i + j]) && !(std::abs(own[j]) <= limit);
  return lost;
}

// Leaves Δ in run.step, unshortened, and the new momentum in run.first.
template <typename T, typename U, bool measure>
void sgd_run(const StepWeight<T>& w, const SgdRule& rule, int64_t i, int64_t n, Run<U>& run, SquareSum<U>& square,
             StepSums& sums) {
  constexpr int64_t width = Simd<U>::width;
  const int64_t end = padded<U>(n);
  gather_gradient(w, i, n, run);
  const U* const kappa = gather_kappa(w, i, n, run.kappa);
  if (!measure || rule.decay != 0) gather_weight(w, i, n, run);
  const U before = static_cast<U>(rule.before), after = static_cast<U>(rule.after);
  const U* divisor = kappa;
  if (rule.damping != 0) {
    // γ² is one number for all weights: its share is 2^-2e of it.
    std::fill(run.second, run.second + n, static_cast<U>(std::sqrt(rule.damping)));
    shift<true, U>(w, i, n, run.second, run.second);
    for (int64_t j = 0; j < n; ++j) {
      run.second[j] = static_cast<U>(kappa[j] * rule.kappa_scale + run.second[j] * run.second[j]);
    }
    std::fill(run.second + n, run.second + end, U(1));
    divisor = run.second;
  }
  Vec<U> most{};
  const Vec<U> infinity = all<U>(std::numeric_limits<double>::infinity());
  auto paths = most != most, pulled = paths;
  for (int64_t j = 0; j < end; j += width) {
    const Vec<U> g = load(run.gradient + j);
    Vec<U> d = load(divisor + j);
    d = d == Vec<U>{} ? infinity : d;  // on no path: no step
    const Vec<U> q = g * before / d * after;
    store(run.step + j, q);
    if (measure) {
      const Vec<U> size = q < Vec<U>{} ? -q : q;
      most = size > most ? size : most;
      paths |= load(kappa + j) > Vec<U>{};
      pulled |= g != Vec<U>{};
    }
  }
  if (measure) {
    if (n == end) {
      sums.paths |= any(paths);
    } else {
      for (int64_t j = 0; j < n; ++j) sums.paths |= kappa[j] > U(0);
    }
    sums.pulled |= any(pulled);
    double largest = 0;
    for (int64_t l = 0; l < width; ++l) largest = std::max(largest, static_cast<double>(most[l]));
    if (!(largest * power_of_two(std::clamp<int64_t>(w.most_down, -1000, 1000)) <= rule.limit)) {
      sums.lost |= lost_entries(w, rule.limit, i, n, run);
    }
  }
  const U decay = static_cast<U>(rule.decay), momentum = static_cast<U>(rule.momentum);
  const U rate = static_cast<U>(-rule.rate);
  const bool has_momentum = w.first != nullptr;
  if (has_momentum) {
    shift<false, U>(w, i, n, w.first + i, run.first);
    std::fill(run.first + n, run.first + end, U(0));
  }
  for (int64_t j = 0; j < end; j += width) {
    Vec<U> d = load(run.step + j);
    if (rule.decay != 0) d += decay * load(run.weight + j);
    if (has_momentum) {
      const Vec<U> m = momentum * load(run.first + j) + d;
      store(run.first + j, m);
      d = rule.nesterov ? d + momentum * m : m;
    }
    store(run.step + j, rate * d);
    if (measure) square.add(kappa + j, run.step + j);
  }
}

template <typename T, typename U>
StepSums sgd_measure(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last) {
  Run<U> run;
  StepSums sums{};
  SquareSum<U> square;
  for (int64_t i = first; i < last; i += kRun) {
    sgd_run<T, U, true>(w, rule, i, std::min(kRun, last - i), run, square, sums);
  }
  sums.square = square.total();
  return sums;
}

template <typename T, typename U>
void sgd_apply(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last) {
  Run<U> run;
  StepSums sums{};
  SquareSum<U> square;
  const U factor = static_cast<U>(rule.factor);
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    sgd_run<T, U, false>(w, rule, i, n, run, square, sums);
    for (int64_t j = 0; j < padded<U>(n); j += Simd<U>::width) {
      store(run.weight + j, load(run.weight + j) + factor * load(run.step + j));
    }
    shift<true, U>(w, i, n, run.weight, w.weight + i);
    if (w.first) shift<true, U>(w, i, n, run.first, w.first + i);
  }
}

// g/sqrt(κ) in run.gradient and 1/sqrt(κ), 0 on no path, in run.kappa.
template <typename T, typename U>
void coordinate_run(const StepWeight<T>& w, int64_t i, int64_t n, Run<U>& run, StepSums* sums) {
  gather_gradient(w, i, n, run);
  const U* const kappa = gather_kappa(w, i, n, run.kappa);
  const int64_t end = padded<U>(n);
  Vec<U> zero{};
  auto paths = zero != zero, pulled = paths;
  for (int64_t j = 0; j < end; j += Simd<U>::width) {
    const Vec<U> k = load(kappa + j), g = load(run.gradient + j);
    const Vec<U> unit = k > zero ? all<U>(1) / square_root(k) : zero;
    paths |= k > zero;
    pulled |= g != zero;
    store(run.kappa + j, unit);
    store(run.gradient + j, g * unit);
  }
  if (!sums) return;
  sums->pulled |= any(pulled);
  if (n == end) {
    sums->paths |= any(paths);
  } else {
    for (int64_t j = 0; j < n; ++j) sums->paths |= run.kappa[j] > U(0);
  }
}

template <typename T, typename U>
StepSums coordinate_measure(const StepWeight<T>& w, int64_t first, int64_t last) {
  Run<U> run;
  StepSums sums{};
  SquareSum<U> square;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    coordinate_run(w, i, n, run, &sums);
    for (int64_t j = 0; j < padded<U>(n); j += Simd<U>::width) square.add(nullptr, run.gradient + j);
  }
  sums.square = square.total();
  return sums;
}

template <typename U>
inline Vec<U> raise(const Vec<U>& x, double power) {
  if (power == 1) return x;
  if (power == 2) return x * x;
  if (power == 3) return x * x * x;
  Vec<U> result = x;
  for (int64_t l = 0; l < Simd<U>::width; ++l) result[l] = static_cast<U>(std::pow(static_cast<double>(x[l]), power));
  return result;
}

template <typename T, typename U>
void coordinate_apply(const StepWeight<T>& w, const CoordinateRule& rule, int64_t first, int64_t last) {
  constexpr int64_t width = Simd<U>::width;
  Run<U> run;
  const U before = static_cast<U>(rule.before), after = static_cast<U>(rule.after);
  const U keep = static_cast<U>(rule.beta2), take1 = static_cast<U>(1 - rule.beta1);
  const U take2 = static_cast<U>(1 - rule.beta2), correction = static_cast<U>(rule.correction);
  const U eps = static_cast<U>(rule.eps), rate = static_cast<U>(rule.rate);
  const Vec<U> zero{}, one = all<U>(1);
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i), end = padded<U>(n);
    coordinate_run<T, U>(w, i, n, run, nullptr);
    gather_weight(w, i, n, run);
    std::copy(w.first + i, w.first + i + n, run.first);
    std::copy(w.second + i, w.second + i + n, run.second);
    std::fill(run.first + n, run.first + end, U(0));
    std::fill(run.second + n, run.second + end, U(0));
    for (int64_t j = 0; j < end; j += width) {
      const Vec<U> g = load(run.gradient + j) * before * after;
      Vec<U> m = load(run.first + j), v = load(run.second + j);
      m += take1 * (g - m);
      v = keep * v + take2 * g * g;
      store(run.first + j, m);
      store(run.second + j, v);
      const Vec<U> root = square_root(v * correction), size = m < zero ? -m : m;
      // Squares below the dtype's range belong to entries that are as good as on no path.
      Vec<U> ratio = root > zero ? size / (root + eps) : zero;
      ratio = ratio > one ? one : ratio;
      const Vec<U> step = raise<U>(ratio, rule.power) * rate * load(run.kappa + j);
      store(run.weight + j, load(run.weight + j) - (m < zero ? -step : step));
    }
    shift<true, U>(w, i, n, run.weight, w.weight + i);
    std::copy(run.first, run.first + n, w.first + i);
    std::copy(run.second, run.second + n, w.second + i);
  }
}

// Σ κ w², without `exponent`: γ² of the paths through this weight, where each takes it once.
template <typename T>
double path_mass(const StepWeight<T>& w, int64_t first, int64_t last) {
  Run<double> run;
  SquareSum<double> square;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    gather_weight(w, i, n, run);
    const double* const kappa = gather_kappa(w, i, n, run.kappa);
    for (int64_t j = 0; j < padded<double>(n); j += Simd<double>::width) square.add(kappa + j, run.weight + j);
  }
  return square.total();
}

// Σ g² and Σ (g/κ)² in the weight's own coordinates; before · after of `rule` multiplies the quotient.
template <typename T>
void raw_and_divided(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last, double* raw,
                     double* divided) {
  Run<double> run;
  SgdRule plain = rule;
  plain.momentum = plain.decay = 0;
  plain.rate = -1;
  StepWeight<T> bare = w;
  bare.first = nullptr;
  StepSums sums{};
  SquareSum<double> ignored;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    sgd_run<T, double, false>(bare, plain, i, n, run, ignored, sums);
    shift<true, double>(w, i, n, run.step, run.step);
    for (int64_t j = 0; j < n; ++j) {
      const double g = static_cast<double>(w.gradient[i + j]);
      *raw += g * g;
      *divided += run.step[j] * run.step[j];
    }
  }
}

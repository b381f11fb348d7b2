// path_step: a step of the optimisers entry by entry. Runs of entries are brought to canonical coordinates (ops.h), which
// is exact, and all arithmetic is done there by the same vector loops whatever the scaling. U is what it is done in.

constexpr int64_t kRun = 256;

template <typename U>
struct alignas(64) Run {
  U gradient[kRun], weight[kRun], kappa[kRun], first[kRun], second[kRun], step[kRun], delta[kRun];
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

// Σ a b² of a run, in U where that loses nothing of note, else in double.
template <typename U>
double square_sum(const U* a, const U* b, int64_t end) {
  constexpr int64_t width = Simd<U>::width, part = Simd<double>::width;
  Vec<U> sum{}, most{};
  for (int64_t j = 0; j < end; j += width) {
    const Vec<U> x = load(b + j);
    const Vec<U> square = a ? load(a + j) * x * x : x * x;
    sum += square;
    most = square > most ? square : most;
  }
  if constexpr (sizeof(U) < sizeof(double)) {
    // Terms below the range are then as nothing beside the largest, and none is above it.
    const double largest = static_cast<double>(largest_lane<U>(most));
    if (!(largest >= 0x1p-60 && largest <= 0x1p100)) {
      Vec<double> wide{};
      typedef U Part __attribute__((vector_size(sizeof(U) * part)));
      for (int64_t j = 0; j < end; j += part) {
        Part x, y;
        std::memcpy(&x, b + j, sizeof(x));
        const Vec<double> v = __builtin_convertvector(x, Vec<double>);
        if (a) std::memcpy(&y, a + j, sizeof(y));
        wide += a ? v * v * __builtin_convertvector(y, Vec<double>) : v * v;
      }
      double total = 0;
      for (int64_t l = 0; l < part; ++l) total += wide[l];
      return total;
    }
  }
  double total = 0;
  for (int64_t l = 0; l < width; ++l) total += static_cast<double>(sum[l]);
  return total;
}

// The largest |x|; a nan is none.
template <typename U>
struct Largest {
  Vec<U> lanes{};
  void add(const Vec<U>& x) {
    const Vec<U> size = x < Vec<U>{} ? -x : x;
    lanes = size > lanes ? size : lanes;
  }
  double value() const { return static_cast<double>(largest_lane<U>(lanes)); }
};

// Whether a finite gradient's step is too large in the weight's own coordinates.
template <typename T, typename U>
bool lost_entries(const StepWeight<T>& w, double limit, int64_t i, int64_t n, const U* step) {
  double own[kRun];
  shift<true, double>(w, i, n, step, own);
  bool lost = false;
  for (int64_t j = 0; j < n; ++j) lost |= std::isfinite(w.gradient[i + j]) && !(std::abs(own[j]) <= limit);
  return lost;
}

// The quotient with the decay, d, into `step`, of whole vectors.
template <typename T, typename U, bool measure>
void descent(const StepWeight<T>& w, const SgdRule& rule, int64_t i, int64_t n, Run<U>& run, const U* kappa, U* step,
             StepSums& sums) {
  const int64_t end = padded<U>(n);
  if (rule.given) {
    shift<false, U>(w, i, n, w.gradient + i, step);
    gather_weight(w, i, n, run);
    for (int64_t j = 0; j < n; ++j) step[j] -= run.weight[j];
    std::fill(step + n, step + end, U(0));
    return;
  }
  gather_gradient(w, i, n, run);
  if (rule.decay != 0) gather_weight(w, i, n, run);
  const U before = static_cast<U>(rule.before), after = static_cast<U>(rule.after);
  const U decay = static_cast<U>(rule.decay);
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
  Largest<U> steps, paths, pulls;
  const Vec<U> infinity = all<U>(std::numeric_limits<double>::infinity());
  for (int64_t j = 0; j < end; j += Simd<U>::width) {
    const Vec<U> g = load(run.gradient + j), k = load(divisor + j);
    // On no path there is no step.
    const Vec<U> quotient = g * before / (k == Vec<U>{} ? infinity : k) * after;
    Vec<U> d = k == Vec<U>{} ? g - g : quotient;
    if (rule.decay != 0) d += decay * load(run.weight + j);
    store(step + j, d);
    if (measure) {
      steps.add(d);
      pulls.add(g);
      if (n == end) paths.add(load(kappa + j));
    }
  }
  if (!measure) return;
  sums.pulled |= pulls.value() > 0;
  sums.paths |= paths.value() > 0;
  for (int64_t j = 0; n != end && j < n; ++j) sums.paths |= kappa[j] > U(0);
  if (!(steps.value() * power_of_two(std::clamp<int64_t>(w.most_down, -1000, 1000)) <= rule.limit)) {
    sums.lost |= lost_entries(w, rule.limit, i, n, step);
  }
}

// Where a run's steps are kept from one pass to the other: in κ's place, if whole vectors are there.
template <typename T, typename U>
U* kept(const StepWeight<T>& w, int64_t i, int64_t n) {
  if constexpr (std::is_same_v<T, U>) {
    if (w.spare && n == kRun) return w.spare + i;
  }
  return nullptr;
}

// From d to Δ, unshortened, in run.delta, and the new momentum in run.first.
template <typename T, typename U>
void momentum_step(const StepWeight<T>& w, const SgdRule& rule, int64_t i, int64_t n, const U* d, Run<U>& run) {
  const int64_t end = padded<U>(n);
  const U momentum = static_cast<U>(rule.momentum), rate = static_cast<U>(-rule.rate);
  if (w.first) {
    shift<false, U>(w, i, n, w.first + i, run.first);
    std::fill(run.first + n, run.first + end, U(0));
  }
  for (int64_t j = 0; j < end; j += Simd<U>::width) {
    Vec<U> step = load(d + j);
    if (w.first) {
      const Vec<U> m = momentum * load(run.first + j) + step;
      store(run.first + j, m);
      step = rule.nesterov ? step + momentum * m : m;
    }
    store(run.delta + j, rate * step);
  }
}

template <typename T, typename U>
StepSums sgd_measure(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last) {
  Run<U> run;
  StepSums sums{};
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    const U* const kappa = gather_kappa(w, i, n, run.kappa);
    descent<T, U, true>(w, rule, i, n, run, kappa, run.step, sums);
    if (rule.bounded && w.first) {
      momentum_step(w, rule, i, n, run.step, run);
      sums.square += square_sum(kappa, run.delta, padded<U>(n));
    } else if (rule.bounded) {
      sums.square += square_sum(kappa, run.step, padded<U>(n));
    }
    if (U* const place = kept<T, U>(w, i, n)) std::memcpy(place, run.step, sizeof(run.step));
  }
  if (!w.first) sums.square *= rule.rate * rule.rate;
  return sums;
}

template <typename T, typename U>
void sgd_apply(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last) {
  if (rule.given && rule.factor == 1) {  // to the bit
    std::copy(w.gradient + first, w.gradient + last, w.moved + first);
    return;
  }
  Run<U> run;
  StepSums sums{};
  const U factor = static_cast<U>(rule.factor);
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    const U* step = kept<T, U>(w, i, n);
    if (!step) {
      descent<T, U, false>(w, rule, i, n, run, gather_kappa(w, i, n, run.kappa), run.step, sums);
      step = run.step;
    }
    if (w.first) {
      momentum_step(w, rule, i, n, step, run);
      step = run.delta;
    }
    gather_weight(w, i, n, run);
    const U scale = w.first ? factor : static_cast<U>(-rule.rate * rule.factor);
    for (int64_t j = 0; j < padded<U>(n); j += Simd<U>::width) {
      store(run.weight + j, load(run.weight + j) + scale * load(step + j));
    }
    shift<true, U>(w, i, n, run.weight, w.moved + i);
    if (w.first) shift<true, U>(w, i, n, run.first, w.first + i);
  }
}

template <typename T, typename U>
StepSums coordinate_measure(const StepWeight<T>& w, int64_t first, int64_t last) {
  Run<U> run;
  StepSums sums{};
  const Vec<U> zero{};
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i), end = padded<U>(n);
    gather_gradient(w, i, n, run);
    const U* const kappa = gather_kappa(w, i, n, run.kappa);
    Largest<U> paths, pulls;
    for (int64_t j = 0; j < end; j += Simd<U>::width) {
      const Vec<U> k = load(kappa + j), g = load(run.gradient + j);
      const Vec<U> unit = k > zero ? all<U>(1) / square_root(k) : zero;
      if (n == end) paths.add(k);
      pulls.add(g);
      store(run.kappa + j, unit);
      store(run.gradient + j, g * unit);
    }
    sums.pulled |= pulls.value() > 0;
    sums.paths |= paths.value() > 0;
    for (int64_t j = 0; n != end && j < n; ++j) sums.paths |= run.kappa[j] > U(0);
    sums.square += square_sum<U>(nullptr, run.gradient, end);
    if constexpr (std::is_same_v<T, U>) {
      if (w.spare) std::copy(run.kappa, run.kappa + n, w.spare + i);
    }
  }
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
  const bool spare = std::is_same_v<T, U> && w.spare;  // 1/sqrt(κ) stands in κ's place
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i), end = padded<U>(n);
    gather_gradient(w, i, n, run);
    gather_weight(w, i, n, run);
    const U* const kappa = gather_kappa(w, i, n, run.kappa);
    // Whole vectors of the averages are changed where they are.
    bool copied = true;
    U *average = run.first, *square = run.second;
    if constexpr (std::is_same_v<T, U>) {
      copied = n != end;
      if (!copied) average = w.first + i, square = w.second + i;
    }
    if (copied) {
      std::copy(w.first + i, w.first + i + n, average);
      std::copy(w.second + i, w.second + i + n, square);
      std::fill(average + n, average + end, U(0));
      std::fill(square + n, square + end, U(0));
    }
    for (int64_t j = 0; j < end; j += width) {
      const Vec<U> k = load(kappa + j);
      const Vec<U> unit = spare ? k : k > zero ? one / square_root(k) : zero;
      const Vec<U> g = load(run.gradient + j) * unit * before * after;
      Vec<U> m = load(average + j), v = load(square + j);
      m += take1 * (g - m);
      v = keep * v + take2 * g * g;
      store(average + j, m);
      store(square + j, v);
      const Vec<U> root = square_root(v * correction), size = m < zero ? -m : m;
      // Squares below the dtype's range belong to entries that are as good as on no path.
      Vec<U> ratio = root > zero ? size / (root + eps) : zero;
      ratio = ratio > one ? one : ratio;
      const Vec<U> step = raise<U>(ratio, rule.power) * rate * unit;
      store(run.weight + j, load(run.weight + j) - (m < zero ? -step : step));
    }
    shift<true, U>(w, i, n, run.weight, w.moved + i);
    if (!copied) continue;
    std::copy(average, average + n, w.first + i);
    std::copy(square, square + n, w.second + i);
  }
}

// Σ κ w², without `exponent`: γ² of the paths through this weight, where each takes it once.
template <typename T>
double path_mass(const StepWeight<T>& w, int64_t first, int64_t last) {
  Run<double> run;
  double sum = 0;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    gather_weight(w, i, n, run);
    sum += square_sum(gather_kappa(w, i, n, run.kappa), run.weight, padded<double>(n));
  }
  return sum;
}

// Σ g² and Σ (g/κ)² in the weight's own coordinates; before · after of `rule` multiplies the quotient.
template <typename T>
void raw_and_divided(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last, double* raw,
                     double* divided) {
  Run<double> run;
  SgdRule plain = rule;
  plain.decay = 0;
  StepSums sums{};
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    descent<T, double, false>(w, plain, i, n, run, gather_kappa(w, i, n, run.kappa), run.step, sums);
    shift<true, double>(w, i, n, run.step, run.step);
    for (int64_t j = 0; j < n; ++j) {
      const double g = static_cast<double>(w.gradient[i + j]);
      *raw += g * g;
      *divided += run.step[j] * run.step[j];
    }
  }
}

// x's mantissa, its exponent added to `exponent`.
inline double split(double x, int64_t& exponent) {
  int own = 0;
  const double mantissa = std::frexp(x, &own);
  exponent += own;
  return mantissa;
}

// Entries [i, i + n) one by one, as numbers of any size.
template <typename T>
void norm_gradient_exactly(const StepWeight<T>& w, const Number& factor, int64_t i, int64_t n, T* out) {
  for_rows(w.columns, i, n, [&](int64_t row, int64_t column, int64_t j, int64_t m) {
    for (int64_t q = 0; q < m; ++q) {
      const int64_t at = row * w.row_stride + (column + q) * w.column_stride;
      const int64_t e = (w.row ? w.row[row] : 0) + (w.column ? w.column[column + q] : 0);
      // κ scales as 1/weight² does.
      int64_t exponent = factor.exponent + 2 * e + (w.entry_exponents ? w.entry_exponents[at] : 0);
      const double product = split(static_cast<double>(w.weight[i + j + q]), exponent) *
                             split(static_cast<double>(w.kappa[at]), exponent);
      const double scaled = product * split(factor.mantissa, exponent);
      const int bounded = static_cast<int>(std::clamp<int64_t>(exponent, -100000, 100000));
      out[j + q] = product == 0 ? T(0) : static_cast<T>(std::ldexp(scaled, bounded));
    }
  });
}

template <typename T>
void norm_gradient(const StepWeight<T>& w, const Number& scale, int64_t first, int64_t last, T* out) {
  const Number factor = Number{2, w.exponent} * scale;
  double before, after;
  factor.split(before, after);
  const bool common = w.tables && !w.entry_exponents && std::abs(factor.exponent) < 400 &&
                      std::abs(factor.mantissa) > 0x1p-100 && std::abs(factor.mantissa) < 0x1p100;
  const auto home = [](double x) { return std::abs(x) > 0x1p-200 && std::abs(x) < 0x1p200; };
  Run<double> run;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    bool all = common;
    if (common) {
      gather_weight(w, i, n, run);
      const double* const kappa = gather_kappa(w, i, n, run.kappa);
      for (int64_t j = 0; j < n; ++j) {
        // Of a zero, or without a path, it is 0, whatever the scale.
        const bool zero = w.weight[i + j] == T(0) || kappa[j] == 0;
        all &= zero || (home(run.weight[j]) && home(kappa[j]));
        run.step[j] = zero ? 0 : run.weight[j] * kappa[j] * before * after;
      }
    }
    if (all) shift<false, double>(w, i, n, run.step, out + (i - first));
    else norm_gradient_exactly(w, factor, i, n, out + (i - first));
  }
}

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

// e of an entry.
template <typename T>
inline int64_t exponent_at(const StepWeight<T>& w, int64_t row, int64_t column) {
  return (w.row ? w.row[row] : 0) + (w.column ? w.column[column] : 0);
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
    for (int64_t q = 0; q < m; ++q) {
      const int64_t e = std::clamp<int64_t>(exponent_at(w, row, column + q), -1000, 1000);
      to[q] = static_cast<Out>(static_cast<double>(from[q]) * power_of_two<double>(down ? -e : e));
    }
  });
}

// The run's κ, without exponents, in whole vectors: entries beyond the last are 1.
template <typename T, typename U>
const U* gather_kappa(const StepWeight<T>& w, int64_t i, int64_t n, U* out) {
  const bool dense = w.row_stride == w.columns && w.column_stride == 1;
  if constexpr (std::is_same_v<T, U>) {
    if (dense && n % Simd<U>::width == 0) return w.kappa + i;
  }
  for_rows(w.columns, i, n, [&](int64_t row, int64_t column, int64_t j, int64_t m) {
    const int64_t at = row * w.row_stride + column * w.column_stride;
    const T* const from = w.kappa + at;
    if (w.column_stride == 0) {
      std::fill(out + j, out + j + m, static_cast<U>(*from));
    } else {
      for (int64_t q = 0; q < m; ++q) out[j + q] = static_cast<U>(from[q]);
    }
  });
  std::fill(out + n, out + padded<U>(n), U(1));
  return out;
}

// In κ's coordinates, padded with 0: a gradient scales as 1/weight does.
template <typename T, typename U>
void gather_gradient(const StepWeight<T>& w, int64_t i, int64_t n, Run<U>& run) {
  shift<true, U>(w, i, n, w.gradient + i, run.gradient);
  std::fill(run.gradient + n, run.gradient + padded<U>(n), U(0));
}
template <typename T, typename U>
void gather_weight(const StepWeight<T>& w, int64_t i, int64_t n, Run<U>& run) {
  shift<false, U>(w, i, n, w.weight + i, run.weight);
  std::fill(run.weight + n, run.weight + padded<U>(n), U(0));
}

// w += x · 2^-e: canonical coordinates' x.
template <typename T, typename U, typename Out>
void add_step(const StepWeight<T>& w, int64_t i, int64_t n, const U* x, Out* weight) {
  for_rows(w.columns, i, n, [&](int64_t row, int64_t column, int64_t j, int64_t m) {
    const U* const from = x + j;
    Out* const to = weight + j;
    const U r = w.tables && w.row_down ? w.row_down[row] : T(1);
    if (w.tables && w.column_down) {
      const T* const c = w.column_down + column;
#pragma GCC ivdep
      for (int64_t q = 0; q < m; ++q) to[q] = static_cast<Out>(static_cast<U>(to[q]) + from[q] * (r * static_cast<U>(c[q])));
    } else if (w.tables) {
#pragma GCC ivdep
      for (int64_t q = 0; q < m; ++q) to[q] = static_cast<Out>(static_cast<U>(to[q]) + from[q] * r);
    } else {
      for (int64_t q = 0; q < m; ++q) {
        const int64_t e = exponent_at(w, row, column + q);
        to[q] = static_cast<Out>(static_cast<double>(to[q]) + Number{static_cast<double>(from[q]), -e}.value());
      }
    }
  });
}

// The κ of one entry, without `exponent`; `at` by its strides.
template <typename T>
Number entry_kappa(const StepWeight<T>& w, int64_t at) {
  return {static_cast<double>(w.kappa[at]), w.entry_exponents ? w.entry_exponents[at] : 0};
}

// Calls f(j, at) for entries i + j, j < n, `at` being where κ has them.
template <typename T, typename F>
void for_entries(const StepWeight<T>& w, int64_t i, int64_t n, const F& f) {
  for_rows(w.columns, i, n, [&](int64_t row, int64_t column, int64_t j, int64_t m) {
    for (int64_t q = 0; q < m; ++q) f(j + q, row * w.row_stride + (column + q) * w.column_stride);
  });
}

// A sum of squares: in double while it is in range, and what is not.
struct Squares {
  double near = 0;
  Number far;
  Number total() const { return far + Number{near, 0}; }
};

// Adds Σ a b² of a run (b² without a), in U where that loses nothing of note, else in double or as numbers of any size.
template <typename U>
void add_squares(const U* a, const U* b, int64_t end, Squares& squares) {
  constexpr int64_t width = Simd<U>::width, part = Simd<double>::width;
  Vec<U> sum{};
  for (int64_t j = 0; j < end; j += width) {
    const Vec<U> x = load(b + j);
    sum += a ? load(a + j) * x * x : x * x;
  }
  double total = 0;
  for (int64_t l = 0; l < width; ++l) total += static_cast<double>(sum[l]);
  const bool single = sizeof(U) < sizeof(double);
  // Terms below the range are then as nothing beside it, and none is above.
  if (total >= (single ? 0x1p-52 : 0x1p-792) && total <= (single ? 0x1p100 : 0x1p900)) {
    squares.near += total;
    return;
  }
  if constexpr (single) {
    Vec<double> wide{};
    for (int64_t j = 0; j < end; j += part) {
      const Vec<double> v = load_wide(b + j);
      wide += a ? v * v * load_wide(a + j) : v * v;
    }
    for (int64_t l = 0; l < part; ++l) squares.near += wide[l];
  } else {
    for (int64_t j = 0; j < end; ++j) {
      const Number x = Number{b[j], 0}.normal();
      if (x.mantissa != 0) squares.far = squares.far + x * x * Number{a ? a[j] : 1.0, 0}.normal();
    }
  }
}

// Σ κ b², without `exponent`; `kappa` is gathered.
template <typename T, typename U>
void add_lengths(const StepWeight<T>& w, int64_t i, int64_t n, const U* kappa, const U* b, Squares& squares) {
  if (!w.entry_exponents) return add_squares(kappa, b, padded<U>(n), squares);
  for_entries(w, i, n, [&](int64_t j, int64_t at) {
    const Number x = Number{static_cast<double>(b[j]), 0}.normal();
    if (x.mantissa != 0) squares.far = squares.far + x * x * entry_kappa(w, at).normal();
  });
}

// The largest |x|, above every number where one is nan. The bits of numbers without a sign are in order.
template <typename U>
class Largest {
 public:
  void add(const Vec<U>& x) { lanes_ = maximum(bits_of<U>(x) & std::numeric_limits<Int<U>>::max(), lanes_); }
  double value() const {
    const Int<U> most = largest_lane(lanes_);
    U result;
    std::memcpy(&result, &most, sizeof(U));
    return static_cast<double>(result);
  }

 private:
  Ints<U> lanes_{};
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

// d of entries [i, i + n) one by one, as numbers of any size.
template <typename T, typename U>
void exact_descent(const StepWeight<T>& w, const SgdRule& rule, int64_t i, int64_t n, const Run<U>& run, U* step) {
  for_entries(w, i, n, [&](int64_t j, int64_t at) {
    Number divisor = entry_kappa(w, at) * rule.kappa_share;
    const int64_t e = exponent_at(w, (i + j) / w.columns, (i + j) % w.columns);
    if (rule.damping.mantissa != 0) divisor = divisor + rule.damping * Number{1, -2 * e};
    const double g = static_cast<double>(w.gradient[i + j]);
    double d = g - g;
    if (divisor.mantissa != 0) d = (Number{g, -e}.normal() * rule.quotient / divisor.normal()).normal().value();
    if (rule.decay != 0) d += rule.decay * static_cast<double>(run.weight[j]);
    step[j] = static_cast<U>(d);
  });
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
  if (rule.damping.mantissa != 0) {
    // γ² is one number for all weights: its share is 2^-2e of it.
    const double share = rule.kappa_share.value();
    std::fill(run.second, run.second + n, static_cast<U>(std::sqrt(rule.damping.value())));
    shift<true, U>(w, i, n, run.second, run.second);
    for (int64_t j = 0; j < n; ++j) {
      run.second[j] = static_cast<U>(kappa[j] * share + run.second[j] * run.second[j]);
    }
    std::fill(run.second + n, run.second + end, U(1));
    divisor = run.second;
  }
  Largest<U> steps, paths, pulls;
  const Vec<U> infinity = all<U>(std::numeric_limits<double>::infinity());
  for (int64_t j = 0; j < end; j += Simd<U>::width) {
    const Vec<U> g = load(run.gradient + j), k = load(divisor + j);
    // On no path there is no step.
    Vec<U> d = g * before / (k == Vec<U>{} ? infinity : k) * after;
    if (rule.decay != 0) d += decay * load(run.weight + j);
    store(step + j, d);
    if (measure) {
      steps.add(d);
      pulls.add(g);
      if (n == end) paths.add(load(kappa + j));
    }
  }
  if (rule.exact) exact_descent(w, rule, i, n, run, step);
  if (!measure) return;
  sums.pulled |= pulls.value() != 0;
  sums.paths |= paths.value() > 0;
  for (int64_t j = 0; n != end && j < n; ++j) sums.paths |= kappa[j] > U(0);
  const double most = steps.value() * power_of_two<double>(std::clamp<int64_t>(w.most_down, -1000, 1000));
  if (rule.exact || !(most <= rule.limit)) {
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
  Squares squares;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    const U* const kappa = gather_kappa(w, i, n, run.kappa);
    descent<T, U, true>(w, rule, i, n, run, kappa, run.step, sums);
    if (rule.bounded && w.first) momentum_step(w, rule, i, n, run.step, run);
    if (rule.bounded) add_lengths(w, i, n, kappa, w.first ? run.delta : run.step, squares);
    if (U* const place = kept<T, U>(w, i, n)) std::memcpy(place, run.step, sizeof(run.step));
  }
  sums.square = squares.total();
  if (!w.first) sums.square = sums.square * Number{rule.rate, 0}.normal() * Number{rule.rate, 0}.normal();
  return sums;
}

template <typename T, typename U>
void sgd_apply(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last) {
  if (rule.given && !rule.shortened) {  // to the bit
    std::copy(w.gradient + first, w.gradient + last, w.moved + first);
    return;
  }
  Run<U> run;
  StepSums sums{};
  const U factor = static_cast<U>(rule.factor), more = static_cast<U>(rule.more);
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
    for (int64_t j = 0; j < padded<U>(n); j += Simd<U>::width) store(run.delta + j, factor * load(step + j) * more);
    add_step(w, i, n, run.delta, w.moved + i);
    if (w.first) shift<true, U>(w, i, n, run.first, w.first + i);
  }
}

// The largest 1/sqrt(κ): finite, so that 0 times it is 0.
constexpr double kFarthest = 0x1p1000;

// 1/sqrt(κ) of a run, without `exponent`, and 0 on no path; padded with 1.
template <typename T, typename U>
void gather_units(const StepWeight<T>& w, int64_t i, int64_t n, U* out) {
  const Vec<U> zero{};
  const U* const kappa = gather_kappa(w, i, n, out);
  for (int64_t j = 0; j < padded<U>(n); j += Simd<U>::width) {
    const Vec<U> k = load(kappa + j);
    store(out + j, k > zero ? inverse_root(k) : zero);
  }
  if (!w.entry_exponents) return;
  for_entries(w, i, n, [&](int64_t j, int64_t at) {
    const Number k = entry_kappa(w, at);
    if (k.mantissa > 0) out[j] = static_cast<U>(std::min((Number{1, 0} / k.root()).normal().value(), kFarthest));
  });
}

template <typename T, typename U>
StepSums coordinate_measure(const StepWeight<T>& w, int64_t first, int64_t last) {
  Run<U> run;
  StepSums sums{};
  Squares squares;
  Largest<U> units, pulls;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i), end = padded<U>(n);
    gather_gradient(w, i, n, run);
    gather_units(w, i, n, run.kappa);
    std::fill(run.kappa + n, run.kappa + end, U(0));
    for (int64_t j = 0; j < end; j += Simd<U>::width) {
      const Vec<U> unit = load(run.kappa + j), g = load(run.gradient + j);
      units.add(unit);
      pulls.add(g);
      store(run.gradient + j, g * unit);
    }
    for (int64_t j = 0; w.entry_exponents && j < n; ++j) sums.lost |= run.kappa[j] == kFarthest && w.gradient[i + j] != 0;
    add_squares<U>(nullptr, run.gradient, end, squares);
    if constexpr (std::is_same_v<T, U>) {
      if (w.spare) std::copy(run.kappa, run.kappa + n, w.spare + i);
    }
  }
  sums.square = squares.total();
  sums.largest_unit = units.value();
  sums.paths = sums.largest_unit > 0;
  sums.pulled = pulls.value() != 0;
  return sums;
}

// Apart, so that what it takes through memory costs nothing elsewhere.
template <typename U>
[[gnu::noinline]] void raise_lanes(U* lanes, double power) {
  for (int64_t l = 0; l < Simd<U>::width; ++l) lanes[l] = static_cast<U>(std::pow(static_cast<double>(lanes[l]), power));
}
template <typename U>
inline Vec<U> raise(const Vec<U>& x, double power) {
  if (power == 1) return x;
  if (power == 2) return x * x;
  if (power == 3) return x * x * x;
  U lanes[Simd<U>::width];
  store(lanes, x);
  raise_lanes(lanes, power);
  return load(lanes);
}

template <typename T, typename U>
bool coordinate_apply(const StepWeight<T>& w, const CoordinateRule& rule, int64_t first, int64_t last, bool write) {
  constexpr int64_t width = Simd<U>::width;
  Run<U> run;
  const U before = static_cast<U>(rule.before), after = static_cast<U>(rule.after);
  const U keep = static_cast<U>(rule.beta2), take1 = static_cast<U>(1 - rule.beta1);
  const U take2 = static_cast<U>(1 - rule.beta2), correction = static_cast<U>(rule.correction);
  const U eps = static_cast<U>(rule.eps), rate = static_cast<U>(rule.rate);
  const Vec<U> zero{}, one = all<U>(1);
  bool lost = false;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i), end = padded<U>(n);
    gather_gradient(w, i, n, run);
    const U* units = run.kappa;
    if (std::is_same_v<T, U> && w.spare) units = gather_kappa(w, i, n, run.kappa);  // what was measured is there
    else gather_units(w, i, n, run.kappa);
    // Whole vectors of the averages are changed where they are.
    bool copied = true;
    U *average = run.first, *square = run.second;
    if constexpr (std::is_same_v<T, U>) {
      copied = n != end || !write;
      if (!copied) average = w.first + i, square = w.second + i;
    }
    if (copied) {
      std::copy(w.first + i, w.first + i + n, average);
      std::copy(w.second + i, w.second + i + n, square);
      std::fill(average + n, average + end, U(0));
      std::fill(square + n, square + end, U(0));
    }
    for (int64_t j = 0; j < end; j += width) {
      const Vec<U> unit = load(units + j), g = load(run.gradient + j) * unit * before * after;
      Vec<U> m = load(average + j), v = load(square + j);
      m += take1 * (g - m);
      v = keep * v + take2 * g * g;
      store(average + j, m);
      store(square + j, v);
      const Vec<U> square_seen = v * correction, inverse = inverse_root(square_seen), size = m < zero ? -m : m;
      // Squares below the dtype's range belong to entries that are as good as on no path.
      Vec<U> ratio = square_seen > zero ? size * inverse : zero;
      if (rule.eps > 0) ratio = square_seen > zero ? ratio / (one + eps * inverse) : zero;
      ratio = ratio > one ? one : ratio;
      const Vec<U> step = raise<U>(ratio, rule.power) * rate * unit;
      store(run.delta + j, m < zero ? step : -step);
    }
    if (!write) {
      double own[kRun];
      std::copy(w.weight + i, w.weight + i + n, own);
      add_step(w, i, n, run.delta, own);
      for (int64_t j = 0; j < n; ++j) {
        lost |= std::isfinite(w.gradient[i + j]) && std::isfinite(w.weight[i + j]) && !(std::abs(own[j]) <= rule.limit);
      }
      continue;
    }
    add_step(w, i, n, run.delta, w.moved + i);
    if (!copied) continue;
    std::copy(average, average + n, w.first + i);
    std::copy(square, square + n, w.second + i);
  }
  return lost;
}

// Σ κ w², without `exponent`: γ² of the paths through this weight, where each takes it once.
template <typename T>
Number path_mass(const StepWeight<T>& w, int64_t first, int64_t last) {
  Run<double> run;
  Squares squares;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    gather_weight(w, i, n, run);
    add_lengths(w, i, n, gather_kappa(w, i, n, run.kappa), run.weight, squares);
  }
  return squares.total();
}

// Σ g² and Σ d² in the weight's own coordinates, without decay.
template <typename T>
void raw_and_divided(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last, Number* raw,
                     Number* divided) {
  Run<double> run;
  SgdRule plain = rule;
  plain.decay = 0;
  StepSums sums{};
  Squares whole, parts;
  for (int64_t i = first; i < last; i += kRun) {
    const int64_t n = std::min(kRun, last - i);
    descent<T, double, false>(w, plain, i, n, run, gather_kappa(w, i, n, run.kappa), run.step, sums);
    shift<true, double>(w, i, n, run.step, run.step);
    std::copy(w.gradient + i, w.gradient + i + n, run.gradient);
    add_squares<double>(nullptr, run.gradient, padded<double>(n), whole);
    add_squares<double>(nullptr, run.step, padded<double>(n), parts);
  }
  *raw = whole.total();
  *divided = parts.total();
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
      const int64_t e = exponent_at(w, row, column + q);
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

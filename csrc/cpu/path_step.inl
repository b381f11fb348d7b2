// path_step: a step of the optimisers entry by entry, in runs of one row each. A run is brought to canonical coordinates
// (ops.h), which is exact, and all arithmetic is done there by the same vector loops whatever the scaling. U is what it is
// done in.

// Entries [i, i + n) of a weight, which lie in one row, from `column` on.
struct Span {
  int64_t i, n, row, column;
};

// Calls f(span) for the runs of entries [first, last).
template <typename F>
inline void for_runs(int64_t columns, int64_t first, int64_t last, const F& f) {
  Span s{first, 0, first / columns, first % columns};
  for (; s.i < last; s.i += s.n) {
    s.n = std::min({kRun, columns - s.column, last - s.i});
    f(s);
    s.column += s.n;
    if (s.column == columns) ++s.row, s.column = 0;
  }
}

// Buffers of a run; entries beyond n hold nothing of use.
template <typename U>
struct alignas(64) Run {
  U gradient[kRun], weight[kRun], kappa[kRun], first[kRun], second[kRun], step[kRun], delta[kRun];
};

template <typename U>
inline Vec<U> all(double value) {
  return Vec<U>{} + static_cast<U>(value);
}

// e of an entry.
template <typename T>
inline int64_t exponent_at(const StepWeight<T>& w, int64_t row, int64_t column) {
  return (w.row ? w.row[row] : 0) + (w.column ? w.column[column] : 0);
}
// 2^-e or 2^e of a row, and of a run's columns.
template <bool down, typename T>
inline T row_factor(const StepWeight<T>& w, const Span& s) {
  const T* const rows = down ? w.row_down : w.row_up;
  return rows ? rows[s.row] : T(1);
}
template <bool down, typename T>
inline const T* column_factors(const StepWeight<T>& w, const Span& s) {
  const T* const columns = down ? w.column_down : w.column_up;
  return columns ? columns + s.column : kOnes<T>.data();
}

// out = in · 2^-e, or in · 2^e, of a run.
template <bool down, typename U, typename T, typename In, typename Out>
void shift(const StepWeight<T>& w, const Span& s, const In* in, Out* out) {
  if (w.tables) {
    const U r = row_factor<down>(w, s);
    const T* const c = column_factors<down>(w, s);
#pragma GCC ivdep
    for (int64_t q = 0; q < s.n; ++q) out[q] = static_cast<Out>(static_cast<U>(in[q]) * (r * static_cast<U>(c[q])));
    return;
  }
  for (int64_t q = 0; q < s.n; ++q) {
    const int64_t e = exponent_at(w, s.row, s.column + q);
    out[q] = static_cast<Out>(Number{static_cast<double>(in[q]), down ? -e : e}.value());
  }
}

// A run in canonical coordinates: where it is, with its factors, or a copy.
template <typename U>
struct Canonically {
  const U* x;
  U row;
  const U* columns;

  // The vector from q on, m of whose lanes are in the run; the others are 0.
  Vec<U> at(int64_t q, int64_t m) const { return load(x + q, m) * (row * load(columns + q, m)); }
};
// A gradient scales as 1/weight does: `down`.
template <bool down, typename U, typename T>
Canonically<U> canonically(const StepWeight<T>& w, const Span& s, const T* x, U* copy) {
  if constexpr (std::is_same_v<T, U>) {
    if (w.tables) return {x + s.i, row_factor<down>(w, s), column_factors<down>(w, s)};
  }
  shift<down, U>(w, s, x + s.i, copy);
  return {copy, U(1), kOnes<U>.data()};
}

// The run's κ, without exponents.
template <typename T, typename U>
const U* gather_kappa(const StepWeight<T>& w, const Span& s, U* out) {
  const T* const from = w.kappa + s.row * w.row_stride + s.column * w.column_stride;
  if (w.column_stride == 0) {
    std::fill(out, out + s.n, static_cast<U>(*from));
    return out;
  }
  if constexpr (std::is_same_v<T, U>) {
    if (w.column_stride == 1) return from;
  }
  for (int64_t q = 0; q < s.n; ++q) out[q] = static_cast<U>(from[q * w.column_stride]);
  return out;
}

// w = (w + growth · w) + factor · x · more · 2^-e: x is in canonical coordinates. Rounded in this order, whatever the tables,
// so that a rescaling by powers of two changes no bit.
template <typename T, typename U, typename Out>
inline void add_step(const StepWeight<T>& w, const Span& s, const U* x, U factor, U more, U growth, Out* weight) {
  if (!w.tables) {
    for (int64_t q = 0; q < s.n; ++q) {
      const Number step{static_cast<double>(factor * x[q] * more), -exponent_at(w, s.row, s.column + q)};
      const U own = static_cast<U>(weight[q]);
      weight[q] = static_cast<Out>(static_cast<double>(own + growth * own) + step.value());
    }
    return;
  }
  const T r = row_factor<true>(w, s), *const c = column_factors<true>(w, s);
  if constexpr (std::is_same_v<T, U> && std::is_same_v<T, Out>) {
    for (int64_t q = 0; q < s.n; q += Simd<T>::width) {
      const int64_t m = s.n - q;
      const Vec<T> own = load(weight + q, m);
      store(weight + q, own + growth * own + factor * load(x + q, m) * more * (r * load(c + q, m)), m);
    }
  } else {
    for (int64_t q = 0; q < s.n; ++q) {
      const U own = static_cast<U>(weight[q]), step = factor * x[q] * more;
      weight[q] = static_cast<Out>(own + growth * own + step * (static_cast<U>(r) * static_cast<U>(c[q])));
    }
  }
}

// The κ of one entry, without `exponent`; `at` by its strides.
template <typename T>
Number entry_kappa(const StepWeight<T>& w, int64_t at) {
  return {static_cast<double>(w.kappa[at]), w.entry_exponents ? w.entry_exponents[at] : 0};
}
// Where κ has the q-th entry of a run.
template <typename T>
inline int64_t kappa_at(const StepWeight<T>& w, const Span& s, int64_t q) {
  return s.row * w.row_stride + (s.column + q) * w.column_stride;
}

// A sum of squares: in double while it is in range, by lanes, and what is not.
struct Squares {
  Vec<double> lanes{};
  double near = 0;
  Number far;
  Number total() const { return far + Number{near + lane_sum<double>(lanes), 0}; }
};

// Adds Σ a b² of a run (b² without a), `sums` by lanes, where U lost nothing of note; else it sums them again, in double or
// as numbers of any size.
template <typename U>
void add_squares(Vec<U> sums, const U* a, const U* b, int64_t n, Squares& squares) {
  constexpr bool single = sizeof(U) < sizeof(double);
  // Terms below the range are then as nothing beside it (of float32, 16 terms below 2^-103: where a · b is, b < 2^23), and
  // none is above.
  if (any_lane(sums >= all<U>(single ? 0x1p-75 : 0x1p-792)) && !any_lane(~(sums <= all<U>(single ? 0x1p96 : 0x1p896)))) {
    U lanes[Simd<U>::width];
    store(lanes, sums);
    for (int64_t l = 0; l < Simd<U>::width; l += Simd<double>::width) squares.lanes += load_wide(lanes + l);
    return;
  }
  int64_t q = 0;
  if constexpr (single) {  // no product of floats is beyond a double
    for (; q + Simd<double>::width <= n; q += Simd<double>::width) {
      const Vec<double> x = load_wide(b + q);
      squares.lanes += a ? load_wide(a + q) * x * x : x * x;
    }
  }
  for (; q < n; ++q) {
    if constexpr (single) {
      squares.near += static_cast<double>(b[q]) * b[q] * (a ? a[q] : U(1));
    } else {
      const Number x = Number{b[q], 0}.normal();
      if (x.mantissa != 0) squares.far = squares.far + x * x * Number{a ? a[q] : 1.0, 0}.normal();
    }
  }
}
template <typename U>
void add_squares(const U* a, const U* b, int64_t n, Squares& squares) {
  Vec<U> sums{};
  for (int64_t q = 0; q < n; q += Simd<U>::width) {
    const Vec<U> x = load(b + q, n - q);
    sums += a ? load(a + q, n - q) * x * x : x * x;
  }
  add_squares(sums, a, b, n, squares);
}

// κ x² of an entry, without `exponent`, x being in the weight's own coordinates: in others it may be no number. Without a
// path it is 0, wherever the units of an entry lie.
template <typename T>
Number entry_length(const StepWeight<T>& w, const Span& s, int64_t q, double own) {
  const Number kappa = entry_kappa(w, kappa_at(w, s, q)).normal();
  const Number x = Number{own, exponent_at(w, s.row, s.column + q)}.normal();
  return kappa.mantissa == 0 || x.mantissa == 0 ? Number{} : x * x * kappa;
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
bool lost_entries(const StepWeight<T>& w, double limit, const Span& s, const U* step) {
  double own[kRun];
  shift<true, double>(w, s, step, own);
  bool lost = false;
  for (int64_t q = 0; q < s.n; ++q) lost |= std::isfinite(w.gradient[s.i + q]) && !(std::abs(own[q]) <= limit);
  return lost;
}

// The quotient of the q-th entry of a run, in the weight's own coordinates.
template <typename T>
Number exact_quotient(const StepWeight<T>& w, const SgdRule& rule, const Span& s, int64_t q) {
  const Number kappa = entry_kappa(w, kappa_at(w, s, q)) * Number{1, 2 * exponent_at(w, s.row, s.column + q)};
  const Number divisor = (kappa * rule.kappa_share + rule.damping).normal();
  const double g = static_cast<double>(w.gradient[s.i + q]);
  if (divisor.mantissa == 0) return {g - g, 0};
  return (Number{g, 0}.normal() * rule.quotient / divisor).normal();
}

// Exponents of numbers that U holds in full.
template <typename U>
constexpr int64_t kHeld = sizeof(U) < sizeof(double) ? 124 : 1020;

// Whether canonical coordinates in U lose what a weight's own hold: a gradient on a path, or what is made of it on the way
// to its quotient by `rule`, or to g/sqrt(κ) where that is null. The latter is looked at beyond what a network within U's
// range can be brought from by powers of two, which so change nothing; with damping they do, by 2^2e.
template <typename U, typename T>
bool far_gradients(const StepWeight<T>& w, const SgdRule* rule) {
  const bool damped = rule && rule->damping.mantissa != 0;
  if (w.most_down <= kTabled<U> / (damped ? 2 : 1)) return false;
  const bool products = damped || w.most_down > 2 * kHeld<U>;
  bool far = false;
  const auto check = [&](const Number& x) {
    far |= !x.moderate(kHeld<U>);
    return x;
  };
  for_runs(w.columns, 0, w.size, [&](const Span& s) {
    for (int64_t q = 0; q < s.n && !far; ++q) {
      const int64_t e = exponent_at(w, s.row, s.column + q);
      const Number kappa = entry_kappa(w, kappa_at(w, s, q));
      // Damping is checked of every entry: what is infinite is no divisor, even of 0.
      const Number damping = rule ? check(rule->damping * Number{1, -2 * e}) : Number{};
      const Number divisor = (rule ? kappa * rule->kappa_share + damping : kappa.root()).normal();
      const double g = static_cast<double>(w.gradient[s.i + q]);
      if (g == 0 || !std::isfinite(g) || divisor.mantissa == 0) continue;
      const Number canonical = check(Number{g, -e}.normal());
      if (!products) continue;
      if (rule) check(check(check(canonical * Number{rule->before, 0}) / divisor) * Number{rule->after, 0});
      else check(canonical / divisor);
    }
  });
  return far;
}

// What quotients came to.
template <typename U>
struct Found {
  Largest<U> steps, paths, pulls;
  Vec<U> squares{};  // Σ κ q² of a run, by lanes
};

// A run's quotients, q; of a step that is given, that step, where it has a path.
template <typename T, typename U, bool measure>
void quotients(const StepWeight<T>& w, const SgdRule& rule, const Span& s, Run<U>& run, const U* kappa, U* out,
               Found<U>& found) {
  constexpr int64_t width = Simd<U>::width;
  if (rule.given) {
    for (int64_t q = 0; q < s.n; ++q) {
      const U step = static_cast<U>(w.gradient[s.i + q]) - static_cast<U>(w.weight[s.i + q]);
      run.gradient[q] = kappa[q] == U(0) ? U(0) : step;
    }
    return shift<false, U>(w, s, run.gradient, out);
  }
  const Canonically<U> gradient = canonically<true>(w, s, w.gradient, run.gradient);
  const U before = static_cast<U>(rule.before), after = static_cast<U>(rule.after);
  const U* divisor = kappa;
  if (rule.damping.mantissa != 0) {
    // γ² is one number for all weights: its share is 2^-2e of it.
    const double share = rule.kappa_share.value();
    std::fill(run.second, run.second + s.n, static_cast<U>(std::sqrt(rule.damping.value())));
    shift<true, U>(w, s, run.second, run.second);
    for (int64_t q = 0; q < s.n; ++q) run.second[q] = static_cast<U>(kappa[q] * share + run.second[q] * run.second[q]);
    divisor = run.second;
  }
  const Vec<U> zero{};
  Found<U> seen = found;  // in registers: stores to memory might change what lies in it
  for (int64_t q = 0; q < s.n; q += width) {
    const int64_t m = s.n - q;
    const Vec<U> g = gradient.at(q, m), k = load(divisor + q, m);
    // On no path there is no step.
    const Vec<U> quotient = g * before * (k == zero ? zero : inverse(k)) * after;
    store(out + q, quotient);
    if (measure) {
      const Vec<U> path = divisor == kappa ? k : load(kappa + q, m);
      seen.steps.add(quotient);
      seen.pulls.add(g);
      seen.paths.add(path);
      seen.squares += path * quotient * quotient;
    }
  }
  if (measure) found = seen;
  for (int64_t q = 0; w.entry_exponents && q < s.n; ++q) {
    out[q] = static_cast<U>(exact_quotient(w, rule, s, q).value());
  }
}

// Where a run's quotients are kept from one pass to the other: in κ's place, if that is free.
template <typename T, typename U>
U* kept(const StepWeight<T>& w, const Span& s) {
  if constexpr (std::is_same_v<T, U>) {
    if (w.spare) return w.spare + s.i;
  }
  return nullptr;
}

// From quotients, weight and momentum, all in one kind of coordinates, what the rate is to be multiplied with; the new
// momentum is put into `first`, which is null where there is none.
template <typename U>
inline Vec<U> change(const SgdRule& rule, Vec<U> quotient, const Vec<U>& weight, Vec<U>* first) {
  const U momentum = static_cast<U>(rule.momentum);
  quotient += static_cast<U>(rule.decay) * weight;
  if (!first) return quotient;
  *first = momentum * *first + quotient;
  return rule.nesterov ? quotient + momentum * *first : *first;
}

// Whether canonical coordinates in U do not hold what a run's changes are made of, but for quotients. Of units that are
// not far apart they do; and powers of two, by which a network is rescaled, do not change what is found.
template <typename T, typename U>
bool beyond(const StepWeight<T>& w, const SgdRule& rule, const Span& s, const U* kappa) {
  if (w.entry_exponents) return true;
  for (int64_t q = 0; w.most_down > kTabled<U> && q < s.n; ++q) {
    if (kappa[q] == U(0)) continue;
    const double weight = static_cast<double>(w.weight[s.i + q]);
    const double parts[] = {rule.given ? static_cast<double>(w.gradient[s.i + q]) - weight : 0,
                            rule.decay * weight, w.first ? static_cast<double>(w.first[s.i + q]) : 0};
    for (const double part : parts) {
      if (part != 0 && std::isfinite(part) &&
          std::abs(std::ilogb(part) + exponent_at(w, s.row, s.column + q)) > kHeld<U>) return true;
    }
  }
  return false;
}
// Σ κ Δ² of a run, entry by entry.
template <typename T, typename U>
void add_far_changes(const StepWeight<T>& w, const SgdRule& rule, const Span& s, const Run<U>& run, Squares& squares) {
  for (int64_t q = 0; q < s.n; ++q) {
    const double weight = static_cast<double>(w.weight[s.i + q]);
    double step = Number{static_cast<double>(run.step[q]), -exponent_at(w, s.row, s.column + q)}.value();
    if (rule.given) step = static_cast<double>(w.gradient[s.i + q]) - weight;
    step += rule.decay * weight;
    if (w.first) {
      const double first = rule.momentum * static_cast<double>(w.first[s.i + q]) + step;
      step = rule.nesterov ? step + rule.momentum * first : first;
    }
    squares.far = squares.far + entry_length(w, s, q, step);
  }
}
// The same by vectors, and of entries that may be far.
template <typename T, typename U>
void add_changes(const StepWeight<T>& w, const SgdRule& rule, const Span& s, const U* kappa, Run<U>& run,
                 Squares& squares) {
  if (beyond(w, rule, s, kappa)) return add_far_changes(w, rule, s, run, squares);
  if (!w.first && rule.decay == 0) return add_squares(kappa, run.step, s.n, squares);
  Canonically<U> weight{}, first{};  // where they count, and so are numbers
  if (rule.decay != 0) weight = canonically<false>(w, s, w.weight, run.weight);
  if (w.first) first = canonically<false>(w, s, w.first, run.first);
  const Vec<U> zero{};
  for (int64_t q = 0; q < s.n; q += Simd<U>::width) {
    const int64_t m = s.n - q;
    Vec<U> momentum = w.first ? first.at(q, m) : zero;
    const Vec<U> own = rule.decay != 0 ? weight.at(q, m) : zero;
    const Vec<U> step = change<U>(rule, load(run.step + q), own, w.first ? &momentum : nullptr);
    store(run.delta + q, load(kappa + q, m) == zero ? zero : step);
  }
  add_squares(kappa, run.delta, s.n, squares);
}

// The quotients of a run: as they were kept, or formed again.
template <typename T, typename U>
const U* quotients_again(const StepWeight<T>& w, const SgdRule& rule, const Span& s, Run<U>& run) {
  if (const U* const found = kept<T, U>(w, s)) return found;
  Found<U> nothing;
  quotients<T, U, false>(w, rule, s, run, gather_kappa(w, s, run.kappa), run.step, nothing);
  return run.step;
}

template <typename T, typename U>
StepSums sgd_measure(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last) {
  Run<U> run;
  StepSums sums{};
  Squares squares;
  Found<U> found;
  for_runs(w.columns, first, last, [&](const Span& s) {
    const U* const kappa = gather_kappa(w, s, run.kappa);
    found.squares = Vec<U>{};
    quotients<T, U, true>(w, rule, s, run, kappa, run.step, found);
    if (rule.bounded && (w.first || rule.decay != 0 || rule.given || w.entry_exponents)) {
      add_changes(w, rule, s, kappa, run, squares);
    } else if (rule.bounded) {
      add_squares(found.squares, kappa, run.step, s.n, squares);
    }
    if (U* const place = kept<T, U>(w, s)) std::copy(run.step, run.step + s.n, place);
  });
  sums.pulled = found.pulls.value() != 0;
  sums.paths = found.paths.value() > 0;
  const double longest = Number{found.steps.value(), w.most_down}.normal().value();
  if (!rule.given && (w.entry_exponents || !(longest <= rule.limit))) {
    for_runs(w.columns, first, last, [&](const Span& s) {
      sums.lost |= lost_entries(w, rule.limit, s, quotients_again(w, rule, s, run));
    });
  }
  const Number rate = Number{rule.rate, 0}.normal();
  sums.square = squares.total() * rate * rate;
  return sums;
}

template <typename T, typename U>
void sgd_apply(const StepWeight<T>& w, const SgdRule& rule, int64_t first, int64_t last) {
  if (rule.given && !rule.shortened) {  // to the bit
    std::copy(w.gradient + first, w.gradient + last, w.moved + first);
    return;
  }
  const U factor = static_cast<U>(rule.factor), more = static_cast<U>(rule.more);
  if (rule.given) {
    for (int64_t i = first; i < last; ++i) {
      const U own = static_cast<U>(w.weight[i]);
      w.moved[i] = static_cast<T>(own + factor * (static_cast<U>(w.gradient[i]) - own) * more);
    }
    return;
  }
  Run<U> run;
  const U growth = static_cast<U>(rule.decay != 0 ? rule.factor * rule.more * rule.decay : 0);
  for_runs(w.columns, first, last, [&](const Span& s) {
    const U* const step = quotients_again(w, rule, s, run);
    if (!w.first) return add_step(w, s, step, factor, more, growth, w.moved + s.i);
    // In the weight's own coordinates: what has no path may lie beyond all numbers in others.
    shift<true, U>(w, s, step, run.delta);
    std::copy(w.weight + s.i, w.weight + s.i + s.n, run.weight);
    std::copy(w.first + s.i, w.first + s.i + s.n, run.first);
    for (int64_t q = 0; q < s.n; q += Simd<U>::width) {
      const Vec<U> weight = load(run.weight + q);
      Vec<U> momentum = load(run.first + q);
      const Vec<U> delta = change<U>(rule, load(run.delta + q), weight, &momentum);
      store(run.weight + q, weight + factor * delta * more);
      store(run.first + q, momentum);
    }
    std::copy(run.weight, run.weight + s.n, w.moved + s.i);
    std::copy(run.first, run.first + s.n, w.first + s.i);
  });
}

// 1/sqrt(κ) of a run, without exponents, and 0 on no path.
template <typename T, typename U>
void gather_units(const StepWeight<T>& w, const Span& s, U* out) {
  const Vec<U> zero{};
  const U* const kappa = gather_kappa(w, s, out);
  for (int64_t q = 0; q < s.n; q += Simd<U>::width) {
    const Vec<U> k = load(kappa + q, s.n - q);
    store(out + q, k > zero ? inverse_root(k) : zero, s.n - q);
  }
}
// factor/sqrt(κ) of the q-th entry of a run, where κ has entry exponents.
template <typename T>
Number exact_unit(const StepWeight<T>& w, const Number& factor, const Span& s, int64_t q) {
  const Number kappa = entry_kappa(w, kappa_at(w, s, q));
  return kappa.mantissa > 0 ? (factor / kappa.root()).normal() : Number{};
}
// g/sqrt(κ) · factor, likewise.
template <typename T>
Number exact_gradient(const StepWeight<T>& w, const Number& factor, const Span& s, int64_t q) {
  return Number{static_cast<double>(w.gradient[s.i + q]), 0}.normal() * exact_unit(w, factor, s, q);
}

template <typename T, typename U>
StepSums coordinate_measure(const StepWeight<T>& w, int64_t first, int64_t last) {
  Run<U> run;
  StepSums sums{};
  Squares squares;
  Largest<U> units, pulls;
  for_runs(w.columns, first, last, [&](const Span& s) {
    const Canonically<U> gradient = canonically<true>(w, s, w.gradient, run.gradient);
    U* const place = kept<T, U>(w, s);
    U* const own = place ? place : run.kappa;
    gather_units(w, s, own);
    Vec<U> lanes{};
    Largest<U> unit_seen = units, pull_seen = pulls;  // in registers, as above
    for (int64_t q = 0; q < s.n; q += Simd<U>::width) {
      const Vec<U> unit = load(own + q, s.n - q), g = gradient.at(q, s.n - q), x = g * unit;
      unit_seen.add(unit);
      pull_seen.add(g);
      lanes += x * x;
      store(run.step + q, x);
    }
    units = unit_seen;
    pulls = pull_seen;
    if (!w.entry_exponents) return add_squares<U>(lanes, nullptr, run.step, s.n, squares);
    for (int64_t q = 0; q < s.n; ++q) {
      const Number x = exact_gradient(w, {1, 0}, s, q);
      if (x.mantissa != 0) squares.far = squares.far + x * x;
    }
  });
  sums.square = squares.total();
  sums.largest_unit = units.value();
  sums.paths = sums.largest_unit > 0;
  if (w.entry_exponents) sums.largest_unit = std::numeric_limits<double>::infinity();
  sums.pulled = pulls.value() != 0;
  return sums;
}

// Apart, so that what it takes through memory costs nothing elsewhere.
template <typename U>
[[gnu::noinline]] void raise_lanes(U* lanes, double power) {
  for (int64_t l = 0; l < Simd<U>::width; ++l) lanes[l] = static_cast<U>(std::pow(static_cast<double>(lanes[l]), power));
}
// x^power; `whole` is the power if it is one of the small whole numbers, else 0.
template <typename U>
inline Vec<U> raise(const Vec<U>& x, int whole, double power) {
  if (whole == 1) return x;
  if (whole == 2) return x * x;
  if (whole == 3) return x * x * x;
  U lanes[Simd<U>::width];
  store(lanes, x);
  raise_lanes(lanes, power);
  return load(lanes);
}

// What Adam makes of a run's g̃/‖g̃‖, with its constants in the dtype of the arithmetic.
template <typename U>
struct Averaging {
  explicit Averaging(const CoordinateRule& rule)
      : keep1(static_cast<U>(rule.beta1)), take1(static_cast<U>(1 - rule.beta1)), keep2(static_cast<U>(rule.beta2)),
        take2(static_cast<U>(1 - rule.beta2)), correction(static_cast<U>(rule.correction)),
        eps(static_cast<U>(rule.eps)), power(rule.power),
        whole(power == 1 ? 1 : power == 2 ? 2 : power == 3 ? 3 : 0) {}

  // sign(m) (|m|/sqrt(v))^power, from g; m and v become what they are after the step.
  Vec<U> operator()(const Vec<U>& g, Vec<U>& m, Vec<U>& v) const {
    const Vec<U> zero{}, one = all<U>(1);
    m = keep1 * m + take1 * g;  // nothing of a former m is left where β₁ is 0
    v = keep2 * v + take2 * g * g;
    const Vec<U> square = v * correction, root = inverse_root(square), size = m < zero ? -m : m;
    Vec<U> ratio = size * root;
    if (eps > 0) ratio *= inverse(one + eps * root);
    // Squares below the dtype's range belong to entries that are as good as on no path.
    ratio = square > zero ? ratio : zero;
    ratio = raise<U>(ratio > one ? one : ratio, whole, power);
    return m < zero ? -ratio : ratio;
  }

  U keep1, take1, keep2, take2, correction, eps;
  double power;
  int whole;
};

// Of a run: g̃/‖g̃‖ = gradient · units · before · after, and Δ = step · rate · units.
template <typename U>
struct PathRun {
  Canonically<U> gradient;
  const U* units;
  U before, after, rate;
};
// What was measured is in κ's place, if that was free. `gradients`: whether those are wanted.
template <typename T, typename U>
PathRun<U> path_run(const StepWeight<T>& w, const CoordinateRule& rule, const Span& s, Run<U>& run, bool gradients) {
  if (w.entry_exponents) {
    for (int64_t q = 0; q < s.n; ++q) {
      if (gradients) run.gradient[q] = static_cast<U>(exact_gradient(w, rule.quotient, s, q).value());
    }
    const U* const ones = kOnes<U>.data();
    return {{run.gradient, U(1), ones}, ones, U(1), U(1), U(1)};  // and steps are lengthened one by one
  }
  const U* units = kept<T, U>(w, s);
  if (!units) gather_units(w, s, run.kappa), units = run.kappa;
  Canonically<U> gradient{};
  if (gradients) gradient = canonically<true>(w, s, w.gradient, run.gradient);
  return {gradient, units, static_cast<U>(rule.before), static_cast<U>(rule.after), static_cast<U>(-rule.rate)};
}

// Adds Δ to a run's weights; without `write` it says whether that brings one beyond the limit.
template <typename T, typename U>
inline bool place_step(const StepWeight<T>& w, const CoordinateRule& rule, const Span& s, U* delta, bool write) {
  for (int64_t q = 0; w.entry_exponents && q < s.n; ++q) {
    const Number unit = exact_unit(w, rule.longest, s, q), step = Number{-static_cast<double>(delta[q]), 0}.normal();
    delta[q] = unit.mantissa == 0 ? U(0) : static_cast<U>((step * unit).value());
  }
  const U growth = static_cast<U>(rule.keep - 1);
  if (write) {
    add_step(w, s, delta, U(1), U(1), growth, w.moved + s.i);
    return false;
  }
  double own[kRun];
  std::copy(w.weight + s.i, w.weight + s.i + s.n, own);
  add_step(w, s, delta, U(1), U(1), growth, own);
  bool lost = false;
  for (int64_t q = 0; q < s.n; ++q) {
    const bool finite = std::isfinite(w.gradient[s.i + q]) && std::isfinite(w.weight[s.i + q]);
    lost |= finite && !(std::abs(own[q]) <= rule.limit);
  }
  return lost;
}

template <typename T, typename U>
bool coordinate_apply(const StepWeight<T>& w, const CoordinateRule& rule, int64_t first, int64_t last, bool write) {
  Run<U> run;
  const Averaging<U> averaging(rule);
  bool lost = false;
  for_runs(w.columns, first, last, [&](const Span& s) {
    const PathRun<U> path = path_run(w, rule, s, run, true);
    // The averages are changed where they are, if they may be.
    U *average = run.first, *square = run.second;
    bool copied = true;
    if constexpr (std::is_same_v<T, U>) {
      copied = !write;
      if (write) average = w.first + s.i, square = w.second + s.i;
    }
    if (copied) {
      std::copy(w.first + s.i, w.first + s.i + s.n, average);
      std::copy(w.second + s.i, w.second + s.i + s.n, square);
    }
    for (int64_t q = 0; q < s.n; q += Simd<U>::width) {
      const int64_t n = s.n - q;
      const Vec<U> unit = load(path.units + q, n), g = path.gradient.at(q, n) * unit * path.before * path.after;
      Vec<U> m = load(average + q, n), v = load(square + q, n);
      const Vec<U> step = averaging(g, m, v);
      store(average + q, m, n);
      store(square + q, v, n);
      store(run.delta + q, step * path.rate * unit);
    }
    lost |= place_step(w, rule, s, run.delta, write);
    if (!write || !copied) return;
    std::copy(average, average + s.n, w.first + s.i);
    std::copy(square, square + s.n, w.second + s.i);
  });
  return lost;
}

// The parts of coordinate_apply, between which a matrix is brought to other bases and back: g̃/‖g̃‖ of entries
// [first, last) of a weight,
template <typename T, typename U>
void coordinate_gradient(const StepWeight<T>& w, const CoordinateRule& rule, int64_t first, int64_t last, void* out) {
  Run<U> run;
  for_runs(w.columns, first, last, [&](const Span& s) {
    const PathRun<U> path = path_run(w, rule, s, run, true);
    for (int64_t q = 0; q < s.n; q += Simd<U>::width) {
      const int64_t n = s.n - q;
      const Vec<U> g = path.gradient.at(q, n) * load(path.units + q, n) * path.before * path.after;
      store(static_cast<U*>(out) + s.i + q, g, n);
    }
  });
}
// the averages and, in the gradient's place, the step of n entries,
template <typename U>
void coordinate_average(const CoordinateRule& rule, int64_t n, void* gradient, void* average, void* square) {
  const Averaging<U> averaging(rule);
  U *const g = static_cast<U*>(gradient), *const first = static_cast<U*>(average), *const second = static_cast<U*>(square);
  for (int64_t i = 0; i < n; i += Simd<U>::width) {
    Vec<U> m = load(first + i, n - i), v = load(second + i, n - i);
    store(g + i, averaging(load(g + i, n - i), m, v), n - i);
    store(first + i, m, n - i);
    store(second + i, v, n - i);
  }
}
// and from there to the weights.
template <typename T, typename U>
bool coordinate_move(const StepWeight<T>& w, const CoordinateRule& rule, int64_t first, int64_t last, const void* step,
                     bool write) {
  Run<U> run;
  bool lost = false;
  for_runs(w.columns, first, last, [&](const Span& s) {
    const PathRun<U> path = path_run(w, rule, s, run, false);
    const U* const own = static_cast<const U*>(step) + s.i;
    for (int64_t q = 0; q < s.n; q += Simd<U>::width) {
      store(run.delta + q, load(own + q, s.n - q) * path.rate * load(path.units + q, s.n - q));
    }
    lost |= place_step(w, rule, s, run.delta, write);
  });
  return lost;
}

// Σ κ w², without `exponent`: γ² of the paths through this weight, where each takes it once.
template <typename T>
Number path_mass(const StepWeight<T>& w) {
  Run<double> run;
  Squares squares;
  for_runs(w.columns, 0, w.size, [&](const Span& s) {
    const T* const own = w.weight + s.i;
    bool far = w.entry_exponents;
    for (int64_t q = 0; w.most_down > kTabled<double> && q < s.n; ++q) {
      const Number canonical{static_cast<double>(own[q]), exponent_at(w, s.row, s.column + q)};
      far |= entry_kappa(w, kappa_at(w, s, q)).mantissa != 0 && !canonical.moderate(kHeld<double>);
    }
    if (!far) {
      shift<false, double>(w, s, own, run.weight);
      return add_squares(gather_kappa(w, s, run.kappa), run.weight, s.n, squares);
    }
    for (int64_t q = 0; q < s.n; ++q) {
      squares.far = squares.far + entry_length(w, s, q, static_cast<double>(own[q]));
    }
  });
  return squares.total();
}

// Adds Σ g² and, of quotients, Σ q², both in the weight's own coordinates: once in a training, and so entry by entry.
template <typename T>
void add_raw_and_divided(const StepWeight<T>& w, const SgdRule& rule, Number& raw, Number& divided) {
  for_runs(w.columns, 0, w.size, [&](const Span& s) {
    for (int64_t q = 0; q < s.n; ++q) {
      const Number g = Number{static_cast<double>(w.gradient[s.i + q]), 0}.normal(), d = exact_quotient(w, rule, s, q);
      if (g.mantissa != 0) raw = raw + g * g;
      if (d.mantissa != 0) divided = divided + d * d;
    }
  });
}

// A run's entries one by one, as numbers of any size.
template <typename T>
void norm_gradient_exactly(const StepWeight<T>& w, const Number& factor, const Span& s, T* out) {
  for (int64_t q = 0; q < s.n; ++q) {
    // κ scales as 1/weight² does.
    const Number weight{static_cast<double>(w.weight[s.i + q]), 2 * exponent_at(w, s.row, s.column + q)};
    const Number product = weight.normal() * entry_kappa(w, kappa_at(w, s, q)).normal();
    out[q] = product.mantissa == 0 ? T(0) : static_cast<T>((product * factor.normal()).value());
  }
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
  for_runs(w.columns, first, last, [&](const Span& s) {
    bool all = common;
    if (common) {
      shift<false, double>(w, s, w.weight + s.i, run.weight);
      const double* const kappa = gather_kappa(w, s, run.kappa);
      for (int64_t q = 0; q < s.n; ++q) {
        // Of a zero, or without a path, it is 0, whatever the scale.
        const bool zero = w.weight[s.i + q] == T(0) || kappa[q] == 0;
        all &= zero || (home(run.weight[q]) && home(kappa[q]));
        run.step[q] = zero ? 0 : run.weight[q] * kappa[q] * before * after;
      }
    }
    if (all) shift<false, double>(w, s, run.step, out + (s.i - first));
    else norm_gradient_exactly(w, factor, s, out + (s.i - first));
  });
}

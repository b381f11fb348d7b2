// The parts of path_chain and kappa2: vectors with power-of-two exponents, the two plans of a chain, and sums over steps.

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
// The sum of all lanes, by halves.
template <typename T, int64_t Lanes>
inline T lane_sum(const T* lanes) {
  if constexpr (Lanes == 1) {
    return lanes[0];
  } else {
    typedef T Half __attribute__((vector_size(Lanes / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, lanes, sizeof(Half));
    std::memcpy(&high, lanes + Lanes / 2, sizeof(Half));
    low += high;
    T sums[Lanes / 2];
    std::memcpy(sums, &low, sizeof(Half));
    return lane_sum<T, Lanes / 2>(sums);
  }
}
template <typename T>
inline T lane_sum(const Vec<T>& v) {
  T lanes[Simd<T>::width];
  store(lanes, v);
  return lane_sum<T, Simd<T>::width>(lanes);
}
template <typename T>
inline Vec<T> maximum(const Vec<T>& a, const Vec<T>& b) {
  return a > b ? a : b;
}

// Uninitialised, aligned memory: what is read of it has been written, padding included.
template <typename T>
using Buffer = std::vector<T, Aligned<T>>;

// Memory for one pass, kept by the calling thread between calls up to a limit: fresh pages cost as much as a pass over a
// small network.
template <typename T>
class Workspace {
 public:
  explicit Workspace(int64_t count) : size_(count) {
    thread_local Buffer<T> kept;
    kept_ = &kept;
    if (static_cast<int64_t>(kept.size()) >= count) memory_.swap(kept);
    else memory_.resize(count);
  }
  ~Workspace() {
    constexpr int64_t kKeep = (int64_t{16} << 20) / static_cast<int64_t>(sizeof(T));
    if (size_ <= kKeep) memory_.swap(*kept_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* take(int64_t count) {
    T* const result = memory_.data() + taken_;
    taken_ += padded<T>(count);
    return result;
  }

 private:
  int64_t size_, taken_ = 0;
  Buffer<T> memory_;
  Buffer<T>* kept_;
};

// The exponent of a result whose largest entry is about 2^m: 0, so that the factor is κ itself, where that is at home
// in the dtype.
inline int64_t natural_exponent(int64_t m) { return m >= 0 && m <= 60 ? 0 : m; }

// The rows [first, last) of a chain that has come to rest: all of them equal, so that only the first (in time, which
// for δ is the last) is written, unless a layer above or below needs them.
struct Rest {
  int64_t first = 0, last = 0, row = 0;
  bool holds(int64_t t) const { return t >= first && t < last; }
};

// Rows of [n, row] with an exponent and the magnitude of the largest entry each.
template <typename T>
struct Rows {
  T* data;
  int64_t* exponent;
  int64_t* largest;
  int64_t row;
  Rest* rest;
  int64_t offset = 0;  // of these rows among those that `rest` counts
  T* operator[](int64_t t) const { return data + t * row; }
  Rest resting() const {
    return {std::max<int64_t>(rest->first - offset, 0), std::max<int64_t>(rest->last - offset, 0), rest->row - offset};
  }
  // A row that is sure to have been written, equal to row t.
  T* at(int64_t t) const {
    const Rest r = resting();
    return data + (r.holds(t) ? r.row : t) * row;
  }
};

// A drive of T rows; row 0 means that one row serves all steps.
template <typename T>
struct Drive {
  const T* data;
  const int64_t* exponent;  // kZeroExponent: no drive at that step
  int64_t row, exponent_step;
  int64_t constant_from;  // steps from this one on are driven alike
};

// Whether every entry of `large` is so large, where `small` has one, that `small`, too small for its dtype on the scale
// of `large`, changes nothing in it.
template <typename T>
bool covers(const T* large, const T* small, int64_t n) {
  constexpr int64_t bits = std::numeric_limits<T>::min_exponent + kCentre<T> + kSlack + std::numeric_limits<T>::digits + 6;
  const T least = std::ldexp(T(1), static_cast<int>(bits));
  for (int64_t k = 0; k < n; ++k) {
    if (small[k] > T(0) && large[k] < least) return false;
  }
  return true;
}

// Leaves the mark of an underflow, for a loss that no operation made.
inline void mark_lost() {
  volatile float tiny = std::numeric_limits<float>::min();
  volatile float lost = tiny * tiny;
  (void)lost;
}

// out = out · 2^from + drive · 2^drive_exponent, renormalised.
template <typename T>
void finish_step(T* out, int64_t from, const T* drive, int64_t drive_exponent, int64_t n, int64_t& exponent,
                 int64_t& largest) {
  constexpr int64_t width = Simd<T>::width;
  exponent = std::max(from, drive_exponent);
  const T a = power_of_two<T>(from - exponent);
  const bool driven = drive_exponent != kZeroExponent;
  const T b = driven ? power_of_two<T>(drive_exponent - exponent) : T(0);
  // A chain that grows leaves its drive behind, harmlessly, unless some unit lives on the drive alone.
  const bool moved = from > kZeroExponent / 2;
  if (driven && b == T(0) && !covers(out, drive, n)) mark_lost();
  if (moved && a == T(0) && !covers(drive, out, n)) mark_lost();
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
  bool fill;  // whether rows at rest are wanted
};

// The chain is a map of its last row alone once the drive is constant. When it returns that row, bit for bit, every
// later step would too: the rest is copied. With h_0 = 0 and a constant drive this happens whenever the chain
// converges, since the map is monotone, rounding included, so that its rows only grow.
template <typename T>
bool rests(const Chain<T>& c, int64_t step, const T* row, const T* before, int64_t exponent, int64_t exponent_before) {
  return step > c.drive.constant_from && exponent == exponent_before &&
         std::memcmp(row, before, c.out.row * sizeof(T)) == 0;
}

// Records that the chain rests from step `rest` on; the row of step `done` stands for the steps after it.
template <typename T>
void settle(const Chain<T>& c, int64_t rest, int64_t done, int64_t steps) {
  const int64_t from = c.first + done * c.stride;
  for (int64_t s = done + 1, t = from + c.stride; s < steps; ++s, t += c.stride) {
    if (c.fill) std::copy(c.out[from], c.out[from] + c.out.row, c.out[t]);
    c.out.exponent[t] = c.out.exponent[from];
    c.out.largest[t] = c.out.largest[from];
  }
  const int64_t begin = c.first + rest * c.stride, end = c.first + (steps - 1) * c.stride;
  *c.out.rest = {std::min(begin, end), std::max(begin, end) + 1, from};
}

// W̃^kLeap by two squarings, in rows padded to ld; false if entries underflowed, which one step at a time would not lose.
constexpr int64_t kLeap = 4;

template <typename T>
bool leap_matrix(const Packed<T>& w, int64_t w_exponent, Buffer<T>& power, int64_t& exponent) {
  const int64_t hidden = w.depth, ld = padded<T>(hidden);
  Buffer<T> square(hidden * ld), right(Packed<T>::size(hidden, hidden));
  const Packed<T> factor{right.data(), hidden, hidden, kPanel<T>};
  power.resize(hidden * ld);
  for (int64_t p = 0; p < w.panels(); ++p) {
    for (int64_t k = 0; k < hidden; ++k) {
      std::copy(w.begin(p) + k * w.row(p), w.begin(p) + (k + 1) * w.row(p), power.data() + k * ld + p * w.panel);
    }
  }
  exponent = w_exponent;
  const bool lost = FlushDenormals::lost();
  for (int64_t n = 1; n < kLeap; n *= 2) {
    pack(factor, power.data(), ld, 1, Team{}, [](T v) { return v; });
    Vec<T> most{};
    for (int64_t p = 0; p < factor.panels(); ++p) {
      Product<T> product{power.data(), ld, 1, factor.begin(p), factor.row(p), hidden};
      Tile<T> t{};
      t.alpha = 1;
      t.num_products = 1;
      t.columns = factor.row(p);
      t.c = square.data() + p * factor.panel;
      t.c_row = ld;
      panel(t, &product, hidden);
    }
    for (int64_t at = 0; at < hidden * ld; at += Simd<T>::width) most = maximum<T>(most, load(square.data() + at));
    const int64_t m = magnitude(largest_lane<T>(most));
    if (m == kZeroExponent) return false;  // nilpotent: one step at a time ends sooner
    const T s = std::ldexp(T(1), static_cast<int>(-m));
    for (int64_t at = 0; at < hidden * ld; at += Simd<T>::width) store(power.data() + at, load(square.data() + at) * s);
    exponent = 2 * exponent + m;
  }
  if (lost || !FlushDenormals::lost()) return true;
  FlushDenormals::forget();
  return false;
}

// Steps [from, steps), kLeap at a time, where the drive has been one row, or none, for all but the first step:
// x_{s+m} = W̃^m x_s + d, d what m steps make of nothing. W̃^m is read once for m steps, whose rows fill a register tile.
template <typename T>
void leap(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, const Buffer<T>& power, int64_t power_exponent,
          int64_t from, int64_t steps) {
  const int64_t hidden = w.depth, ld = c.out.row, late = c.first + from * c.stride;
  Buffer<T> drive(2 * ld, T(0));
  T *driven = drive.data(), *before = driven + ld;
  int64_t drive_exponent = kZeroExponent, largest;
  for (int64_t n = 0; n < kLeap; ++n) {
    std::swap(driven, before);
    matrix_vector(w, before, driven);
    finish_step(driven, drive_exponent + w_exponent, c.drive.data, c.drive.exponent[late * c.drive.exponent_step], ld,
                drive_exponent, largest);
  }
  for (int64_t s = from; s < steps; s += kLeap) {
    const int64_t rows = std::min(kLeap, steps - s), t = c.first + s * c.stride, source = t - kLeap * c.stride;
    for (int64_t column = 0; column < ld; column += kPanel<T>) {
      Product<T> product{c.out[source], c.stride * ld, 1, power.data() + column, ld, hidden};
      Tile<T> tile{};
      tile.alpha = 1;
      tile.num_products = 1;
      tile.columns = std::min(kPanel<T>, ld - column);
      tile.c = c.out[t] + column;
      tile.c_row = c.stride * ld;
      panel(tile, &product, rows);
    }
    bool resting = rows == kLeap;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = t + r * c.stride, previous = row - c.stride;
      finish_step(c.out[row], c.out.exponent[source + r * c.stride] + power_exponent, driven, drive_exponent, ld,
                  c.out.exponent[row], c.out.largest[row]);
      resting = resting && rests(c, s + r, c.out[row], c.out[previous], c.out.exponent[row], c.out.exponent[previous]);
    }
    if (resting) return settle(c, s, s + rows - 1, steps);
  }
}

// All steps by one thread: W̃ is packed and small enough for its cache.
template <typename T>
void chain(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t steps) {
  // A chain that converges has come to rest by then, mostly; the powers must pay for themselves in the steps left.
  constexpr int64_t kSettled = 64, kWorthPowers = 3;
  const T* before = c.start;
  int64_t exponent = c.start_exponent;
  for (int64_t s = 0, t = c.first; s < steps; ++s, t += c.stride) {
    if (s == kSettled && c.drive.row == 0 && steps - s >= kWorthPowers * w.depth) {
      Buffer<T> power;
      int64_t power_exponent;
      if (leap_matrix(w, w_exponent, power, power_exponent)) {
        return leap(c, w, w_exponent, power, power_exponent, s, steps);
      }
    }
    T* out = c.out[t];
    matrix_vector(w, before, out);
    // The drive's rows run with the output's.
    finish_step(out, exponent + w_exponent, c.drive.data + t * c.drive.row,
                c.drive.exponent[t * c.drive.exponent_step], c.out.row, c.out.exponent[t], c.out.largest[t]);
    if (rests(c, s, out, before, c.out.exponent[t], exponent)) return settle(c, s, s, steps);
    exponent = c.out.exponent[t];
    before = out;
  }
}

// One thread's copy of a chain's last two rows, for the plan below.
template <typename T>
struct Pair {
  T* now;
  T* next;
  int64_t exponent;
  int64_t rest = -1;  // the step at which the chain came to rest

  // Finishes the step whose raw result lies in `next`; `writes` for the one thread that keeps it.
  void finish(const Chain<T>& c, int64_t s, int64_t w_exponent, bool writes) {
    const int64_t t = c.first + s * c.stride, before = exponent;
    int64_t largest;
    finish_step(next, before + w_exponent, c.drive.data + t * c.drive.row, c.drive.exponent[t * c.drive.exponent_step],
                c.out.row, exponent, largest);
    if (rest < 0 && rests(c, s, next, now, exponent, before)) rest = s;
    std::swap(now, next);
    if (!writes) return;
    std::copy(now, now + c.out.row, c.out[t]);
    c.out.exponent[t] = exponent;
    c.out.largest[t] = largest;
  }
};

// Both chains (or one) by a whole team over a W that no cache holds: each thread reads its rows of W once a step and
// uses them for h (a dot product a row) and for δ (a multiple of the row); W is squared in registers.
template <typename T, bool Forward, bool Backward>
void chains_shared(const Chain<T>& h, const Chain<T>& d, const T* weight, T scale, int64_t w_exponent, int64_t hidden,
                   int64_t steps, Buffer<T>& scratch, const Team& team) {
  constexpr int64_t width = Simd<T>::width;
  constexpr int64_t kRows = 4;
  const int64_t ld = padded<T>(hidden);
  // Raw results are double-buffered by the parity of the step, so that one barrier a step is enough; then every thread
  // finishes the whole step for itself.
  T* const raw_h = scratch.data();
  T* const partial = raw_h + 2 * ld;
  T* const own = partial + 2 * team.size * ld + 4 * team.rank * ld;
  Pair<T> own_h{own, own + ld, h.start_exponent}, own_d{own + 2 * ld, own + 3 * ld, d.start_exponent};
  std::fill(own, own + 4 * ld, T(0));
  if (Forward) std::copy(h.start, h.start + ld, own_h.now);
  if (Backward) std::copy(d.start, d.start + ld, own_d.now);
  int64_t row_first, row_last;
  team.share(hidden, row_first, row_last);

  int64_t s = 0;
  for (bool moving = true; moving && s < steps; ++s) {
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
        dj[r] = Backward && r < rows ? own_d.now[j + r] : T(0);
        dot[r] = Vec<T>{};
      }
      for (int64_t k = 0; k < hidden; k += width) {
        Vec<T> x{}, y{};
        if (Forward) x = load(own_h.now + k);
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
        for (int64_t r = 0; r < rows; ++r) next_h[j + r] = lane_sum<T>(dot[r]);
      }
    }
    team.wait();
    if (Forward) {
      std::copy(next_h, next_h + hidden, own_h.next);
      own_h.finish(h, s, w_exponent, team.rank == 0);
    }
    if (Backward) {
      const T* parts = partial + (s & 1) * team.size * ld;
      for (int64_t k = 0; k < ld; k += width) {
        Vec<T> sum = load(parts + k);
        for (int64_t r = 1; r < team.size; ++r) sum += load(parts + r * ld + k);
        store(own_d.next + k, sum);
      }
      own_d.finish(d, s, w_exponent, team.rank == team.size - 1);
    }
    moving = (Forward && own_h.rest < 0) || (Backward && own_d.rest < 0);
  }
  if (Forward && team.rank == 0 && own_h.rest >= 0) settle(h, own_h.rest, s - 1, steps);
  if (Backward && team.rank == team.size - 1 && own_d.rest >= 0) settle(d, own_d.rest, s - 1, steps);
  team.wait();
}

// Σ_t row_t as a vector with an exponent: rows first … last-1, `out` padded.
template <typename T>
void sum_rows(const Rows<T>& rows, int64_t first, int64_t last, T* out, int64_t& exponent) {
  constexpr int64_t width = Simd<T>::width;
  int64_t top = kZeroExponent;
  for (int64_t t = first; t < last; ++t) top = std::max(top, rows.exponent[t]);
  std::fill(out, out + rows.row, T(0));
  const Rest rest = rows.resting();
  for (int64_t t = first; t < last; ++t) {
    T s = power_of_two<T>(rows.exponent[t] - top);
    const T* row = rows.at(t);
    if (rest.holds(t)) {
      s *= static_cast<T>(std::min(rest.last, last) - t);
      t = std::min(rest.last, last) - 1;
    }
    if (s == T(0)) continue;
    for (int64_t k = 0; k < rows.row; k += width) store(out + k, load(out + k) + s * load(row + k));
  }
  exponent = top;
}

// out = the first n numbers of a padded vector, on the scale that suits a result; returns that scale's exponent.
template <typename T>
int64_t copy_result(const T* vector, int64_t exponent, int64_t n, T* out) {
  const int64_t m = magnitude(*std::max_element(vector, vector + n));
  const int64_t result = m == kZeroExponent ? 0 : natural_exponent(m + exponent);
  const T s = m == kZeroExponent ? T(0) : std::ldexp(T(1), static_cast<int>(exponent - result));
  std::transform(vector, vector + n, out, [s](T v) { return v * s; });
  return result;
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

  // Where both chains rest, their steps are one step, taken as often.
  const Rest rest_d = d.resting(), rest_h = h.resting();
  const int64_t rest = std::max({first, rest_d.first, rest_h.first});
  const int64_t resumed = std::max(rest, std::min({last, rest_d.last, rest_h.last}));
  const bool uniform = least == top;
  int64_t begin, end;
  team.share(last - first, begin, end);
  for (int64_t t = first + begin; t < first + end; ++t) {
    const bool both = t >= rest && t < resumed;
    if (both ? t != rest : uniform) continue;
    T s = power_of_two<T>(d.exponent[t] + h.exponent[t] - top);
    if (both) s *= static_cast<T>(resumed - rest);
    const T* row = d.at(t);
    for (int64_t k = 0; k < d.row; k += Simd<T>::width) store(scratch + t * d.row + k, load(row + k) * s);
  }
  team.wait();
  // Between these steps each chain either moves or rests; a resting one is a row taken with stride zero.
  std::array<int64_t, 6> ends{first, rest_d.first, rest_d.last, rest_h.first, rest_h.last, last};
  for (int64_t& t : ends) t = std::min(std::max(t, first), last);
  std::sort(ends.begin(), ends.end());
  for (int64_t column = 0; column < columns; column += kPanel<T>) {
    Product<T> products[5];
    int64_t count = 0;
    for (size_t i = 0; i + 1 < ends.size(); ++i) {
      const int64_t from = ends[i], steps = ends[i + 1] - from;
      if (steps == 0) continue;
      const bool resting_d = rest_d.holds(from), resting_h = rest_h.holds(from), both = resting_d && resting_h;
      const T* a = uniform && !both ? d.at(from) : scratch + from * d.row;
      products[count++] = {a + row_first, 1, uniform && resting_d ? 0 : d.row,
                           h.at(from) + column, resting_h ? 0 : h.row, both ? 1 : steps};
    }
    Tile<T> t{};
    t.num_products = count;
    t.columns = std::min(kPanel<T>, columns - column);
    t.c = out + row_first * columns + column;
    t.c_row = columns;
    t.alpha = std::ldexp(T(1), static_cast<int>(top - result));
    panel(t, products, row_last - row_first);
  }
  team.wait();  // scratch is free again
}

// Both chains (or one) by a whole team over a W that no cache holds: each thread reads its rows of W once a step and uses
// them for h (a dot product a row) and for δ (a multiple of the row); W is squared in registers.

// Raw results of a step are double-buffered by its parity, so that one barrier a step is enough; then every thread
// finishes the whole step for itself, in `own` rows that follow.
template <typename U>
struct SharedRows {
  int64_t ld;
  const Team& team;
  U *raw, *parts;
  int64_t parity = 0;

  SharedRows(Buffer<U>& scratch, int64_t row, const Team& with)
      : ld(row), team(with), raw(scratch.data()), parts(raw + 2 * ld) {}
  static int64_t size(int64_t ld, int64_t threads, int64_t own) { return (2 + (2 + own) * threads) * ld; }
  U* own(int64_t rows) const { return parts + 2 * team.size * ld + rows * team.rank * ld; }
  U* h() const { return raw + parity * ld; }
  U* d() const { return parts + (parity * team.size + team.rank) * ld; }  // this thread's part
  void sum_d(U* out) const {
    const U* const first = parts + parity * team.size * ld;
    for (int64_t k = 0; k < ld; k += Simd<U>::width) {
      Vec<U> sum = load(first + k);
      for (int64_t r = 1; r < team.size; ++r) sum += load(first + r * ld + k);
      store(out + k, sum);
    }
  }
};

// next_h = W̃ h, of this thread's rows, and next_d, its part of W̃ᵀ δ; `wide`: in double, δ's ones may be null, for zeros.
template <bool wide, bool Forward, bool Backward, typename T, typename U>
[[gnu::always_inline]] inline void read_once(const Weights<T>& weight, int64_t hidden, const U* h, const U* d, U* next_h,
                                             U* next_d, int64_t ld, const Team& team) {
  constexpr int64_t width = Simd<U>::width, kRows = 4;
  const int64_t whole = wide ? hidden / width * width : hidden;
  int64_t first, last;
  team.share(hidden, first, last);
  if (Backward) std::fill(next_d, next_d + ld, U(0));
  for (int64_t j = first; j < last; j += kRows) {
    const int64_t rows = std::min(kRows, last - j);
    const T* w[kRows];
    U dj[kRows], factor[kRows];
    Vec<U> dot[kRows];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      // Rows past the end repeat the last one, with a zero for δ; their dot products are not stored.
      const int64_t row = j + std::min(r, rows - 1);
      w[r] = weight.data + row * hidden;
      factor[r] = static_cast<U>(weight.row[row]) * weight.row[row];
      dj[r] = Backward && d && r < rows ? d[row] * factor[r] : U(0);
      dot[r] = Vec<U>{};
    }
    for (int64_t k = 0; k < whole; k += width) {
      Vec<U> x{}, y{}, column;
      if constexpr (wide) column = load_wide(weight.column + k);
      else column = load(weight.column + k);
      if (Forward) x = load(h + k);
      if (Backward) y = load(next_d + k);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        Vec<U> v;
        if constexpr (wide) v = load_wide(w[r] + k);
        else v = load(w[r] + k, hidden - k);
        v *= column;
        v *= v;
        if (Forward) dot[r] += v * x;
        if (Backward) y += v * dj[r];
      }
      if (Backward) store(next_d + k, y);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      U rest = 0;
      for (int64_t k = whole; wide && k < hidden; ++k) {
        const U v = static_cast<U>(w[r][k]) * weight.column[k];
        rest += v * v * h[k];
        next_d[k] += v * v * dj[r];
      }
      if (Forward && r < rows) next_h[j + r] = (lane_sum<U>(dot[r]) + rest) * factor[r];
    }
  }
}

// One thread's copy of a chain's last two rows.
template <typename T>
struct Pair {
  T* now;
  T* next;
  int64_t exponent = kZeroExponent;
  int64_t converged_at = -1;  // the step at which the chain converged

  // Takes up the chain before step `from`.
  void begin(const Chain<T>& c, int64_t from) {
    const int64_t t = c.first + (from - 1) * c.stride;
    const T* row = from ? c.out[t] : c.start;
    std::copy(row, row + c.out.row, now);
    exponent = from ? c.out.exponent[t] : c.start_exponent;
  }

  // Finishes the step whose raw result lies in `next`; `writes` for the one thread that keeps it.
  void finish(const Chain<T>& c, int64_t s, int64_t w_exponent, bool writes) {
    const int64_t t = c.first + s * c.stride, before = exponent;
    int64_t largest;
    finish_step(next, before + w_exponent, c.drive.data + t * c.drive.row, c.drive.exponent[t * c.drive.exponent_step],
                c.out.row, exponent, largest);
    if (converged_at < 0 && has_converged(c, s, next, now, exponent, before)) converged_at = s;
    std::swap(now, next);
    if (!writes) return;
    std::copy(now, now + c.out.row, c.out[t]);
    c.out.exponent[t] = exponent;
    c.out.largest[t] = largest;
  }
};

// Steps from `from` on, those before it having been written.
template <typename T, bool Forward, bool Backward>
void chains_shared(const Chain<T>& h, const Chain<T>& d, const Weights<T>& weight, int64_t hidden, int64_t from,
                   int64_t steps, Buffer<T>& scratch, const Team& team) {
  const int64_t ld = padded<T>(hidden);
  SharedRows<T> rows(scratch, ld, team);
  T* const own = rows.own(4);
  Pair<T> own_h{own, own + ld}, own_d{own + 2 * ld, own + 3 * ld};
  std::fill(own, own + 4 * ld, T(0));
  if (Forward) own_h.begin(h, from);
  if (Backward) own_d.begin(d, from);
  const bool writes_h = team.rank == 0, writes_d = team.rank == team.size - 1;
  int64_t s = from;
  for (bool moving = true; moving && s < steps; ++s) {
    rows.parity = s & 1;
    read_once<false, Forward, Backward>(weight, hidden, own_h.now, own_d.now, rows.h(), rows.d(), ld, team);
    team.wait();
    if (Forward) {
      std::copy(rows.h(), rows.h() + hidden, own_h.next);
      own_h.finish(h, s, weight.exponent, writes_h);
    }
    if (Backward) {
      rows.sum_d(own_d.next);
      own_d.finish(d, s, weight.exponent, writes_d);
    }
    moving = (Forward && own_h.converged_at < 0) || (Backward && own_d.converged_at < 0);
  }
  if (Forward && writes_h && own_h.converged_at >= 0) end_converged(h, own_h.converged_at, s - 1, steps);
  if (Backward && writes_d && own_d.converged_at >= 0) end_converged(d, own_d.converged_at, s - 1, steps);
  team.wait();
}

// The same read of W for the increments of both chains, or of one: until each has a closed form or none is in sight.
// Returns the number of steps written of the chains that have none.
template <typename T>
int64_t close_shared(const Chain<T>& h, const Chain<T>& d, const Weights<T>& weight, int64_t hidden, int64_t steps,
                     bool& forward, bool& backward, Buffer<double>& scratch, const Team& team) {
  const int64_t ld = h.out.row;
  SharedRows<double> rows(scratch, ld, team);
  double* const own = rows.own(6);
  Increments<T> own_h(h, steps, weight.exponent, own), own_d(d, steps, weight.exponent, own + 3 * ld);
  const bool writes_h = team.rank == 0, writes_d = team.rank == team.size - 1;
  if (forward && writes_h) own_h.write();
  if (backward && writes_d) own_d.write();
  while ((forward && own_h.open()) || (backward && own_d.open())) {
    const bool do_h = forward && own_h.open(), do_d = backward && own_d.open();
    rows.parity = (do_h ? own_h : own_d).step() & 1;
    read_once<true, true, true>(weight, hidden, own_h.now, do_d ? own_d.now : nullptr, rows.h(), rows.d(), ld, team);
    team.wait();
    if (do_h) {
      std::copy(rows.h(), rows.h() + hidden, own_h.next);
      own_h.advance();
      if (writes_h) own_h.write();
    }
    if (do_d) {
      rows.sum_d(own_d.next);
      own_d.advance();
      if (writes_d) own_d.write();
    }
  }
  if (forward && own_h.certified() && writes_h) own_h.close();
  if (backward && own_d.certified() && writes_d) own_d.close();
  forward = forward && !own_h.certified();
  backward = backward && !own_d.certified();
  team.wait();
  // Of two chains that go on, both take the step at which the first gave up.
  return std::min(forward ? own_h.written() : steps, backward ? own_d.written() : steps);
}

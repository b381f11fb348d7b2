// A chain by one thread, W̃ being packed and small enough for its cache.

// Finishes step `s`, whose raw result lies in its row; true if the chain has converged, and is ended.
template <typename T>
bool finish_row(const Chain<T>& c, int64_t s, int64_t w_exponent, int64_t steps) {
  const int64_t t = c.first + s * c.stride, before = t - c.stride;
  const int64_t exponent = s ? c.out.exponent[before] : c.start_exponent;
  // The drive's rows run with the output's.
  finish_step(c.out[t], exponent + w_exponent, c.drive.data + t * c.drive.row, c.drive.exponent[t * c.drive.exponent_step],
              c.out.row, c.out.exponent[t], c.out.largest[t]);
  if (!has_converged(c, s, c.out[t], c.before(s), c.out.exponent[t], exponent)) return false;
  end_converged(c, s, s, steps);
  return true;
}

// Steps [done, until); true if the chain converges.
template <typename T>
bool walk(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t& done, int64_t until, int64_t steps) {
  for (; done < until; ++done) {
    matrix_vector(w, c.before(done), c.out[c.first + done * c.stride]);
    if (finish_row(c, done, w_exponent, steps)) return true;
  }
  return false;
}

// The first steps of both chains of a layer, the interleaved W̃ being read once for both. Returns their number; they end
// with the first chain that converges.
template <typename T>
int64_t walk_both(const Chain<T>& h, const Chain<T>& d, const T* w, int64_t hidden, int64_t w_exponent, int64_t until,
                  int64_t steps, bool& h_converged, bool& d_converged) {
  int64_t done = 0;
  while (done < until && !h_converged && !d_converged) {
    matrix_vector_both(w, hidden, h.out.row, h.before(done), d.before(done), h.out[h.first + done * h.stride],
                       d.out[d.first + done * d.stride]);
    h_converged = finish_row(h, done, w_exponent, steps);
    d_converged = finish_row(d, done, w_exponent, steps);
    ++done;
  }
  return done;
}

// Several steps at once, by a power of W̃: two squarings, in rows padded to ld; false if entries underflowed, which one
// step at a time would not lose.
constexpr int64_t kStride = 4;

template <typename T>
bool stride_matrix(const Packed<T>& w, int64_t w_exponent, Buffer<T>& power, int64_t& exponent) {
  const int64_t hidden = w.depth, ld = padded<T>(hidden);
  Buffer<T> square(hidden * ld);
  power.resize(hidden * ld);
  unpack(w, 0, hidden, power.data(), ld);
  exponent = w_exponent;
  const bool underflowed = FlushDenormals::underflowed();
  for (int64_t n = 1; n < kStride; n *= 2) {
    const Product<T> product{power.data(), ld, 1, power.data(), ld, hidden};
    panels(&product, 1, square.data(), ld, hidden, ld, T(1));
    const int64_t m = magnitude(square.data(), hidden * ld);
    if (m == kZeroExponent) return false;  // nilpotent: one step at a time ends sooner
    const T s = power_of_two<T>(-m);
    for (int64_t at = 0; at < hidden * ld; at += Simd<T>::width) store(power.data() + at, load(square.data() + at) * s);
    exponent = 2 * exponent + m;
  }
  if (underflowed || !FlushDenormals::underflowed()) return true;
  FlushDenormals::forget();
  return false;
}

// Steps [from, steps), kStride at a time, where the drive has been one row, or none, for all but the first step:
// x_{s+m} = W̃^m x_s + d, d what m steps make of nothing. W̃^m is read once for m steps, whose rows fill a register tile.
template <typename T>
void stride(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, const Buffer<T>& power, int64_t power_exponent,
            int64_t from, int64_t steps) {
  const int64_t hidden = w.depth, ld = c.out.row, late = c.first + from * c.stride;
  Buffer<T> drive(2 * ld, T(0));
  T *driven = drive.data(), *before = driven + ld;
  int64_t drive_exponent = kZeroExponent, largest;
  for (int64_t n = 0; n < kStride; ++n) {
    std::swap(driven, before);
    matrix_vector(w, before, driven);
    finish_step(driven, drive_exponent + w_exponent, c.drive.data, c.drive.exponent[late * c.drive.exponent_step], ld,
                drive_exponent, largest);
  }
  for (int64_t s = from; s < steps; s += kStride) {
    const int64_t rows = std::min(kStride, steps - s), t = c.first + s * c.stride, source = t - kStride * c.stride;
    const Product<T> product{c.out[source], c.stride * ld, 1, power.data(), ld, hidden};
    panels(&product, 1, c.out[t], c.stride * ld, rows, ld, T(1));
    bool converged = rows == kStride;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = t + r * c.stride, previous = row - c.stride;
      finish_step(c.out[row], c.out.exponent[source + r * c.stride] + power_exponent, driven, drive_exponent, ld,
                  c.out.exponent[row], c.out.largest[row]);
      converged = converged && has_converged(c, s + r, c.out[row], c.out[previous], c.out.exponent[row],
                                             c.out.exponent[previous]);
    }
    if (converged) return end_converged(c, s, s + rows - 1, steps);
  }
}

constexpr int64_t kFirstLook = 24;

// The first steps, all of them if the chain converges or has a closed form: then it returns 0. Otherwise, the steps
// after which it may converge, as far as can be told, `done` of them being written.
template <typename T>
int64_t begin_chain(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t& done, int64_t steps) {
  // A chain that converges fast has done so at the first of these, mostly, one that converges at all at the second.
  constexpr int64_t kLooks[] = {kFirstLook, 64};
  // Other ways must pay for themselves in the steps that are left.
  const bool closable = !c.fill && c.from_nothing() && steps - kLooks[0] >= w.depth;
  Buffer<double> memory(closable ? 3 * c.out.row : 0);
  std::optional<Increments<T>> increments;
  if (closable) increments.emplace(c, steps, w_exponent, memory.data());
  for (const int64_t look : kLooks) {
    if (walk(c, w, w_exponent, done, std::min(look, steps), steps) || done == steps) return 0;
    if (!closable) continue;
    // The closed form starts from a row that is written.
    while (increments->open() && increments->step() + 1 < done) {
      multiply_wide(w, increments->now, increments->next);
      increments->advance();
    }
    if (increments->certified()) {
      increments->close();
      return 0;
    }
    if (!increments->open()) return std::min(increments->converges_after(), steps);
  }
  return steps;
}

// The rest of the steps.
template <typename T>
void end_chain(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t done, int64_t steps) {
  constexpr int64_t kWorthPowers = 3;
  if (done > kStride && c.drive.row == 0 && steps - done >= kWorthPowers * w.depth) {
    Buffer<T> power;
    int64_t power_exponent;
    if (stride_matrix(w, w_exponent, power, power_exponent)) {
      return stride(c, w, w_exponent, power, power_exponent, done, steps);
    }
  }
  walk(c, w, w_exponent, done, steps, steps);
}

template <typename T>
void chain(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t steps) {
  int64_t done = 0;
  if (begin_chain(c, w, w_exponent, done, steps) > 0) end_chain(c, w, w_exponent, done, steps);
}

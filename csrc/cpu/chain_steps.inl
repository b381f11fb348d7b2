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

template <typename T>
void chain(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t steps) {
  int64_t done = 0;
  if (begin_chain(c, w, w_exponent, done, steps) > 0) walk(c, w, w_exponent, done, steps, steps);
}

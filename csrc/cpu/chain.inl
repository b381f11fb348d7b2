// A chain of vectors, each a matrix times the one before, plus a drive, and how it ends early.

// A drive of T rows; row 0 means that one row serves all steps.
template <typename T>
struct Drive {
  const T* data;
  const int64_t* exponent;  // kZeroExponent: no drive at that step
  int64_t row, exponent_step;
  int64_t constant_from;  // steps from this one on are driven alike
};

// A chain that lies in `out`: `start`, then one row a step from `first` on in steps of `stride` rows.
template <typename T>
struct Chain {
  Rows<T> out;
  int64_t first, stride;
  const T* start;  // padded
  int64_t start_exponent;
  Drive<T> drive;
  bool fill;  // whether rows in closed form are wanted too
  T* coefficients[2];  // memory for those of a closed form
  const T* before(int64_t s) const { return s ? out[first + (s - 1) * stride] : start; }
  // Whether the chain starts from nothing and is driven alike at every step, or at the first alone.
  bool from_nothing() const { return start_exponent == kZeroExponent && drive.row == 0 && drive.constant_from <= 1; }
};

// The chain is a map of its last row alone once the drive is constant. When it returns that row, bit for bit, every
// later step would too: the rest is copied. With h_0 = 0 and a constant drive this happens whenever the chain
// converges, since the map is monotone, rounding included, so that its rows only grow.
template <typename T>
bool has_converged(const Chain<T>& c, int64_t step, const T* row, const T* before, int64_t exponent,
                   int64_t exponent_before) {
  return step > c.drive.constant_from && exponent == exponent_before &&
         std::memcmp(row, before, c.out.row * sizeof(T)) == 0;
}

// Records that the chain has converged at step `at`; the row of step `done` stands for the steps after it.
template <typename T>
void end_converged(const Chain<T>& c, int64_t at, int64_t done, int64_t steps) {
  const int64_t from = c.first + done * c.stride;
  for (int64_t s = done + 1, t = from + c.stride; s < steps; ++s, t += c.stride) {
    if (c.fill) std::copy(c.out[from], c.out[from] + c.out.row, c.out[t]);
    c.out.exponent[t] = c.out.exponent[from];
    c.out.largest[t] = c.out.largest[from];
  }
  const int64_t begin = c.first + at * c.stride, end = c.first + (steps - 1) * c.stride;
  Closed<T>& closed = *c.out.closed_form;
  closed.first = std::min(begin, end);
  closed.last = std::max(begin, end) + 1;
  closed.count = 1;
  closed.basis[0] = c.out[from];
  closed.coefficients[0] = c.coefficients[0];
  std::fill(c.coefficients[0] + closed.first, c.coefficients[0] + closed.last, T(1));
}

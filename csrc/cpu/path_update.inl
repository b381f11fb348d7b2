// path_update: what the optimiser does with κ, entry by entry. Plain loops, which the compiler turns into vectors.

// Calls f(i, n, kappa, step) for runs of entries within one row: kappa[j * step] belongs to entry i + j.
template <typename T, typename F>
void for_runs(const PathUpdate<T>& p, int64_t first, int64_t last, const F& f) {
  constexpr int64_t kRun = 1024;
  for (int64_t i = first; i < last;) {
    const int64_t row = i / p.columns, column = i % p.columns;
    const int64_t n = std::min({last - i, p.columns - column, kRun});
    const T* kappa = p.kappa + row * p.row_stride + column * p.column_stride;
    if (p.column_stride == 0) {
      f(i, n, kappa, std::integral_constant<int64_t, 0>{});
    } else {
      f(i, n, kappa, std::integral_constant<int64_t, 1>{});
    }
    i += n;
  }
}

template <typename T>
bool precondition(const PathUpdate<T>& p, int64_t first, int64_t last) {
  // As wide as T, so that the loop that gathers it is one over whole vectors.
  std::conditional_t<sizeof(T) == 4, int32_t, int64_t> lost = 0;
  for_runs(p, first, last, [&](int64_t i, int64_t n, const T* kappa, auto step) {
    const T* in = p.in + i;
    T* out = p.out + i;
    std::copy(in, in + n, out);
    for (int64_t k = 0; k < p.multiply_first; ++k) {
      for (int64_t j = 0; j < n; ++j) out[j] *= p.scale;
    }
    for (int64_t j = 0; j < n; ++j) {
      const T divisor = kappa[j * step];
      out[j] /= divisor == T(0) ? std::numeric_limits<T>::infinity() : divisor;
    }
    for (int64_t k = 0; k < p.multiply_after; ++k) {
      for (int64_t j = 0; j < n; ++j) out[j] *= p.scale;
    }
    // x - x is 0 where x is finite, else nan.
    for (int64_t j = 0; j < n; ++j) lost |= (in[j] - in[j] == T(0)) & (out[j] - out[j] != T(0));
  });
  return lost != 0;
}

template <typename T>
double step_length(const PathUpdate<T>& p, int64_t first, int64_t last) {
  constexpr int64_t kSums = 8;  // side by side, in a fixed order
  double sums[kSums] = {};
  for_runs(p, first, last, [&](int64_t i, int64_t n, const T* kappa, auto step) {
    const T *in = p.in + i, *before = p.before + i;
    const auto term = [&](int64_t j) {
      const double delta = static_cast<double>(in[j]) - static_cast<double>(before[j]);
      return delta * static_cast<double>(kappa[j * step]) * delta;
    };
    int64_t j = 0;
    for (; j + kSums <= n; j += kSums) {
      for (int64_t s = 0; s < kSums; ++s) sums[s] += term(j + s);
    }
    for (; j < n; ++j) sums[0] += term(j);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

template <typename T>
void norm_gradient(const PathUpdate<T>& p, int64_t first, int64_t last) {
  for_runs(p, first, last, [&](int64_t i, int64_t n, const T* kappa, auto step) {
    const T* in = p.in + i;
    T* out = p.out + i;
    for (int64_t j = 0; j < n; ++j) {
      const double weight = static_cast<double>(in[j]);
      const double value = weight * p.half * (static_cast<double>(kappa[j * step]) * p.half) * p.factor;
      out[j] = weight == 0 ? T(0) : static_cast<T>(value);
    }
  });
}

// Products of a matrix and one vector.

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
template <typename T>
void matrix_vector(const Packed<T>& w, const T* a, T* out) {
  constexpr auto table = []<int... V>(std::integer_sequence<int, V...>) {
    return std::array{&vector_panel<T, V + 1>...};
  }(std::make_integer_sequence<int, kVectorRow>());
  for (int64_t p = 0; p < w.panels(); ++p) {
    table[w.row(p) / Simd<T>::width - 1](a, w.begin(p), w.depth, out + p * w.panel);
  }
}

// Rows of a matrix by fours, their vectors in turn, so that both products below read it as one stream.
constexpr int64_t kRowsAtOnce = 4;

// next_h = W h and next_d = Wᵀ d, the interleaved W, [hidden, ld] and zeros below, being read once: dot products of its
// rows, and multiples.
template <typename T>
void matrix_vector_both(const T* w, int64_t hidden, int64_t ld, const T* h, const T* d, T* next_h, T* next_d) {
  constexpr int64_t width = Simd<T>::width;
  std::fill(next_d, next_d + ld, T(0));
  std::fill(next_h + hidden, next_h + ld, T(0));
  for (int64_t j = 0; j < hidden; j += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, hidden - j);
    T s[kRowsAtOnce];
    Vec<T> dot[kRowsAtOnce];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      s[r] = r < rows ? d[j + r] : T(0);
      dot[r] = Vec<T>{};
    }
    for (int64_t k = 0; k < ld; k += width) {
      const Vec<T> x = load(h + k);
      Vec<T> y = load(next_d + k);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRowsAtOnce; ++r, w += width) {
        const Vec<T> v = load(w);
        dot[r] += v * x;
        y += v * s[r];
      }
      store(next_d + k, y);
    }
    for (int64_t r = 0; r < rows; ++r) next_h[j + r] = lane_sum<T>(dot[r]);
  }
}

// out = qᵀ a or q a in double, four rows of q at a time; `columns` are whole vectors.
template <bool Transposed, typename T>
void multiply_wide(const T* q, int64_t rows, int64_t columns, int64_t ld, const double* a, double* out) {
  constexpr int64_t width = Simd<double>::width, kRows = 4;
  if (Transposed) std::fill(out, out + columns, 0.0);
  for (int64_t k = 0; k < rows; k += kRows) {
    const int64_t block = std::min(kRows, rows - k);
    const T* row[kRows];
    double s[kRows];
    Vec<double> dot[kRows];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      row[r] = q + (k + std::min(r, block - 1)) * ld;
      s[r] = Transposed && r < block ? a[k + r] : 0.0;
      dot[r] = Vec<double>{};
    }
    for (int64_t j = 0; j < columns; j += width) {
      Vec<double> y = load((Transposed ? out : a) + j);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        if (Transposed) y += s[r] * load_wide(row[r] + j);
        else dot[r] += y * load_wide(row[r] + j);
      }
      if (Transposed) store(out + j, y);
    }
    for (int64_t r = 0; !Transposed && r < block; ++r) out[k + r] = lane_sum<double>(dot[r]);
  }
}
// out = W a in double, W packed in panels.
template <typename T>
void multiply_wide(const Packed<T>& w, const double* a, double* out) {
  for (int64_t p = 0; p < w.panels(); ++p) {
    multiply_wide<true>(w.begin(p), w.depth, w.row(p), w.row(p), a, out + p * w.panel);
  }
}

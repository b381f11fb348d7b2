// The weights of a network as matrices, chain by chain.

// Some rows of a matrix.
template <typename T>
struct Block {
  const T* data;
  int64_t columns, first, last;
  // f(k, v): v the vector at column k of row j, 0 beyond the end.
  template <typename F>
  void row(int64_t j, const F& f) const {
    for (int64_t k = 0; k < columns; k += Simd<T>::width) f(k, load(data + j * columns + k, columns - k));
  }
};

template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns;
  int64_t size() const { return rows * columns; }
  Block<T> block(const Team& team) const {
    Block<T> b{data, columns, 0, 0};
    team.share(rows, b.first, b.last);
    return b;
  }
};

template <typename T>
bool finite(const T* w, int64_t n) {
  constexpr int64_t width = Simd<T>::width;
  Vec<T> check{};
  for (int64_t i = 0; i < n; i += width) {
    const Vec<T> v = load(w + i, n - i);
    check += v - v;  // nan for an infinity or a nan
  }
  return lane_sum<T>(check) == T(0);
}

// Chain c is direction c % D of layer c / D; there are C of h, and as many of δ.
template <typename T>
struct Network {
  const PathChain<T>& net;
  const int64_t T_, H, D, C, biases;
  std::vector<Matrix<T>> tensors;

  explicit Network(const PathChain<T>& of)
      : net(of), T_(of.seq_len), H(of.hidden), D(of.directions), C(of.num_layers * D), biases(of.bias_ih.empty() ? 0 : 2) {
    for (int64_t c = 0; c < C; ++c) {
      tensors.push_back({net.weight_ih[c], H, lowest(c) ? net.input : D * H});
      tensors.push_back({net.weight_hh[c], H, H});
      for (int64_t b = 0; b < biases; ++b) tensors.push_back({(b ? net.bias_hh : net.bias_ih)[c], 1, H});
    }
    if (net.head_weight) tensors.push_back({net.head_weight, net.outputs, D * H});
    if (net.head_bias) tensors.push_back({net.head_bias, 1, net.outputs});
    if (net.embedding) tensors.push_back({net.embedding, net.vocabulary, net.input});
  }

  const Matrix<T>& ih(int64_t c) const { return tensors[(2 + biases) * c]; }
  const Matrix<T>& hh(int64_t c) const { return tensors[(2 + biases) * c + 1]; }
  const Matrix<T>& bias(int64_t c, int64_t which) const { return tensors[(2 + biases) * c + 2 + which]; }
  const Matrix<T>& head() const { return tensors[(2 + biases) * C]; }
  const Matrix<T>& embedding() const { return tensors.back(); }

  bool wanted() const { return !net.kappa_hh.empty(); }  // κ, which needs δ
  bool lowest(int64_t c) const { return c < D; }
  bool top(int64_t c) const { return c + D >= C; }
  // The first chain of the layer below that of chain c.
  int64_t layer_below(int64_t c) const { return c - c % D - D; }
  // Of two directions, the other one of chain c's layer.
  static int64_t opposite(int64_t c) { return c ^ 1; }
  // Columns of the weights above that read chain c.
  int64_t column(int64_t c) const { return c % D * H; }
  int64_t output_steps() const { return net.last_only ? 1 : T_; }

  // Whether this thread's shares of the tensors are, those aside that are rescaled, which looks at them.
  bool all_finite(const Team& team) const {
    bool all = true;
    for (int64_t i = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
      const int64_t c = i / (2 + biases), kind = i % (2 + biases);
      if (c < C && (kind == 1 || (kind == 0 && !lowest(c)))) continue;
      int64_t first, last;
      team.share(tensors[i].size(), first, last);
      all = finite(tensors[i].data + first, last - first) && all;
    }
    return all;
  }
  int64_t first_not_finite() const {
    const auto bad = [](const Matrix<T>& w) { return !finite(w.data, w.size()); };
    return std::find_if(tensors.begin(), tensors.end(), bad) - tensors.begin();
  }
};

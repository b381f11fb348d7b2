// relu_rnn, the recurrence. Every thread takes some rows of the batch through all steps, which needs no barrier; when
// rows are fewer than threads, the threads of one row group split the columns and meet once a step.

// Depth of one pass over a packed panel: 512 rows of 64 floats stay in the second-level cache with the rows of A.
constexpr int64_t kDepthBlock = 512;

// One step of `rows` rows: c = activation(Σ extra + A · W + start), blocked over the depth of W.
template <typename T>
void step(Tile<T> t, const T* a, int64_t a_row, const Packed<T>& weight, int64_t p, const Product<T>* extra,
          int64_t rows) {
  const Activation activation = t.activation;
  const int64_t depth = weight.depth;
  t.columns = weight.width(p);
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    Product<T> products[2];
    int64_t count = 0;
    if (k == 0 && extra) products[count++] = *extra;
    products[count++] = {a + k, a_row, 1, weight.begin(p) + k * weight.row(p), weight.row(p),
                         std::min(kDepthBlock, depth - k)};
    t.num_products = count;
    t.activation = k + kDepthBlock >= depth ? activation : Activation::none;
    panel(t, products, rows);
    t.start = t.c;
    t.start_row = t.c_row;
  }
}

// How a team covers [batch rows] x [weight panels].
struct Grid {
  int64_t row_first, row_last, panel_first, panel_last;
  Barrier* barrier;  // of the threads that share these rows; null when alone

  Grid(const Team& team, int64_t batch, int64_t panels, std::vector<Barrier>& barriers) {
    // Row groups hold at least half a tile of rows; what threads are left over split the panels.
    const int64_t groups = row_groups(team.size, batch);
    const int64_t group = team.rank * groups / team.size;
    int64_t begin = 0, size = 0;  // ranks of this group
    for (int64_t rank = 0; rank < team.size; ++rank) {
      if (rank * groups / team.size < group) ++begin;
      if (rank * groups / team.size == group) ++size;
    }
    const int64_t splits = std::min(size, panels), split = team.rank - begin;
    row_first = batch * group / groups;
    row_last = batch * (group + 1) / groups;
    panel_first = split < splits ? panels * split / splits : panels;
    panel_last = split < splits ? panels * (split + 1) / splits : panels;
    barrier = size > 1 ? &barriers[group] : nullptr;
    if (barrier && split == 0) barrier->resize(static_cast<int>(size));
  }

  static int64_t row_groups(int64_t threads, int64_t batch) {
    const int64_t half_tile = std::max<int64_t>(1, kTileRows / 2);
    return std::max<int64_t>(1, std::min(threads, batch / half_tile));
  }
};

template <typename T>
void relu_rnn_forward(const ReluRnnForward<T>& p, int threads) {
  const int64_t T_ = p.seq_len, B = p.batch, H = p.hidden, I = p.input;
  std::vector<Barrier> barriers(threads);
  std::vector<T, Aligned<T>> packed_hh(Packed<T>::size(H, H)), packed_ih(p.x ? Packed<T>::size(I, H) : 0);
  const Packed<T> weight{packed_hh.data(), H, H, kPanel<T>}, input{packed_ih.data(), I, H, kPanel<T>};
  const auto copy = [](T w) { return w; };
  run_team(threads, [&](const Team& team) {
    pack(weight, p.weight_hh, 1, H, team, copy);
    if (p.x) pack(input, p.weight_ih, 1, I, team, copy);
    const Grid grid(team, B, weight.panels(), barriers);
    team.wait();
    const int64_t b = grid.row_first, rows = grid.row_last - b;
    for (int64_t t = 0; t < T_; ++t) {
      const T* before = t == 0 ? p.h_0 : p.y + (t - 1) * B * H;
      for (int64_t n = grid.panel_first; n < grid.panel_last; ++n) {
        const int64_t column = n * weight.panel;
        Tile<T> out{};
        out.alpha = 1;
        out.activation = Activation::relu;
        out.c = p.y + (t * B + b) * H + column;
        out.c_row = H;
        if (p.x) {
          out.start = p.bias ? p.bias + column : nullptr;
        } else {
          out.start = out.c;  // y holds W_ih x + b
          out.start_row = H;
        }
        const Product<T> drive{p.x + (t * B + b) * I, I, 1, input.begin(n), input.row(n), I};
        if (before) {
          step(out, before + b * H, H, weight, n, p.x ? &drive : nullptr, rows);
        } else {
          Product<T> products[1] = {drive};
          out.num_products = p.x ? 1 : 0;
          out.columns = weight.width(n);
          panel(out, products, rows);
        }
      }
      if (grid.barrier) grid.barrier->wait();
    }
  });
}

template <typename T>
void relu_rnn_backward(const ReluRnnBackward<T>& p, int threads) {
  const int64_t T_ = p.seq_len, B = p.batch, H = p.hidden;
  std::vector<Barrier> barriers(threads);
  std::vector<T, Aligned<T>> packed_hh(Packed<T>::size(H, H));
  const Packed<T> weight{packed_hh.data(), H, H, kPanel<T>};
  run_team(threads, [&](const Team& team) {
    pack(weight, p.weight_hh, H, 1, team, [](T w) { return w; });
    const Grid grid(team, B, weight.panels(), barriers);
    team.wait();
    const int64_t b = grid.row_first, rows = grid.row_last - b;
    for (int64_t t = T_ - 1; t >= -1; --t) {
      if (t < 0 && !p.grad_h_0) break;
      const T* after = t == T_ - 1 ? nullptr : p.delta + ((t + 1) * B + b) * H;
      for (int64_t n = grid.panel_first; n < grid.panel_last; ++n) {
        const int64_t column = n * weight.panel, offset = (t * B + b) * H + column;
        Tile<T> out{};
        out.alpha = 1;
        out.c = t < 0 ? p.grad_h_0 + b * H + column : p.delta + offset;
        out.c_row = H;
        if (t >= 0) {
          out.activation = Activation::mask;
          out.gate = p.y + offset;
          out.gate_row = H;
          out.start = p.grad_y ? p.grad_y + offset : nullptr;
          out.start_row = H;
        }
        if (after) {
          step(out, after, H, weight, n, static_cast<const Product<T>*>(nullptr), rows);
          continue;
        }
        // Nothing comes from a later step; grad_h_n arrives here instead, through the same gate.
        out.columns = weight.width(n);
        panel(out, static_cast<Product<T>*>(nullptr), rows);
        if (p.grad_h_n) {
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < out.columns; ++j) {
              const int64_t at = i * H + j;
              if (!(out.gate[at] <= T(0))) out.c[at] += p.grad_h_n[b * H + column + at];
            }
          }
        }
      }
      if (grid.barrier) grid.barrier->wait();
    }
  });
}

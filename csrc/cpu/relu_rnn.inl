// relu_rnn, the recurrence. Every thread takes some rows of the batch through all steps, which needs no barrier; when
// rows are fewer than threads, the threads of one row group split the columns and meet once a step.

// How a team covers [batch rows] x [weight panels].
struct Grid {
  int64_t row_first, row_last, panel_first, panel_last;
  Barrier* barrier;  // of the threads that share these rows; null when alone

  Grid(const Team& team, int64_t batch, int64_t panels, std::vector<Barrier>& barriers) {
    // What threads are left over when every row group has its rows split the panels.
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

  // How many rows of this grid a step of `rows` rows has.
  int64_t rows_of(int64_t rows) const { return std::clamp(rows, row_first, row_last) - row_first; }

  static int64_t row_groups(int64_t threads, int64_t batch) {
    return std::max<int64_t>(1, std::min(threads, batch / kRowGroup));
  }
};

template <typename T>
void relu_rnn_forward(const ReluRnnForward<T>& p, int threads) {
  const int64_t T_ = p.seq_len, B = p.batch, H = p.hidden, I = p.input;
  std::vector<Barrier> barriers(threads);
  Buffer<T> packed_hh(Packed<T>::size(H, H)), packed_ih(p.x ? Packed<T>::size(I, H) : 0);
  const Packed<T> weight{packed_hh.data(), H, H, kPanel<T>}, input{packed_ih.data(), I, H, kPanel<T>};
  const auto copy = [](T w) { return w; };
  run_team(threads, [&](const Team& team) {
    pack(weight, p.weight_hh, 1, H, team, copy);
    if (p.x) pack(input, p.weight_ih, 1, I, team, copy);
    const Grid grid(team, B, weight.panels(), barriers);
    team.wait();
    const int64_t b = grid.row_first;
    for (int64_t t = 0; t < T_; ++t) {
      const int64_t row = p.first[t] + b, rows = grid.rows_of(p.rows[t]);
      const T* before = t == 0 ? p.h_0 : p.y + p.first[t - 1] * H;
      for (int64_t n = grid.panel_first; n < grid.panel_last; ++n) {
        const int64_t column = n * weight.panel;
        Tile<T> out{};
        out.activation = Activation::relu;
        out.c = p.y + row * H + column;
        out.c_row = H;
        if (p.x) {
          out.start = p.bias ? p.bias + column : nullptr;
        } else {
          out.start = out.c;  // y holds W_ih x + b
          out.start_row = H;
        }
        const Product<T> drive{p.x + row * I, I, 1, input.begin(n), input.row(n), I};
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

// One thread's share of the weights' gradients. delta of a few steps is multiplied while it lies in the cache, as one
// product over all its rows; x carries a column of ones, whose product is the gradient of the bias.
template <typename T>
class WeightGradients {
 public:
  // Rows that are multiplied at a time: with y's rows they fill about half of a second-level cache at H = 256.
  static constexpr int64_t kRows = 256;

  WeightGradients(const ReluRnnBackward<T>& p, int64_t rows) : p_(p), rows_(rows) {}

  int64_t steps() const { return steps_; }
  // Where delta of step t lies when the caller does not want it.
  T* delta(int64_t t) { return ring_.data() + t % (steps_ + 1) * rows_ * p_.hidden; }

  // Adds steps [first, last) of batch rows from b on; delta(t) gives their rows.
  template <typename Delta>
  void add(int64_t first, int64_t last, int64_t b, const Delta& delta) {
    const int64_t H = p_.hidden, I = p_.input;
    for (int64_t t = first; t < last; ++t) {
      for (int64_t r = 0; r < rows_; ++r) {
        T* row = x_.data() + ((t - first) * rows_ + r) * ldx_;
        const T* x = p_.x + (p_.first[t] + b + r) * I;
        std::copy(x, x + I, row);
        row[I] = T(1);
      }
    }
    const auto copy = [&](Buffer<T>& to, const T* from) {
      for (int64_t r = 0; r < rows_; ++r) std::copy(from + (b + r) * H, from + (b + r + 1) * H, to.data() + r * ld_);
    };
    if (first == 0 && p_.h_0) copy(h_0_, p_.h_0);
    if (first <= 1 && !h_1_.empty()) copy(h_1_, p_.y + p_.first[0] * H);
    multiply(hh_.data(), ld_, first, last, delta, [&](int64_t t) {
      if (t == 0) return std::pair<const T*, int64_t>(p_.h_0 ? h_0_.data() : nullptr, ld_);
      if (t == 1 && !h_1_.empty()) return std::pair<const T*, int64_t>(h_1_.data(), ld_);
      // Whole vectors of its last row reach into the next step in memory, which is there: h_1 is last in memory only
      // when the steps run backwards.
      return std::pair<const T*, int64_t>(p_.y + (p_.first[t - 1] + b) * H, H);
    });
    multiply(ih_.data(), ldx_, first, last, delta,
             [&](int64_t t) { return std::pair<const T*, int64_t>(x_.data() + (t - first) * rows_ * ldx_, ldx_); });
  }

  // Rows [first, last) of the sum over all threads' shares.
  static void reduce(const std::vector<std::unique_ptr<WeightGradients>>& shares, int64_t first, int64_t last) {
    const ReluRnnBackward<T>& p = shares[0]->p_;
    const int64_t ld = shares[0]->ld_, ldx = shares[0]->ldx_;
    for (int64_t j = first; j < last; ++j) {
      for (size_t s = 0; s < shares.size(); ++s) {
        const T* hh = shares[s]->hh_.data() + j * ld;
        const T* ih = shares[s]->ih_.data() + j * ldx;
        for (int64_t k = 0; k < p.hidden; ++k) set_or_add(p.grad_weight_hh[j * p.hidden + k], hh[k], s);
        for (int64_t k = 0; k < p.input; ++k) set_or_add(p.grad_weight_ih[j * p.input + k], ih[k], s);
        set_or_add(p.grad_bias[j], ih[p.input], s);
      }
    }
  }

 private:
  static void set_or_add(T& to, T value, size_t share) { to = share == 0 ? value : to + value; }

  template <typename Delta, typename Right>
  void multiply(T* sum, int64_t ld, int64_t first, int64_t last, const Delta& delta, const Right& right) {
    for (int64_t column = 0; column < ld; column += kPanel<T>) {
      products_.clear();
      for (int64_t t = first; t < last; ++t) {
        const auto [rows, stride] = right(t);
        if (rows) products_.push_back({delta(t), 1, p_.hidden, rows + column, stride, rows_});
      }
      Tile<T> tile{};
      tile.num_products = static_cast<int64_t>(products_.size());
      tile.columns = std::min(kPanel<T>, ld - column);
      tile.c = sum + column;
      tile.c_row = ld;
      tile.start = tile.c;
      tile.start_row = ld;
      panel(tile, products_.data(), p_.hidden);
    }
  }

  static Buffer<T> zeros(int64_t n) { return Buffer<T>(n, T(0)); }

  const ReluRnnBackward<T>& p_;
  const int64_t rows_, ld_ = padded<T>(p_.hidden), ldx_ = padded<T>(p_.input + 1);
  const int64_t steps_ = std::max<int64_t>(1, kRows / std::max<int64_t>(rows_, 1));
  Buffer<T> hh_ = zeros(p_.hidden * ld_), ih_ = zeros(p_.hidden * ldx_), x_ = zeros(steps_ * rows_ * ldx_);
  Buffer<T> h_0_ = zeros(p_.h_0 ? rows_ * ld_ : 0), h_1_ = zeros(p_.first[0] > 0 ? rows_ * ld_ : 0);
  Buffer<T> ring_ = Buffer<T>(p_.delta ? 0 : (steps_ + 1) * rows_ * p_.hidden);
  std::vector<Product<T>> products_;
};

// delta of step t (t = -1: the gradient of h_0), rows from b on in one panel: of `going_on` rows whose delta of the step
// after is `later`, and of `ending` rows, to which nothing comes from there; grad_h_n arrives instead, by the same gate.
template <typename T>
[[gnu::always_inline]] inline void backward_panel(const ReluRnnBackward<T>& p, const Packed<T>& weight, int64_t n, int64_t t,
                                                  int64_t b, T* delta, const T* later, int64_t going_on, int64_t ending) {
  const int64_t H = p.hidden, column = n * weight.panel;
  Tile<T> out{};
  out.c = delta + column;
  out.c_row = H;
  if (t >= 0) {
    const int64_t offset = (p.first[t] + b) * H + column;
    out.activation = Activation::mask;
    out.gate = p.y + offset;
    out.gate_row = H;
    out.start = p.grad_y ? p.grad_y + offset : nullptr;
    out.start_row = H;
  }
  if (going_on > 0) step(out, later, H, weight, n, static_cast<const Product<T>*>(nullptr), going_on);
  if (ending == 0) return;
  const int64_t skipped = going_on * H;
  out.c += skipped;
  out.gate += skipped;
  if (out.start) out.start += skipped;
  out.columns = weight.width(n);
  panel(out, static_cast<Product<T>*>(nullptr), ending);
  for (int64_t i = 0; p.grad_h_n && i < ending; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) {
      const int64_t at = i * H + j;
      if (!(out.gate[at] <= T(0))) out.c[at] += p.grad_h_n[b * H + column + skipped + at];
    }
  }
}

template <typename T>
void relu_rnn_backward(const ReluRnnBackward<T>& p, int threads) {
  const int64_t T_ = p.seq_len, B = p.batch, H = p.hidden;
  std::vector<Barrier> barriers(threads);
  Buffer<T> packed_hh(Packed<T>::size(H, H));
  const Packed<T> weight{packed_hh.data(), H, H, kPanel<T>};
  std::vector<std::unique_ptr<WeightGradients<T>>> shares;
  run_team(threads, [&](const Team& team) {
    pack(weight, p.weight_hh, H, 1, team, [](T w) { return w; });
    const Grid grid(team, B, weight.panels(), barriers);
    const int64_t b = grid.row_first, rows = grid.row_last - b;
    if (p.grad_weight_hh) {
      if (team.rank == 0) shares.resize(team.size);
      team.wait();
      // Made by the thread that uses it, so that its pages lie near.
      shares[team.rank] = std::make_unique<WeightGradients<T>>(p, rows);
    }
    team.wait();
    WeightGradients<T>* const gradients = p.grad_weight_hh ? shares[team.rank].get() : nullptr;
    const auto delta = [&](int64_t t) { return p.delta ? p.delta + (p.first[t] + b) * H : gradients->delta(t); };
    int64_t multiplied = T_;  // steps from here on are in the gradients
    int64_t going_on = 0;  // rows of the step after t
    for (int64_t t = T_ - 1; t >= (p.grad_h_0 ? -1 : 0); --t) {
      const int64_t rows_now = t < 0 ? rows : grid.rows_of(p.rows[t]), ending = rows_now - going_on;
      T *const now = t < 0 ? p.grad_h_0 + b * H : delta(t), *const later = going_on > 0 ? delta(t + 1) : nullptr;
      for (int64_t n = grid.panel_first; n < grid.panel_last; ++n) {
        backward_panel(p, weight, n, t, b, now, later, going_on, ending);
      }
      going_on = rows_now;
      if (grid.barrier) grid.barrier->wait();
      if (gradients && t >= 0 && (t == 0 || multiplied - t == gradients->steps())) {
        gradients->add(t, multiplied, b, delta);
        multiplied = t;
      }
    }
    if (gradients) {
      team.wait();
      int64_t first, last;
      team.share(H, first, last);
      WeightGradients<T>::reduce(shares, first, last);
    }
  });
}

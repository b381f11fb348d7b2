// κ⁽¹⁾ of one layer in blocks of time. With n = 2^q steps a block, N blocks, B = W̃ᵀ, K = Σ_t δ_{t+1} h_tᵀ over a block that
// starts at h = x and ends at δ = y is
//
//     Σ_i (B^{n-1-i} y + c_{n-1-i}) (A^i x + b_i)ᵀ,   A = W̃,   b_i = Σ_{l<i} A^l b,   c_i = Σ_{l<i} B^l c
//
// for drives b of h and c of δ. Over all blocks, with G = Σ y xᵀ, Y = Σ y, and X_i the sum of all h at the i-th step of a
// block (X_i = A X_{i-1} + N b):
//
//     K = F_n(G) + Σ_i (B^{n-1-i} Y) b_iᵀ + Σ_i c_{n-1-i} X_iᵀ,   F_1(G) = G,   F_{2i}(G) = B^i F_i(G) + F_i(G) B^i.
//
// So 3 q products of H³ and N + 2 n steps replace T steps a chain and T H² for the sum. No term is negative: nothing
// cancels. Steps that fill no block, r of them, come first.

// The rows of one chain: single steps and blocks of steps by powers, each with its exponent.
template <typename T>
class BlockRows {
 public:
  BlockRows(T* data, int64_t rows, int64_t ld) : memory_(1, rows, ld, data), rows_(memory_[0]) {}
  BlockRows(const BlockRows&) = delete;
  const Rows<T>& rows() const { return rows_; }

  void set(int64_t to, const T* row, int64_t exponent) {
    std::copy(row, row + rows_.row, rows_[to]);
    const T most = *std::max_element(row, row + rows_.row);
    rows_.largest[to] = magnitude(most);
    rows_.exponent[to] = most > T(0) ? exponent : kZeroExponent;
  }
  void clear(int64_t to) { std::fill(rows_[to], rows_[to] + rows_.row, T(0)); }
  // Row `to` = w · row `from` + drive.
  void step(const Packed<T>& w, int64_t w_exponent, int64_t from, const T* drive, int64_t drive_exponent, int64_t to) {
    matrix_vector(w, rows_[from], rows_[to]);
    finish_step(rows_[to], rows_.exponent[from] + w_exponent, drive, drive_exponent, rows_.row, rows_.exponent[to],
                rows_.largest[to]);
  }
  // Row `to` = Σ of rows [first, last).
  void sum(int64_t first, int64_t last, int64_t to, T* scratch) {
    clear(to);
    rows_.exponent[to] = kZeroExponent;
    int64_t own;
    if (!sum_rows(rows_, first, last, rows_.row, scratch, own)) mark_underflow();
    finish_step(rows_[to], kZeroExponent, scratch, own, rows_.row, rows_.exponent[to], rows_.largest[to]);
  }
  // out += times · Σ of rows [first, last).
  void add_to(T* out, int64_t& exponent, int64_t first, int64_t last, T times, T* scratch) const {
    int64_t own, largest;
    if (!sum_rows(rows_, first, last, rows_.row, scratch, own)) mark_underflow();
    for (int64_t k = 0; k < rows_.row; ++k) scratch[k] *= times;
    finish_step(out, exponent, scratch, own, rows_.row, exponent, largest);
  }

 private:
  Sequences<T> memory_;
  const Rows<T> rows_;
};

template <typename T>
class ChainBlocks {
 public:
  // Of T steps in blocks of 2^log2, one at least.
  ChainBlocks(int64_t seq_len, int64_t hidden, int64_t log2, int threads)
      : H_(hidden), q_(log2), N_(seq_len >> log2), r_(seq_len - (N_ << log2)), tops_(2 * threads), underflowed_(2 * threads) {
    for (int64_t n = 1; n < H_; n *= 2) ++bits_;
  }

  // What it costs, in multiply-adds of a matrix product by one thread; those of a vector's product take kVector as long.
  static constexpr double kVector = 2;
  static double cost(int64_t seq_len, int64_t hidden, int64_t log2, int threads) {
    const double n = static_cast<double>(int64_t{1} << log2), blocks = static_cast<double>(seq_len) / n;
    const double H = static_cast<double>(hidden), chains = threads > 1 ? 1 : 2;
    return H * H * (kVector * chains * (blocks + 2.5 * n) + (3 * static_cast<double>(log2) * H + blocks) / threads);
  }

  int64_t steps() const { return n_; }

  struct Sums {
    T *h, *d;  // Σ h_t over the outputs, Σ δ_t
    int64_t *h_exponent, *d_exponent;
  };

  // κ⁽¹⁾ with its exponent. False on all threads if anything underflowed, which single steps may not lose, or a power is
  // zero, which they would come to soon. `h` and `d` are the chains, `w_h` and `w_d` their packed matrices.
  bool run(const Chain<T>& h, const Chain<T>& d, const Packed<T>& w_h, const Packed<T>& w_d, int64_t w_exponent,
           bool last_only, T* kappa, int64_t* kappa_exponent, const Sums& sums, const Team& team) {
    FlushDenormals::forget();
    State s;
    if (!all_powers(w_h, w_exponent, s, team)) return false;
    chains(h, d, w_h, w_d, w_exponent, last_only, sums, s, team);
    if (!products(s, team)) return false;
    finish(s, kappa, kappa_exponent, team);
    return none_underflowed(s, team);
  }

 private:
  // Products of two numbers up to 2^kTop, summed over H, are in range, and so is what is far smaller.
  static constexpr int64_t kTop = std::is_same<T, float>::value ? 50 : 400, kMost = 16;

  // What every thread knows alike.
  struct State {
    std::array<int64_t, kMost> exponents, tops;  // of the powers; entries are below 2^tops
    int64_t exponent, top, rest_exponent;        // of F(G), and of the rest
    const T* result;
    int parity = 0;
  };

  int64_t left_size(int64_t columns) const { return PairSum<T>::left_size(std::max(N_, low_), columns); }
  T* power(int64_t i) const { return powers_ + i * H_ * ld_; }

  // B, B², B⁴ … Bⁿ.
  bool all_powers(const Packed<T>& w, int64_t w_exponent, State& s, const Team& team) {
    int64_t first, last;
    team.share(H_, first, last);
    unpack(w, first, last, power(0), ld_);
    s.exponents[0] = w_exponent;
    for (int64_t i = 0;; ++i) {
      if (!agree(power(i), s.tops[i], s, team)) return false;
      if (i == q_) return true;
      const int64_t shift = kTop - 2 * s.tops[i] - bits_;
      const Product<T> square{power(i) + first * ld_, ld_, 1, power(i), ld_, H_};
      panels(&square, 1, power(i + 1) + first * ld_, ld_, last - first, ld_, power_of_two<T>(shift));
      s.exponents[i + 1] = 2 * s.exponents[i] - shift;
    }
  }

  // When it returns, all rows of the matrix are there, and all threads know a power of two above its entries. False if
  // there is none, or if something underflowed in a thread.
  bool agree(const T* matrix, int64_t& top, State& s, const Team& team) {
    int64_t first, last;
    team.share(H_, first, last);
    const auto tops = tops_.begin() + s.parity * team.size;
    tops[team.rank] = magnitude(matrix + first * ld_, (last - first) * ld_);
    const bool held = none_underflowed(s, team);
    top = *std::max_element(tops, tops + team.size) + 1;
    return held && top > kZeroExponent / 2;
  }
  bool none_underflowed(State& s, const Team& team) {
    const auto underflowed = underflowed_.begin() + s.parity * team.size;
    s.parity ^= 1;
    underflowed[team.rank] = FlushDenormals::underflowed();
    team.wait();
    return std::find(underflowed, underflowed + team.size, 1) == underflowed + team.size;
  }

  void chains(const Chain<T>& h, const Chain<T>& d, const Packed<T>& w_h, const Packed<T>& w_d, int64_t w_exponent,
              bool last_only, const Sums& sums, const State& s, const Team& team) {
    const auto same = [](T v) { return v; };
    const Team alone{};
    if (team.rank == 0) {
      pack(packed_h_, power(q_), ld_, 1, alone, same);
      run_h(h, w_h, w_exponent, s.exponents[q_], last_only, sums.h, *sums.h_exponent);
    }
    if (team.rank == team.size - 1) {
      pack(packed_d_, power(q_), 1, ld_, alone, same);
      run_d(d, w_d, w_exponent, s.exponents[q_], last_only, sums.d, *sums.d_exponent);
    }
    team.wait();
  }

  // Right factors, rows: b_i | X_i | h_0 … h_{r-1}; then x of every block, the step after the last, b_n.
  void run_h(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t power_exponent, bool last_only, T* sum,
             int64_t& sum_exponent) {
    const T* b = c.drive.data;
    const int64_t be = c.drive.exponent[c.first * c.drive.exponent_step], x = low_, spare = low_ + N_ + 1;
    T *total = scratch_h_, *more = scratch_h_ + ld_;
    h_.clear(0);
    for (int64_t i = 1; i < n_; ++i) h_.step(w, w_exponent, i - 1, b, be, i);
    h_.step(w, w_exponent, n_ - 1, b, be, spare);
    h_.set(r_ ? 2 * n_ : x, c.start, c.start_exponent);
    for (int64_t u = 1; u <= r_; ++u) h_.step(w, w_exponent, 2 * n_ + u - 1, b, be, u < r_ ? 2 * n_ + u : x);
    const Rows<T>& rows = h_.rows();
    for (int64_t i = x + 1; i <= x + N_; ++i) h_.step(packed_h_, power_exponent, i - 1, rows[spare], rows.exponent[spare], i);
    h_.sum(x, x + N_, n_, more);
    for (int64_t k = 0; k < ld_; ++k) total[k] = b[k] * static_cast<T>(N_);
    for (int64_t i = n_ + 1; i < 2 * n_; ++i) h_.step(w, w_exponent, i - 1, total, be, i);
    h_.step(w, w_exponent, 2 * n_ - 1, total, be, spare);
    // The outputs: step T alone, or the r first ones, each but the first step of a block, the first of the one after it.
    std::fill(sum, sum + ld_, T(0));
    sum_exponent = kZeroExponent;
    if (last_only) return h_.add_to(sum, sum_exponent, x + N_, x + N_ + 1, T(1), more);
    if (r_ > 0) h_.add_to(sum, sum_exponent, 2 * n_ + 1, 2 * n_ + r_ + 1, T(1), more);
    h_.add_to(sum, sum_exponent, n_ + 1, 2 * n_, T(1), more);
    h_.add_to(sum, sum_exponent, spare, spare + 1, T(1), more);
  }

  // Left factors, rows: B^{n-1-i} Y | c_{n-1-i} | δ_1 … δ_r; then y of every block, in the order of time, c_n.
  void run_d(const Chain<T>& c, const Packed<T>& w, int64_t w_exponent, int64_t power_exponent, bool last_only, T* sum,
             int64_t& sum_exponent) {
    const T* b = c.drive.data;
    const int64_t start_exponent = c.drive.exponent[c.first * c.drive.exponent_step];
    const int64_t be = last_only ? kZeroExponent : start_exponent, y = low_ + N_ - 1, spare = low_ + N_ + 1;
    T* const more = scratch_d_;
    d_.clear(2 * n_ - 1);
    for (int64_t i = 2 * n_ - 2; i >= n_; --i) d_.step(w, w_exponent, i + 1, b, be, i);
    d_.step(w, w_exponent, n_, b, be, spare);
    const Rows<T>& rows = d_.rows();
    const auto block = [&](int64_t from, int64_t to) {
      d_.step(packed_d_, power_exponent, from, rows[spare], rows.exponent[spare], to);
    };
    d_.set(y, b, start_exponent);
    for (int64_t i = y - 1; i >= low_; --i) block(i + 1, i);
    if (r_ > 0) block(low_, 2 * n_ + r_ - 1);
    for (int64_t i = 2 * n_ + r_ - 2; i >= 2 * n_; --i) d_.step(w, w_exponent, i + 1, b, be, i);
    d_.sum(low_, low_ + N_, n_ - 1, more);
    for (int64_t i = n_ - 2; i >= 0; --i) d_.step(w, w_exponent, i + 1, b, kZeroExponent, i);
    std::fill(sum, sum + ld_, T(0));
    sum_exponent = kZeroExponent;
    d_.add_to(sum, sum_exponent, 0, n_, T(1), more);
    d_.add_to(sum, sum_exponent, n_, 2 * n_, static_cast<T>(N_), more);
    if (r_ > 0) d_.add_to(sum, sum_exponent, 2 * n_, 2 * n_ + r_, T(1), more);
  }

  // F_n(G) and, in rest_, the other terms of K.
  bool products(State& s, const Team& team) {
    int64_t first, last;
    team.share(H_, first, last);
    s.rest_exponent = outer(0, low_, rest_, team);
    T *from = sum_[0], *to = sum_[1];
    s.exponent = outer(low_, N_, from, team);
    for (int64_t i = 0;; ++i) {
      if (!agree(from, s.top, s, team)) return false;
      if (i == q_) break;
      const int64_t shift = kTop - s.top - s.tops[i] - bits_ - 1;
      const Product<T> both[] = {{power(i) + first * ld_, ld_, 1, from, ld_, H_},
                                 {from + first * ld_, ld_, 1, power(i), ld_, H_}};
      panels(both, 2, to + first * ld_, ld_, last - first, ld_, power_of_two<T>(shift));
      s.exponent += s.exponents[i] - shift;
      std::swap(from, to);
    }
    s.result = from;
    return true;
  }

  // This thread's rows of out = Σ_t d_t h_tᵀ, `count` of them from `start` on; returns its exponent.
  int64_t outer(int64_t start, int64_t count, T* out, const Team& team) const {
    int64_t first, last;
    team.share(H_, first, last);
    const PairSum<T> sum(d_.rows().from(start), h_.rows().from(start), count, first, last, left_ + left_size(first), nullptr);
    if (sum.drops) mark_underflow();
    const int64_t exponent = sum.count ? sum.largest - kCentre<T> : kZeroExponent;
    sum.multiply(out + first * ld_, ld_, last - first, ld_, power_of_two<T>(sum.exponent - exponent));
    return exponent;
  }

  void finish(const State& s, T* kappa, int64_t* kappa_exponent, const Team& team) const {
    int64_t first, last;
    team.share(H_, first, last);
    const int64_t result = result_exponent(std::max(s.exponent + s.top, s.rest_exponent + kCentre<T>));
    if (team.rank == 0) *kappa_exponent = result;
    const T a = power_of_two<T>(s.exponent - result), b = power_of_two<T>(s.rest_exponent - result);
    for (int64_t j = first; j < last; ++j) {
      const T *large = s.result + j * ld_, *small = rest_ + j * ld_;
      for (int64_t k = 0; k < ld_; k += Simd<T>::width) {
        store(kappa + j * H_ + k, a * load(large + k) + b * load(small + k), H_ - k);
      }
      // What is left is that of the other, on the result's scale.
      const T* const held = kappa + j * H_;
      if ((b == T(0) && !covers(held, small, H_)) || (a == T(0) && !covers(held, large, H_))) mark_underflow();
    }
  }

  T* matrix(int64_t count = 1) { return memory_.take(count * H_ * ld_); }
  T* rows(int64_t count) { return memory_.take(count * ld_); }

  const int64_t H_, q_, N_, r_, ld_ = padded<T>(H_), n_ = int64_t{1} << q_, low_ = 2 * n_ + r_, count_ = low_ + N_ + 3;
  int64_t bits_ = 0;
  Workspace<T, 2> memory_{(q_ + 6) * H_ * ld_ + 2 * (count_ + 2) * ld_ + padded<T>(left_size(H_))};
  T *const powers_ = matrix(q_ + 1), *const sum_[2] = {matrix(), matrix()}, *const rest_ = matrix();
  const Packed<T> packed_h_{matrix(), H_, H_, kVectorRow * Simd<T>::width};  // of n steps at once
  const Packed<T> packed_d_{matrix(), H_, H_, kVectorRow * Simd<T>::width};
  BlockRows<T> h_{rows(count_), count_, ld_}, d_{rows(count_), count_, ld_};
  T *const scratch_h_ = rows(2), *const scratch_d_ = rows(2), *const left_ = memory_.take(left_size(H_));
  std::vector<int64_t> tops_;  // by thread, twice
  std::vector<char> underflowed_;
};

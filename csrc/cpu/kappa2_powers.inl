// Powers of W̃ᵀ, which lie in memory as S does, cached in chunks, each with a largest entry in [1, 2) and an exponent.

template <typename T>
class Powers {
 public:
  const int64_t chunk;  // how many are cached

  Powers(int64_t seq_len, int64_t hidden, int64_t workspace_bytes, int threads)
      : chunk(chunk_size(seq_len, hidden, workspace_bytes)),
        H_(hidden),
        more_(chunk < seq_len - 2 ? chunk : 0),
        flushed_(threads, 0) {}

  // The n-th that is cached, its exponent, and what an entry misses at most because it underflowed.
  const T* operator[](int64_t n) const { return powers_ + n * matrix_; }
  int64_t exponent(int64_t n) const { return exponents_[n]; }
  double missing(int64_t n) const { return missing_[n]; }
  const Packed<T>& first_factor() const { return first_; }

  // The first. Returns whether anything underflowed in this thread's rows.
  bool set_first(const Weights<T>& w, const Team& team) {
    int64_t first, last;
    team.share(H_, first, last);
    constexpr int64_t kBlock = 16;
    for (int64_t j0 = first; j0 < last; j0 += kBlock) {
      const int64_t j1 = std::min(j0 + kBlock, last);
      for (int64_t k0 = 0; k0 < H_; k0 += kBlock) {
        // By way of a small square: rows of either matrix may lie a power of two apart, on the same cache lines.
        const int64_t k1 = std::min(k0 + kBlock, H_);
        T square[kBlock][kBlock + 1];
        for (int64_t k = k0; k < k1; ++k) {
          for (int64_t j = j0; j < j1; ++j) {
            const T v = w.data[k * H_ + j] * w.column[j] * w.row[k];
            square[j - j0][k - k0] = v * v;
          }
        }
        for (int64_t j = j0; j < j1; ++j) std::copy(square[j - j0], square[j - j0] + (k1 - k0), powers_ + j * ld_ + k0);
      }
      for (int64_t j = j0; j < j1; ++j) std::fill(powers_ + j * ld_ + H_, powers_ + (j + 1) * ld_, T(0));
    }
    if (team.rank == 0) {
      exponents_[0] = w.exponent;
      missing_[0] = 0;  // and not what a former chain's last chunk left
      count_ = 1;
    }
    const bool underflowed = FlushDenormals::underflowed();
    team.wait();
    pack_power(first_, 0, team);
    return underflowed;
  }

  // Powers 1 … last of the first chunk: one by one, or as many again as there are in one wide product.
  void form(int64_t last, const Team& team) {
    while (count_ < last) {
      const int64_t have = count_, more = std::min(have, last - have);
      T* const to = powers_ + have * matrix_;
      team.wait();
      if (more == 1) {
        multiply(have - 1, 1, first_, exponents_[0], missing_[0], to, have, team);
      } else {
        pack_power(wide_, have - 1, team);
        multiply(0, more, wide_, exponents_[have - 1], missing_[have - 1], to, have, team);
      }
      if (team.rank == 0) count_ += more;
      team.wait();
    }
  }

  // The cached powers times the last of the first chunk, which the cache still holds if `first`.
  void next_chunk(int64_t wanted, bool first, const Team& team) {
    team.wait();
    if (first) {
      if (team.rank == 0) {
        wide_exponent_ = exponents_[chunk - 1];
        wide_missing_ = missing_[chunk - 1];
      }
      pack_power(wide_, chunk - 1, team);
    }
    multiply(0, wanted, wide_, wide_exponent_, wide_missing_, other_, 0, team);
    if (team.rank == 0) std::swap(powers_, other_);
    team.wait();
  }

  // The largest sum of a row of W̃: what C times W̃ᵀ makes of an error, at most.
  double largest_row_sum() const {
    std::vector<double> sums(H_, 0.0);
    for (int64_t panel = 0; panel < first_.panels(); ++panel) {
      for (int64_t k = 0; k < H_; ++k) {
        const T* const row = first_.begin(panel) + k * first_.row(panel);
        for (int64_t n = 0; n < first_.width(panel); ++n) sums[panel * first_.panel + n] += row[n];
      }
    }
    return *std::max_element(sums.begin(), sums.end());
  }

 private:
  static int64_t chunk_size(int64_t seq_len, int64_t hidden, int64_t workspace_bytes) {
    const int64_t matrix = hidden * padded<T>(hidden) * static_cast<int64_t>(sizeof(T));
    const int64_t needed = std::max<int64_t>(seq_len - 2, 1), budget = std::max<int64_t>(workspace_bytes / matrix, 8);
    return needed <= budget ? needed : budget / 2;
  }

  void pack_power(const Packed<T>& to, int64_t n, const Team& team) {
    pack(to, (*this)[n], ld_, 1, team, [](T v) { return v; });
    team.wait();
  }

  // to[i] = power from + i, times `right`, for i = 0 … count-1; what is known of it goes to place to_at + i.
  void multiply(int64_t from, int64_t count, const Packed<T>& right, int64_t right_exponent, double right_missing, T* to,
                int64_t to_at, const Team& team) {
    FlushDenormals::forget();
    int64_t first, last;
    team.share(H_, first, last);
    if (team.rank == 0) tops_.assign(count * team.size, T(0));
    team.wait();
    for (int64_t i = 0; i < count; ++i) {
      T* const out = to + i * matrix_ + first * ld_;
      multiply_packed((*this)[from + i] + first * ld_, ld_, right, out, ld_, last - first);
      Vec<T> most{};
      for (int64_t j = 0; j < last - first; ++j) {
        T* const row = out + j * ld_;
        std::fill(row + H_, row + ld_, T(0));
        for (int64_t k = 0; k < ld_; k += Simd<T>::width) most = maximum(most, load(row + k));
      }
      tops_[i * team.size + team.rank] = largest_lane(most);
    }
    team.wait();
    std::vector<double> scales(team.rank == 0 ? count : 0);
    for (int64_t i = 0; i < count; ++i) {
      const T* const tops = tops_.data() + i * team.size;
      const T top = *std::max_element(tops, tops + team.size);
      const int64_t m = top > T(0) ? std::ilogb(top) : 0;
      const T s = power_of_two<T>(-m);
      for (int64_t at = i * matrix_ + first * ld_; m != 0 && at < i * matrix_ + last * ld_; at += Simd<T>::width) {
        store(to + at, load(to + at) * s);
      }
      if (team.rank != 0) continue;
      exponents_[to_at + i] = top > T(0) ? exponents_[from + i] + right_exponent + m : kZeroExponent;
      scales[i] = s;
    }
    flushed_[team.rank] = FlushDenormals::underflowed();
    team.wait();
    if (team.rank == 0) {
      const double rows = 2 * static_cast<double>(H_);  // an entry of a product has so much of the largest error, at most
      const bool flushed = std::find(flushed_.begin(), flushed_.begin() + team.size, 1) != flushed_.begin() + team.size;
      const double tiny = flushed ? std::numeric_limits<T>::min() : 0;
      for (int64_t i = 0; i < count; ++i) {
        const double own = rows * (missing_[from + i] * (1 + right_missing) + right_missing);
        missing_[to_at + i] = scales[i] * (own + rows * tiny) + tiny;
      }
    }
    team.wait();
  }

  const int64_t H_, more_, ld_ = padded<T>(H_), matrix_ = H_ * ld_, packed_ = padded<T>(Packed<T>::size(H_, H_));
  Workspace<T, 3> memory_{(chunk + more_) * matrix_ + 2 * packed_};
  T *powers_ = memory_.take(chunk * matrix_), *other_ = memory_.take(more_ * matrix_);
  const Packed<T> first_{memory_.take(packed_), H_, H_, kPanel<T>};
  const Packed<T> wide_{memory_.take(packed_), H_, H_, kPanel<T>};  // whichever power wide products need
  int64_t count_ = 0, wide_exponent_ = 0;
  double wide_missing_ = 0;
  std::vector<int64_t> exponents_ = std::vector<int64_t>(chunk + 1);
  std::vector<double> missing_ = std::vector<double>(chunk + 1);
  std::vector<int> flushed_;  // by thread
  std::vector<T> tops_;
};

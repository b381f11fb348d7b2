// What drives the chains: either end of the network, or the layer below (h) or above (δ), in both directions.

// What `pack` makes of a weight: columns of W, from `start` on, run down its rows if Forward.
template <bool Forward, typename T>
auto square(const Weights<T>& w, int64_t start) {
  return [row = w.row, column = w.column + start](T v, int64_t k, int64_t n) {
    v = v * column[Forward ? k : n] * row[Forward ? n : k];
    return v * v;
  };
}

template <typename T>
class Drives {
 public:
  Drives(const Network<T>& of, const Canonical<T>& canonical, const Boundary<T>& boundary, Sequences<T>& h, Sequences<T>& d)
      : n_(of), canonical_(canonical), boundary_(boundary), h_(h), d_(d) {
    if (n_.wanted()) top_exponent_.assign(n_.D * n_.T_, kZeroExponent);
    if (!mixes_) return;
    mixed_h_.resize(Packed<T>::size(n_.H, n_.H));
    if (n_.wanted()) mixed_d_.resize(Packed<T>::size(n_.H, n_.H));
  }

  // The outputs, once the boundary is there.
  void set_outputs() {
    for (int64_t e = 0; e < n_.D && !top_exponent_.empty(); ++e) {
      const int64_t first = n_.T_ - n_.output_steps();
      std::fill_n(top_exponent_.begin() + e * n_.T_ + first, n_.output_steps(), boundary_.head[e].exponent);
    }
  }

  Drive<T> of_h(int64_t c, const Team& team) {
    if (n_.lowest(c)) return {boundary_.first_drive[c].data.data(), &boundary_.first_drive[c].exponent, 0, 0, 0};
    const int64_t below = c - n_.D;
    const Rows<T> drive = h_drive_[0], after_first = drive.from(1);
    const auto mix_up = [&](int64_t from, const Rows<T>& out) {
      mix<true>(h_[from].from(1), canonical_.ih[c], n_.column(from), mixed_h_, out, team);
    };
    mix_up(below, after_first);
    if (n_.D > 1) {
      mix_up(n_.opposite(below), h_other_[0]);
      add_flipped(after_first, h_other_[0], team);
    }
    const Scaled<T>& bias = boundary_.bias[c];
    if (bias.exponent != kZeroExponent) {
      add(after_first, team, [&](int64_t) { return std::pair<const T*, int64_t>(bias.data.data(), bias.exponent); });
    }
    team.wait();
    // Row t of the drive belongs to step t - 1. What the other direction reaches last comes first here: never constant.
    const Closed<T> end = *h_[below].closed_form;
    return {drive.data, drive.exponent, ld_, 1, n_.D == 1 && end.last > end.first ? end.first - 1 : n_.T_};
  }
  Drive<T> of_d(int64_t c, const Team& team) {
    const int64_t e = c % n_.D, above = c + n_.D;
    if (n_.top(c)) return {boundary_.head[e].data.data(), top_exponent_.data() + e * n_.T_, 0, 1, n_.net.last_only};
    const Rows<T> drive = d_drive_[0];
    const auto mix_down = [&](int64_t from, const Rows<T>& out) {
      mix<false>(d_[from], canonical_.ih[from], n_.column(c), mixed_d_, out, team);
    };
    mix_down(above, drive);
    if (n_.D > 1) {
      mix_down(n_.opposite(above), d_other_[0]);
      add_flipped(drive, d_other_[0], team);
    }
    team.wait();
    // Row t of the drive belongs to step T - 1 - t.
    const Closed<T> end = *d_[above].closed_form;
    return {drive.data, drive.exponent, ld_, 1, n_.D == 1 && end.last > end.first ? n_.T_ - end.last : n_.T_};
  }

  // T rows in the time of the other direction. The next call overwrites them.
  Rows<T> flipped(const Rows<T>& rows, const Team& team) {
    const Rows<T> out = h_other_[0];
    team.wait();
    int64_t first, last;
    team.share(n_.T_, first, last);
    for (int64_t t = first; t < last; ++t) {
      const int64_t s = n_.T_ - 1 - t;
      std::copy(rows[s], rows[s] + ld_, out[t]);
      out.exponent[t] = rows.exponent[s];
      out.largest[t] = rows.largest[s];
    }
    team.wait();
    return out;
  }

 private:
  // From columns `start` on of W: rows · W̃ᵀ, or rows · W̃ downwards.
  template <bool Forward>
  void mix(const Rows<T>& rows, const Weights<T>& w, int64_t start, Buffer<T>& packed, const Rows<T>& out, const Team& team) {
    const int64_t H = n_.H, across = n_.D * H;
    const Packed<T> p{packed.data(), H, H, kPanel<T>};
    pack(p, w.data + start, Forward ? 1 : across, Forward ? across : 1, team, square<Forward>(w, start));
    team.wait();
    int64_t first, last;
    team.share(n_.T_, first, last);
    multiply_packed(rows[first], ld_, p, out[first], ld_, last - first);
    for (int64_t t = first; t < last; ++t) {
      // A row of zeros must not bring its exponent along: it would push aside what it drives.
      const bool zero = std::all_of(out[t], out[t] + H, [](T v) { return v == T(0); });
      out.exponent[t] = zero ? kZeroExponent : rows.exponent[t] + w.exponent;
      std::fill(out[t] + H, out[t] + ld_, T(0));
    }
    team.wait();
  }

  // drive_t += row · 2^exponent, other(t) being the row with its exponent.
  template <typename F>
  void add(const Rows<T>& drive, const Team& team, const F& other) {
    int64_t first, last;
    team.share(n_.T_, first, last);
    for (int64_t t = first; t < last; ++t) {
      const auto [row, exponent] = other(t);
      finish_step(drive[t], drive.exponent[t], row, exponent, ld_, drive.exponent[t], drive.largest[t]);
    }
    team.wait();
  }
  // Rows of the opposite direction, whose time runs against the drive's.
  void add_flipped(const Rows<T>& drive, const Rows<T>& other, const Team& team) {
    add(drive, team, [&, last = n_.T_ - 1](int64_t t) { return std::pair<const T*, int64_t>(other[last - t], other.exponent[last - t]); });
  }

  // Of the direction's rows, and of those from the other one. Drives run with their chain's rows: h has T + 1 of them, its
  // row 0 undriven.
  Sequences<T> rows(int64_t n, bool needed) {
    return Sequences<T>(1, needed ? n : 0, ld_, memory_.take(needed ? n * ld_ : 0));
  }

  const Network<T>& n_;
  const Canonical<T>& canonical_;
  const Boundary<T>& boundary_;
  Sequences<T> &h_, &d_;
  const int64_t ld_ = padded<T>(n_.H);
  const bool mixes_ = n_.C > n_.D, other_ = mixes_ && n_.D > 1;
  Workspace<T, 7> memory_{ld_ * (mixes_ ? (other_ ? 4 : 2) * n_.T_ + 1 : 0)};
  Sequences<T> h_drive_ = rows(n_.T_ + 1, mixes_), d_drive_ = rows(n_.T_, mixes_);
  Sequences<T> h_other_ = rows(n_.T_, other_), d_other_ = rows(n_.T_, other_);
  std::vector<int64_t> top_exponent_;
  Buffer<T> mixed_h_, mixed_d_;
};

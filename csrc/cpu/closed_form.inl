// A chain in closed form, once its increments are a geometric sequence.

// The relative error that a closed form may have: that of one rounding, and in double more than the noise of its ratios.
template <typename T>
constexpr double kClosedError = std::is_same<T, float>::value ? 0x1p-24 : 0x1p-44;

// A chain that starts from nothing is a sum of increments, x_{s+1} = d_0 + … + d_s with d_{s+1} = W̃ d_s, or the last of
// them where only its first step is driven. If lo d_s ≤ d_{s+1} ≤ hi d_s, entry by entry, multiplying by W̃ ≥ 0 shows
// lo d_{s+m} ≤ d_{s+m+1} ≤ hi d_{s+m}: from the step on at which the two are close enough for all steps that are left,
// the increments are a geometric sequence and the chain has a closed form. In double, so that rounding does not keep the
// ratios apart.
template <typename T>
class Increments {
 public:
  // `memory`: three vectors of c.out.row doubles.
  Increments(const Chain<T>& c, int64_t steps, int64_t w_exponent, double* memory)
      : now(memory), next(now + c.out.row), c_(c), steps_(steps), w_exponent_(w_exponent), sum_(next + c.out.row) {
    const int64_t t = c.first, drive_exponent = c.drive.exponent[t * c.drive.exponent_step];
    sums_ = steps > 1 && c.drive.exponent[(t + c.stride) * c.drive.exponent_step] != kZeroExponent;
    drives_ = drive_exponent != kZeroExponent;
    failed_ = !drives_;
    const double s = std::ldexp(1.0, static_cast<int>(-kCentre<T>));
    for (int64_t k = 0; k < c.out.row; ++k) sum_[k] = now[k] = c.drive.data[k] * s;
    exponent_ = sum_exponent_ = drive_exponent + kCentre<T>;
    std::fill(next, next + c.out.row, 0.0);
  }

  bool open() const { return !failed_ && !certified_; }
  bool certified() const { return certified_; }
  int64_t step() const { return s_; }
  int64_t written() const { return drives_ ? s_ + 1 : 0; }
  // The step from which on increments are too small to be seen, as far as the last ones tell.
  int64_t converges_after() const {
    const double left = high_ < 1 && sums_ ? std::log(0x1p-25 / share_) / std::log(high_) : 0x1p40;
    return s_ + static_cast<int64_t>(std::max(left, 0.0));
  }

  // Takes W̃ · now from `next`: the increment of the next step.
  void advance() {
    double low = std::numeric_limits<double>::infinity(), high = 0, top = 0;
    for (int64_t k = 0; k < c_.out.row; ++k) {
      top = std::max(top, next[k]);
      if (now[k] > 0) {
        const double r = next[k] / now[k];
        low = std::min(low, r);
        high = std::max(high, r);
      } else if (next[k] > 0) {
        high = std::numeric_limits<double>::infinity();
      }
    }
    const int64_t m = top > 0 ? std::ilogb(top) : 0, sum_before = sum_exponent_, exponent = exponent_ + w_exponent_ + m;
    const int64_t sum_exponent = sums_ ? std::max(sum_exponent_, exponent) : exponent;
    const double a = sums_ ? power_of_two<double>(sum_before - sum_exponent) : 0.0;
    const double b = power_of_two<double>(exponent - sum_exponent);
    // Sums and increments too far apart for one scale are left to the chain itself, which watches them unit by unit.
    if (!(top > 0) || s_ + 4 >= steps_ || (sums_ && a == 0.0) || b == 0.0) {
      failed_ = true;
      return;
    }
    ++s_;
    exponent_ = exponent;
    sum_exponent_ = sum_exponent;
    const double scale = std::ldexp(1.0, static_cast<int>(-m));
    double share = 0;
    for (int64_t k = 0; k < c_.out.row; ++k) {
      next[k] *= scale;
      sum_[k] = a * sum_[k] + b * next[k];
      if (next[k] > 0) share = std::max(share, b * next[k] / sum_[k]);
    }
    std::swap(now, next);
    certify(low, high, share);
  }

  // Writes the row of step `step()`.
  void write() const {
    if (written() == 0) return;
    const int64_t t = c_.first + s_ * c_.stride;
    write(sum_, sum_exponent_, c_.out[t], c_.out.exponent[t]);
    c_.out.largest[t] = kCentre<T>;
  }

  // Gives the chain its closed form, from the step after `step()` on. That step's row must have been written.
  void close() {
    const int64_t t = c_.first + s_ * c_.stride, left = steps_ - 1 - s_;
    T* const increment = c_.out[t + c_.stride];  // a row that the closed form leaves unused
    int64_t increment_exponent;
    write(now, exponent_, increment, increment_exponent);
    Closed<T>& closed = *c_.out.closed_form;
    const int64_t begin = t + c_.stride, end = t + left * c_.stride;
    closed.first = std::min(begin, end);
    closed.last = std::max(begin, end) + 1;
    closed.count = 2;
    closed.basis[0] = c_.out[t];
    closed.basis[1] = increment;
    for (int i = 0; i < 2; ++i) closed.coefficients[i] = c_.coefficients[i];
    // x_{s+m} = x_s + (ρ + … + ρ^m) d_s, or ρ^m d_s: g · 2^ge, with ρ = ratio_ · 2^ratio_exponent_, 1 ≤ ratio_ < 2.
    double g = sums_ ? 0.0 : 1.0;
    int64_t ge = 0;
    for (int64_t m = 1; m <= left; ++m) {
      if (sums_) g += power_of_two<double>(-ge);
      g *= ratio_;
      ge += ratio_exponent_;
      if (g > 0x1p30 || g < 0x1p-30) {
        const int64_t shift = std::ilogb(g);
        g = std::ldexp(g, static_cast<int>(-shift));
        ge += shift;
      }
      const int64_t row = t + m * c_.stride, high = increment_exponent + ge + std::max(0, std::ilogb(g));
      const int64_t exponent = sums_ ? std::max(c_.out.exponent[t], high) : high;
      c_.coefficients[0][row] = sums_ ? power_of_two<T>(c_.out.exponent[t] - exponent) : T(0);
      c_.coefficients[1][row] = static_cast<T>(g * power_of_two<double>(increment_exponent + ge - exponent));
      c_.out.exponent[row] = exponent;
      c_.out.largest[row] = kCentre<T> + 2;  // a bound
    }
  }

  double* now;
  double* next;

 private:
  void certify(double low, double high, double share) {
    const double left = static_cast<double>(steps_ - s_), spread = high / low - 1;
    double error = left / 2 * spread;
    const double true_high = std::ldexp(high, static_cast<int>(w_exponent_));
    high_ = true_high;
    share_ = share;
    if (sums_ && true_high < 1) {
      // No more is to come than a geometric series, of which the ratio between the two is taken.
      const double true_low = std::ldexp(low, static_cast<int>(w_exponent_)), ratio = std::sqrt(true_low) * std::sqrt(true_high);
      const auto series = [](double r) { return r / (1 - r); };
      error = std::min(error, share * std::max(series(true_high) - series(ratio), series(ratio) - series(true_low)));
    }
    // Increments that die, low = 0, have no ratio.
    certified_ = low > 0 && error <= kClosedError<T>;
    if (certified_) {
      const double ratio = std::sqrt(low) * std::sqrt(high);
      const int m = std::ilogb(ratio);
      ratio_ = std::ldexp(ratio, -m);
      ratio_exponent_ = w_exponent_ + m;
    } else if (s_ % kPatience == 0) {
      failed_ = !(spread < spread_before_ / 2);
      spread_before_ = spread;
    }
  }

  void write(const double* v, int64_t exponent, T* out, int64_t& out_exponent) const {
    const int64_t shift = kCentre<T> - std::ilogb(*std::max_element(v, v + c_.out.row));
    const double s = std::ldexp(1.0, static_cast<int>(shift));
    for (int64_t k = 0; k < c_.out.row; ++k) out[k] = static_cast<T>(v[k] * s);
    out_exponent = exponent - shift;
  }

  static constexpr int64_t kPatience = 4;  // steps in which the spread of the ratios must halve

  const Chain<T>& c_;
  int64_t steps_, w_exponent_, s_ = 0;
  double* sum_;
  int64_t exponent_, sum_exponent_;
  bool drives_, sums_, failed_, certified_ = false;
  double spread_before_ = std::numeric_limits<double>::infinity();
  double ratio_ = 1, high_ = 1, share_ = 1;
  int64_t ratio_exponent_ = 0;
};

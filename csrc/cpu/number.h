// A number of any size, and powers of two.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace pathrnn {

// 2^exponent, the exponent brought into double's range.
inline double power(int64_t exponent) {
  const uint64_t bits = static_cast<uint64_t>(std::clamp<int64_t>(exponent, -1020, 1020) + 1023) << 52;
  double result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// mantissa · 2^exponent.
struct Number {
  double mantissa = 0;
  int64_t exponent = 0;

  static Number exp(double logarithm) {
    if (logarithm == -std::numeric_limits<double>::infinity()) return {};
    const double exponent = std::floor(logarithm / M_LN2);
    return {std::exp(logarithm - exponent * M_LN2), static_cast<int64_t>(exponent)};
  }
  double log() const { return std::log(mantissa) + static_cast<double>(exponent) * M_LN2; }
  Number root() const {
    const int64_t half = (exponent - (exponent & 1)) / 2;
    return {std::sqrt(exponent & 1 ? 2 * mantissa : mantissa), half};
  }
  // The mantissa in [1, 2), or 0, or not finite.
  Number normal() const {
    if (mantissa == 0 || !std::isfinite(mantissa)) return {mantissa, 0};
    const int own = std::ilogb(mantissa);
    return {std::ldexp(mantissa, -own), exponent + own};
  }
  Number operator+(const Number& o) const {
    if (o.mantissa == 0) return *this;
    if (mantissa == 0) return o;
    const Number a = normal(), b = o.normal();
    const int64_t most = std::max(a.exponent, b.exponent);
    return {a.mantissa * power(a.exponent - most) + b.mantissa * power(b.exponent - most), most};
  }
  Number operator*(const Number& o) const { return {mantissa * o.mantissa, exponent + o.exponent}; }
  Number operator/(const Number& o) const { return {mantissa / o.mantissa, exponent - o.exponent}; }
  // In two factors, so that what is multiplied with one after the other may be out of range in between.
  void split(double& before, double& after) const {
    before = power(exponent / 2);
    after = mantissa * power(exponent - exponent / 2);
  }
  double value() const { return mantissa * power(exponent / 2) * power(exponent - exponent / 2); }
  // Whether it is a number of a float's range, with room for another of that range beside it; so is 0.
  bool moderate(int64_t bits) const { return mantissa == 0 || std::abs(normal().exponent) <= bits; }
};

}  // namespace pathrnn

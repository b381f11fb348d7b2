// Path-SGD's step, eq. (8), and one that another optimiser has taken: measured, decided upon and applied.
#pragma once

#include <vector>

#include "path_step_weights.h"

namespace pathrnn::step {

template <typename T>
class Sgd {
 public:
  explicit Sgd(Weights<T>& weights)
      : weights_(weights), a_(weights.arguments), norm_(Number::exp(weights.kappa.log_path_norm)),
        rules_(weights.views.size()) {}

  int64_t run() {
    const bool no_path = norm_.mantissa == 0, given = a_.rule == "given";
    if (!given && no_path && (a_.scale == 1 || a_.radius > 0) && weights_.pulled()) return kNoPath;
    if (!std::isfinite(norm_.mantissa)) return kUnbounded;
    weights_.wide |= a_.eps > 0;
    Number scale{1, 0};
    double constant = std::numeric_limits<double>::quiet_NaN();
    if (a_.scale == 1 && !no_path) scale = norm_;
    if (a_.scale == 2) {
      constant = scalar(*a_.constant);
      if (std::isnan(constant)) {
        set_rules(scale);
        constant = first_constant();
        if (std::isnan(constant)) return kNoConstant;
      }
      if (std::isfinite(constant)) scale = Number::exp(constant);
    }
    set_rules(scale);
    const std::vector<Tile> tiles = weights_.tiles();
    const auto& kernel = kernels<T>();
    const bool wide = weights_.wide;
    const std::vector<StepSums> sums = weights_.measure(tiles, [&](const Tile& tile) {
      return kernel.sgd_measure[wide](weights_.views[tile.weight], rules_[tile.weight], tile.first, tile.last);
    });
    if (const int64_t status = weights_.refused(sums); status != kDone) return status;
    if (a_.radius > 0 && !no_path && !shorten(sums)) return kNarrow;
    weights_.over(tiles, [&](int64_t, const Tile& tile) {
      kernel.sgd_apply[wide](weights_.views[tile.weight], rules_[tile.weight], tile.first, tile.last);
    });
    if (a_.scale == 2 && std::isfinite(constant)) *a_.constant->mutable_data_ptr<double>() = constant;
    return kDone;
  }

 private:
  void set_rules(const Number& scale) {
    for (int64_t v = 0; v < weights_.count(); ++v) rules_[v] = rule_of(v, scale);
  }

  // Of the v-th weight; notes where it needs float64.
  SgdRule rule_of(int64_t v, const Number& scale) {
    const StepWeight<T>& w = weights_.views[v];
    SgdRule rule{};
    rule.bounded = a_.radius > 0;
    rule.more = 1;
    if (a_.rule == "given") {
      rule.given = true;
      rule.rate = -1;
      rule.factor = 1;
      return rule;
    }
    const double* const n = weights_.numbers(v);
    Number divisor{1, w.exponent};
    rule.kappa_share = {1, 0};
    if (a_.eps > 0 && norm_.mantissa > 0) {
      const Number share = norm_ * Number{a_.eps, 0};
      divisor.exponent = std::max(divisor.exponent, share.exponent);
      rule.kappa_share.exponent = w.exponent - divisor.exponent;
      rule.damping = {share.mantissa, share.exponent - divisor.exponent};
    }
    const double unscaled = weights_.unscaled();
    Number& quotient = rule.quotient;
    quotient = (scale * Number{n[4] != 0 ? -unscaled : unscaled, 0} / divisor).normal();
    // In one factor where it can do no harm: nothing leaves the range in between that comes back.
    if (std::abs(quotient.exponent) <= kModerate) {
      rule.before = power(std::max<int64_t>(quotient.exponent, 0));
      rule.after = quotient.mantissa * power(std::min<int64_t>(quotient.exponent, 0));
    } else {
      quotient.split(rule.before, rule.after);
    }
    rule.rate = weights_.rate(v);
    // A float would not hold it beside a gradient: 0 times infinity is no step of 0.
    weights_.wide |= !quotient.moderate(kModerate) || !Number{rule.rate, 0}.moderate(kModerate);
    const bool far = !quotient.moderate(kFar) || rule.kappa_share.exponent < -kFar || rule.damping.exponent < -kFar;
    weights_.take_far(v, far, &rule);
    rule.momentum = n[1];
    rule.decay = n[2];
    rule.nesterov = n[3] != 0;
    rule.limit = weights_.limit;
    rule.factor = -rule.rate;
    return rule;
  }

  // To the trust radius. False where a float does not hold the factor.
  bool shorten(const std::vector<StepSums>& sums) {
    Number square;
    for (int64_t v = 0; v < weights_.count(); ++v) {
      square = square + sums[v].square * Number{1, weights_.views[v].exponent};
    }
    const Number length = (square / norm_).normal().root() / Number{a_.radius, 0};
    // nan, from a gradient that is not finite, compares false: torch's own optimisers let it through too.
    if (!(std::isfinite(length.mantissa) && length.value() > 1)) return true;
    for (SgdRule& rule : rules_) {
      const Number factor = (Number{rule.factor, 0}.normal() / length).normal();
      if (weights_.narrow() && !factor.moderate(kModerate)) return false;
      rule.shortened = true;
      if (factor.moderate(kFar)) rule.factor = factor.value();
      else factor.split(rule.factor, rule.more);
    }
    return true;
  }

  // log(‖g‖ / ‖g/κ‖); infinity where either is 0, for then no step is taken that could fix it; nan where it is none.
  double first_constant() const {
    Number raw, divided;
    for (int64_t v = 0; v < weights_.count(); ++v) {
      kernels<T>().add_raw_and_divided(weights_.views[v], rules_[v], raw, divided);
    }
    const Number share = Number{weights_.unscaled(), 0}.normal();  // the quotient is of unscaled gradients
    raw = raw * share * share;
    if (raw.mantissa == 0 || divided.mantissa == 0) return std::numeric_limits<double>::infinity();
    const bool finite = std::isfinite(raw.mantissa) && std::isfinite(divided.mantissa);
    return finite ? (raw.log() - divided.log()) / 2 : std::numeric_limits<double>::quiet_NaN();
  }

  Weights<T>& weights_;
  const Arguments& a_;
  const Number norm_;  // γ²
  std::vector<SgdRule> rules_;
};

}  // namespace pathrnn::step

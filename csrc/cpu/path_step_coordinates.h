// Adam in path coordinates p sqrt(κ)/γ (PathAdam, GatedPathSGD, PathSOAP), and the output's bias beside them.
#pragma once

#include <vector>

#include "path_step_bases.h"

namespace pathrnn::step {

template <typename T>
class Coordinates {
 public:
  explicit Coordinates(Weights<T>& weights)
      : weights_(weights), a_(weights.arguments), bases_(weights), rules_(weights.views.size()),
        turned_(weights.views.size()), near_(weights.views.size(), true) {
    for (int64_t v = 0; v < weights.count(); ++v) {
      if (weights.moving[v] == a_.chains.head_bias_at()) bias_ = v;
      else inner_.push_back(v);
    }
  }

  int64_t run() {
    for (const int64_t v : inner_) {
      TORCH_CHECK_VALUE(weights_.views[v].first && weights_.views[v].second, "weight ", weights_.moving[v],
                        " has no averages; give first and second of its shape");
    }
    const Number norm = path_norm();
    if (norm.mantissa == 0) return weights_.pulled() ? kNoPath : kDone;
    if (!std::isfinite(norm.mantissa)) return kUnbounded;
    for (const int64_t v : inner_) weights_.take_far(v, !longest_of(v, norm).moderate(kFar), nullptr);
    const std::vector<Tile> tiles = weights_.tiles(bias_);
    const std::vector<StepSums> sums = weights_.measure(tiles, [&](const Tile& tile) {
      return kernels<T>().coordinate_measure[weights_.wide](weights_.views[tile.weight], tile.first, tile.last);
    });
    // A gradient that is not finite leaves the step out, whatever else of it is.
    const int64_t status = weights_.refused(sums);
    if (status % 4 == kUnreached % 4 || (status != kDone && weights_.all_finite())) return status;
    const Number length = length_of(sums);
    if (length.mantissa == 0 && weights_.narrow() && underflowed(sums)) return kNarrow;
    const bool moves = !held() && length.mantissa > 0 && std::isfinite(length.mantissa);
    if (moves && !set_rules(norm, length, sums)) return kNarrow;
    for (const int64_t v : inner_) {
      if (moves && bases_.has(v)) turned_[v] = bases_.step(v, rules_[v]);
    }
    for (const Tile& tile : tiles) {
      if (!near_[tile.weight] && apply(tile, false)) return weights_.lost(tile.weight);
    }
    if (bias_ >= 0) move_bias();
    if (!moves) return kDone;
    for (const int64_t v : inner_) ++weights_.steps(v);
    weights_.over(tiles, [&](int64_t, const Tile& tile) { apply(tile, true); });
    for (const int64_t v : inner_) {
      if (turned_[v].step.defined()) bases_.keep(v, turned_[v]);
    }
    return kDone;
  }

 private:
  // γ²; with a head's bias that of the paths through the RNN: all that end with a weight of the head.
  Number path_norm() {
    const int64_t bias_at = a_.chains.head_bias_at();
    if (bias_at < 0) return Number::exp(weights_.kappa.log_path_norm);
    const StepWeight<T> head = weights_.view(bias_at - 1, false);
    return kernels<T>().path_mass(head) * Number{1, head.exponent};
  }

  // ‖g/sqrt(κ)‖.
  Number length_of(const std::vector<StepSums>& sums) const {
    Number square;
    for (const int64_t v : inner_) square = square + sums[v].square * Number{1, -weights_.views[v].exponent};
    return square.normal().root();
  }
  // Each g/sqrt(κ) may have where a gradient is no zero.
  bool underflowed(const std::vector<StepSums>& sums) const {
    return std::any_of(inner_.begin(), inner_.end(), [&](int64_t v) { return sums[v].pulled && sums[v].paths; });
  }

  // Whether this step is one of those in which the output's bias moves alone.
  bool held() const {
    int64_t hold = 0;
    for (const int64_t v : inner_) hold = std::max(hold, static_cast<int64_t>(weights_.numbers(v)[5]));
    return bias_ >= 0 && weights_.steps(bias_) + 1 <= hold;
  }

  // False where a float does not hold one.
  bool set_rules(const Number& norm, const Number& length, const std::vector<StepSums>& sums) {
    for (const int64_t v : inner_) {
      CoordinateRule& rule = rules_[v];
      if (!set_rule(v, norm, length, rule)) return false;
      // What is added to the largest number that there is must be some 2^26 times smaller than it to be lost in
      // rounding. An entry of a step that was turned may be as long as all of it.
      const double longest = bases_.has(v) ? std::sqrt(static_cast<double>(weights_.views[v].size)) : 1;
      const double most = std::abs(rule.rate) * longest * sums[v].largest_unit * power(2 * weights_.spread());
      near_[v] = std::abs(rule.keep) <= 1 && most <= weights_.limit * 0x1p-26;
    }
    return true;
  }
  // Of κ's scale: 1/sqrt(κ) = root / sqrt(kappa).
  Number root_of(int64_t v) const { return Number{1, -weights_.views[v].exponent}.root(); }
  // Of the rate, while it rises.
  double share_of(int64_t v) const {
    return std::min(1.0, (weights_.steps(v) + 1.0) / std::max(weights_.numbers(v)[6], 1.0));
  }
  // The length of a step in path coordinates, times κ's scale.
  Number longest_of(int64_t v, const Number& norm) const {
    const double size = static_cast<double>(weights_.views[v].size);
    return (norm.root() * root_of(v) * Number{weights_.rate(v) * share_of(v) / std::sqrt(size), 0}).normal();
  }
  bool set_rule(int64_t v, const Number& norm, const Number& length, CoordinateRule& rule) const {
    const double* const n = weights_.numbers(v);
    const double steps = weights_.steps(v) + 1, rate = weights_.rate(v);
    rule.quotient = (root_of(v) / length).normal();
    if (n[7] != 0) rule.quotient.mantissa = -rule.quotient.mantissa;
    rule.quotient.split(rule.before, rule.after);
    rule.beta1 = n[1];
    rule.beta2 = n[2];
    rule.correction = 1 / (1 - std::pow(n[2], steps));
    rule.power = n[3];
    rule.eps = n[4];
    const double share = share_of(v);
    rule.longest = longest_of(v, norm);
    rule.rate = rule.longest.value();
    rule.keep = 1 - rate * share * n[8];
    rule.limit = weights_.limit;
    return !weights_.narrow() || (rule.quotient.moderate(2 * kModerate) && rule.longest.moderate(kModerate));
  }

  bool apply(const Tile& tile, bool write) const {
    const StepWeight<T>& w = weights_.views[tile.weight];
    const CoordinateRule& rule = rules_[tile.weight];
    const Tensor& step = turned_[tile.weight].step;
    const auto& kernel = kernels<T>();
    if (!step.defined()) return kernel.coordinate_apply[weights_.wide](w, rule, tile.first, tile.last, write);
    return kernel.coordinate_move[weights_.wide](w, rule, tile.first, tile.last, step.const_data_ptr(), write);
  }

  // The output's bias by eq. (8) as it stands, no entry of g/κ counting for more than 1.
  void move_bias() {
    const StepWeight<T>& w = weights_.views[bias_];
    const double kappa = Number{static_cast<double>(*w.kappa), w.exponent}.value();
    const double step = weights_.rate(bias_), scale = weights_.unscaled();
    std::vector<double> quotient(w.size);
    bool finite = true;
    for (int64_t i = 0; i < w.size; ++i) {
      quotient[i] = static_cast<double>(w.gradient[i]) * scale / kappa;
      finite &= std::isfinite(quotient[i]);
    }
    const double sign = weights_.numbers(bias_)[7] != 0 ? -1 : 1;
    for (int64_t i = 0; finite && i < w.size; ++i) {
      const double bounded = sign * std::clamp(quotient[i], -1.0, 1.0);
      w.moved[i] = static_cast<T>(static_cast<double>(w.weight[i]) - step * bounded);
    }
    ++weights_.steps(bias_);
  }

  Weights<T>& weights_;
  const Arguments& a_;
  const Eigenbases<T> bases_;
  int64_t bias_ = -1;           // the output's
  std::vector<int64_t> inner_;  // all but that
  std::vector<CoordinateRule> rules_;
  std::vector<EigenStep> turned_;
  std::vector<bool> near_;  // a step beyond the limit is out of the question
};

}  // namespace pathrnn::step

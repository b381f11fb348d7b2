// PathSOAP: of a matrix, a step in the eigenbases of its gradient's second moments, before anything is written.
#pragma once

#include <vector>

#include "path_step_weights.h"

namespace pathrnn::step {

// Of either side of every weight that moves PathSOAP keeps an average of g gᵀ, or of gᵀ g, and an orthogonal matrix;
// both are empty where a side has none.
constexpr int64_t kSides = 2, kPerSide = 2;
// Of an average's trace: beyond what float32 holds of a small eigenvalue beside the largest.
constexpr double kNoise = 1e-6;

struct EigenStep {
  Tensor gradient, first, second, step;  // g̃/‖g̃‖; averages, in the bases; the step, back from them
  Tensor grams[kSides], bases[kSides];   // what they become, if they do
};

template <typename T>
class Eigenbases {
 public:
  explicit Eigenbases(const Weights<T>& weights) : weights_(weights), bases_(weights.arguments.bases) {
    if (weights.arguments.rule == "eigenbases") check();
  }

  // Whether the v-th weight has any.
  bool has(int64_t v) const { return has_basis(v, 0) || has_basis(v, 1); }

  EigenStep step(int64_t v, const CoordinateRule& rule) const {
    const Tensor& own = weights_.own(v);
    const StepWeight<T>& w = weights_.views[v];
    const bool wide = weights_.wide;
    const auto options = own.options().dtype(wide ? at::kDouble : own.scalar_type());
    EigenStep e;
    e.gradient = at::empty(own.sizes(), options);
    weights_.over(weights_.tiles_of(v), [&](int64_t, const Tile& tile) {
      kernels<T>().coordinate_gradient[wide](w, rule, tile.first, tile.last, e.gradient.mutable_data_ptr());
    });
    e.first = as_tensor(v, w.first).to(options, false, true);
    e.second = as_tensor(v, w.second).to(options, false, true);
    // Into memory of its own: where only a view would be turned, the gradient is still needed.
    e.step = turn(v, e.gradient, false).contiguous();
    kernels<T>().coordinate_average[wide](rule, own.numel(), e.step.mutable_data_ptr(), e.first.mutable_data_ptr(),
                                          e.second.mutable_data_ptr());
    e.step = turn(v, e.step, true).contiguous();
    for (int64_t side = 0; side < kSides; ++side) {
      if (has_basis(v, side)) advance(v, side, e);
    }
    return e;
  }

  void keep(int64_t v, const EigenStep& e) const {
    for (int64_t side = 0; side < kSides; ++side) {
      if (e.grams[side].defined()) gram(v, side).copy_(e.grams[side]);
      if (e.bases[side].defined()) basis(v, side).copy_(e.bases[side]);
    }
    as_tensor(v, weights_.views[v].first).copy_(e.first);
    as_tensor(v, weights_.views[v].second).copy_(e.second);
  }

 private:
  const Tensor& gram(int64_t v, int64_t side) const { return bases_[(v * kSides + side) * kPerSide]; }
  const Tensor& basis(int64_t v, int64_t side) const { return bases_[(v * kSides + side) * kPerSide + 1]; }
  bool has_basis(int64_t v, int64_t side) const { return !bases_.empty() && basis(v, side).numel() > 0; }
  // State of the v-th weight.
  Tensor as_tensor(int64_t v, T* state) const {
    return at::from_blob(state, weights_.own(v).sizes(), weights_.own(v).options());
  }

  void check() const {
    TORCH_CHECK_VALUE(static_cast<int64_t>(bases_.size()) == weights_.count() * kSides * kPerSide, "there are ",
                      bases_.size(), " tensors of bases for ", weights_.count(), " gradients; give four for each");
    for (int64_t v = 0; v < weights_.count(); ++v) {
      const Tensor& own = weights_.own(v);
      for (int64_t side = 0; side < kSides; ++side) {
        if (gram(v, side).numel() == 0 && basis(v, side).numel() == 0) continue;
        TORCH_CHECK_VALUE(own.dim() == 2, "weight ", weights_.moving[v], " has bases, but is no matrix");
        for (const Tensor* t : {&gram(v, side), &basis(v, side)}) {
          check_shape(*t, "bases", {own.size(side), own.size(side)});
          check_like(*t, "bases", own, "weights");
        }
      }
    }
  }

  // The average of a side after the step and, where the bases are to turn, its basis, with Adam's averages in it.
  void advance(int64_t v, int64_t side, EigenStep& e) const {
    // Where there has never been a gradient there is nothing but rounding of the bases.
    const Tensor seen = gram(v, side).diagonal().ne(0).logical_or_(e.gradient.ne(0).any(1 - side));
    e.step.masked_fill_(seen.logical_not().unsqueeze(1 - side), 0);
    const double beta = weights_.numbers(v)[9], frequency = weights_.numbers(v)[10], steps = weights_.steps(v) + 1;
    const Tensor rows = side == 0 ? e.gradient : e.gradient.t();
    e.grams[side] = gram(v, side).mul(beta).add_(at::mm(rows, rows.t()).mul_(1 - beta));
    if (std::fmod(steps, frequency) != 0) return;
    const Tensor average = e.grams[side].to(at::kDouble), q = basis(v, side).to(at::kDouble);
    // The shift moves no eigenvector, and keeps columns where they were for which the average has nothing but rounding;
    // nor are these to be sorted by it.
    const Tensor shift = kNoise * average.trace(), product = at::mm(average, q).add_(q * shift);
    const Tensor values = (q * product).sum(0).clamp_min_(2 * shift);
    const Tensor order = values.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
    const Tensor now = e.bases[side] = std::get<0>(at::linalg_qr(product.index_select(1, order)));
    const Tensor m = e.first.to(at::kDouble);
    e.first = side == 0 ? at::mm(now.t(), at::mm(q, m)) : at::mm(at::mm(m, q.t()), now);
    e.second = e.second.index_select(side, order);
  }

  // Qᵀ x P, or Q x Pᵀ.
  Tensor turn(int64_t v, Tensor x, bool back) const {
    if (has_basis(v, 0)) {
      const Tensor q = basis(v, 0).to(x.scalar_type());
      x = at::mm(back ? q : q.t(), x);
    }
    if (has_basis(v, 1)) {
      const Tensor p = basis(v, 1).to(x.scalar_type());
      x = at::mm(x, back ? p.t() : p);
    }
    return x;
  }

  const Weights<T>& weights_;
  const TensorList bases_;
};

}  // namespace pathrnn::step

// path_update_ and path_step_: a step of Path-SGD, or of Adam in path coordinates, from κ to the weights, and from
// nothing; path_norm_gradients.
#include <torch/library.h>

#include <algorithm>

#include "path_step_coordinates.h"
#include "path_step_sgd.h"

namespace pathrnn {
namespace step {
namespace {

// GradScaler's word that a gradient is not finite.
bool skipped(const Arguments& a) {
  if (!a.found_inf) return false;
  check_scalar(*a.found_inf, "found_inf");
  return scalar(*a.found_inf) != 0;
}

template <typename T>
int64_t take(Weights<T>&& weights) {
  const int64_t status = weights.arguments.in_coordinates() ? Coordinates<T>(weights).run() : Sgd<T>(weights).run();
  if (status == kDone) weights.commit();
  return status;
}

// Of bfloat16 and float16: taken in float32 and rounded once.
int64_t take_half(const Arguments& a, const Kappa& kappa) {
  std::vector<Tensor> weights, first;
  for (const Tensor& t : a.weights) weights.push_back(t.to(at::kFloat));
  for (const Tensor& t : a.first) first.push_back(t.to(at::kFloat));
  Arguments wide = a;
  for (optional<Tensor>& g : wide.gradients) {
    if (g) g = g->to(at::kFloat);
  }
  wide.weights = weights;
  wide.first = first;
  const double limit = a.weights[0].scalar_type() == at::kHalf ? 65504.0 : 0x1.fep127;
  const int64_t status = take(Weights<float>(wide, kappa, limit));
  if (status != kDone) return status;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (wide.gradients[i]) a.weights[i].copy_(weights[i]);
  }
  for (size_t s = 0; s < first.size(); ++s) a.first[s].copy_(first[s]);
  return kDone;
}

int64_t take(const Arguments& a, const Kappa& kappa) {
  const at::NoGradGuard no_grad;
  // Products of matrices among what follows.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_options(a);
  if (skipped(a)) return kDone;
  check_written(a);
  const at::ScalarType dtype = a.weights[0].scalar_type();
  if (at::isReducedFloatingType(dtype)) return take_half(a, kappa);
  return AT_DISPATCH_FLOATING_TYPES(dtype, "path_update_", [&] { return take(Weights<scalar_t>(a, kappa)); });
}

// The status of `attempt`, in the narrowest arithmetic that takes the step.
template <typename F>
int64_t in_some_arithmetic(const F& attempt) {
  int64_t status = attempt(kNative);
  if (status == kNarrow) status = attempt(kDouble);
  if (status >= kLost && status % 4 == kLost % 4) status = attempt(kByEntries);
  return status;
}

// ∂γ²/∂p of every weight, eq. (8): 2 p κ⁽¹⁾, times `scale`.
template <typename T>
std::vector<Tensor> norm_gradients(const Arguments& a, const Kappa& kappa, const Number& scale) {
  Weights<T> weights(a, kappa);
  std::vector<Tensor> result;
  std::vector<T*> out;
  for (int64_t i = 0; i < a.chains.weights(); ++i) {
    weights.views.push_back(weights.view(i, false));
    result.push_back(at::empty(a.weights[i].sizes(), a.weights[i].options()));
    out.push_back(result.back().template mutable_data_ptr<T>());
  }
  weights.over(weights.tiles(), [&](int64_t, const Tile& tile) {
    kernels<T>().norm_gradient(weights.views[tile.weight], scale, tile.first, tile.last, out[tile.weight] + tile.first);
  });
  return result;
}

int64_t path_update(TensorList weights, const std::vector<optional<Tensor>>& gradients, TensorList first,
                    TensorList second, TensorList counts, const optional<Tensor>& constant, TensorList rates,
                    at::ArrayRef<double> numbers, c10::string_view rule, int64_t chains, bool bidirectional, bool bias,
                    bool head, bool head_bias, bool embedding, int64_t scale, double eps, double radius,
                    const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf, TensorList kappas,
                    const Tensor& exponents, const Tensor& unit_exponents, TensorList entry_exponents,
                    const Tensor& log_path_norm) {
  Arguments a{weights, gradients, first, second, counts, constant, rates, numbers, rule,
              {chains, bidirectional, bias, head, head_bias, embedding}, scale, eps, radius, grad_scale, found_inf};
  check_scalar(log_path_norm, "log_path_norm");
  Kappa kappa = checked(a, kappas, exponents, unit_exponents, entry_exponents);
  kappa.log_path_norm = scalar(log_path_norm);
  return in_some_arithmetic([&](Arithmetic arithmetic) {
    kappa.arithmetic = arithmetic;
    return take(a, kappa);
  });
}

std::vector<Tensor> path_norm_gradients(TensorList weights, int64_t chains, bool bidirectional, bool bias, bool head,
                                        bool head_bias, bool embedding, const Tensor& grad, bool logarithm,
                                        TensorList kappas, const Tensor& exponents, const Tensor& unit_exponents,
                                        TensorList entry_exponents, const Tensor& log_path_norm) {
  const Arguments a{weights, std::vector<optional<Tensor>>(weights.size()), {}, {}, {}, {}, {}, {}, "",
                    {chains, bidirectional, bias, head, head_bias, embedding}, 0, 0, 0, {}, {}};
  const Kappa kappa = checked(a, kappas, exponents, unit_exponents, entry_exponents);
  check_scalar(grad, "grad");
  check_scalar(log_path_norm, "log_path_norm");
  Number scale{scalar(grad), 0};
  if (logarithm) scale = scale / Number::exp(scalar(log_path_norm));
  return AT_DISPATCH_FLOATING_TYPES(weights[0].scalar_type(), "path_norm_gradients",
                                    [&] { return norm_gradients<scalar_t>(a, kappa, scale); });
}

// A step with the pass for κ before it.
int64_t run(const Arguments& a, int64_t seq_len, bool last_only, bool ones_h0, double second_factor, double rtol,
            int64_t workspace_bytes, const optional<Tensor>& lags) {
  const at::NoGradGuard no_grad;
  if (skipped(a)) return kDone;
  std::vector<int64_t> first_lags;
  if (lags) {
    TORCH_CHECK_VALUE(lags->scalar_type() == at::kLong && lags->numel() == a.chains.count && lags->is_contiguous(),
                      "lags has shape ", lags->sizes(), "; it must be int64 [chains]");
    const int64_t* const former = lags->const_data_ptr<int64_t>();
    // One less than the last κ needed, so that the number can shrink again.
    for (int64_t c = 0; c < a.chains.count; ++c) first_lags.push_back(std::max<int64_t>(former[c] - 1, 0));
  }
  const int64_t hidden = a.weights[1].size(0);
  const bool by_team = path_chain_threads(a.chains.count, seq_len, hidden, second_factor > 0, 0) > 1;
  std::vector<int64_t> counted;
  // An attempt may write over κ.
  const int64_t status = in_some_arithmetic([&](Arithmetic arithmetic) {
    const PathChainPass k = path_chain_pass(a.weights, a.chains, seq_len, last_only, ones_h0, second_factor, rtol,
                                            first_lags, workspace_bytes);
    counted = k.lags;
    return take(a, {k.kappa, k.exponents.data(), k.unit_exponents.data(), hidden, k.entry_exponents,
                    k.log_path_norm, true, arithmetic, by_team});
  });
  if (status == kDone && lags) {
    // Where all lags were summed there is nothing to start from.
    std::transform(counted.begin(), counted.end(), lags->mutable_data_ptr<int64_t>(),
                   [&](int64_t count) { return count < seq_len - 1 ? count : 0; });
  }
  return status;
}

int64_t path_step(TensorList weights, const std::vector<optional<Tensor>>& gradients, TensorList first,
                  TensorList second, TensorList counts, const optional<Tensor>& constant, TensorList rates,
                  at::ArrayRef<double> numbers, c10::string_view rule, int64_t chains, bool bidirectional,
                  bool bias, bool head, bool head_bias, bool embedding, int64_t scale, double eps, double radius,
                  const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf, int64_t seq_len,
                  bool last_only, bool ones_h0, double second_factor, double rtol, int64_t workspace_bytes,
                  const optional<Tensor>& lags, TensorList bases) {
  const Arguments a{weights, gradients, first, second, counts, constant, rates, numbers, rule,
                    {chains, bidirectional, bias, head, head_bias, embedding},
                    scale, eps, radius, grad_scale, found_inf, bases};
  check_count(a);
  return run(a, seq_len, last_only, ones_h0, second_factor, rtol, workspace_bytes, lags);
}

}  // namespace
}  // namespace step

using at::Tensor;
using at::TensorList;
using std::optional;

optional<int64_t> path_step_at_once(
    const std::vector<Tensor>& weights, const std::vector<int64_t>& places, const std::vector<int64_t>& foreign,
    const std::vector<int64_t>& owners, const std::vector<Tensor>& first, const std::vector<Tensor>& second,
    const std::vector<Tensor>& counts, const std::vector<Tensor>& bases, const std::string& rule, const Chains& chains,
    const std::vector<std::vector<double>>& numbers, const optional<Tensor>& constant, int64_t scale, double eps,
    double radius, const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf, int64_t seq_len,
    bool last_only, bool ones_h0, double second_factor, double rtol, const optional<Tensor>& lags) {
  std::vector<optional<Tensor>> gradients(weights.size());
  size_t found = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (std::find(foreign.begin(), foreign.end(), i) != foreign.end()) continue;
    if (!weights[i].requires_grad() || !weights[i].grad().defined()) continue;
    if (found == places.size() || places[found] != static_cast<int64_t>(i)) return std::nullopt;
    gradients[i] = weights[i].grad();
    ++found;
  }
  if (found < places.size()) return std::nullopt;
  std::vector<double> all;
  for (const int64_t group : owners) all.insert(all.end(), numbers.at(group).begin(), numbers.at(group).end());
  const step::Arguments a{weights, std::move(gradients), first, second, counts, constant, {}, all, rule,
                          chains, scale, eps, radius, grad_scale, found_inf, bases};
  return step::run(a, seq_len, last_only, ones_h0, second_factor, rtol, -1, lags);
}

TORCH_LIBRARY_IMPL(pathrnn, CPU, m) {
  m.impl("path_norm_gradients", &step::path_norm_gradients);
  m.impl("path_update_", &step::path_update);
  m.impl("path_step_", &step::path_step);
}
// The kernel sees to views that are negative.
TORCH_LIBRARY_IMPL(pathrnn, Negative, m) {
  m.impl("path_update_", torch::CppFunction::makeFallthrough());
  m.impl("path_step_", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(pathrnn, Autograd, m) {
  m.impl("path_norm_gradients", torch::CppFunction::makeFallthrough());
  m.impl("path_update_", torch::CppFunction::makeFallthrough());
  m.impl("path_step_", torch::CppFunction::makeFallthrough());
}

}  // namespace pathrnn

// path_update on the CPU: eq. (8)'s quotient, the trust radius and the gradient of the path norm, over many tensors.
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>

#include "../check.h"
#include "isa.h"

namespace pathrnn {
namespace {

using at::Tensor;
using at::TensorList;

// Entries that a thread takes at least, and that one partial sum covers whatever the number of threads.
constexpr int64_t kShare = 1 << 15;

// Multiplications an entry; more than any scale of the dtype's takes apart.
constexpr int64_t kMostPower = 64;

template <typename T>
PathUpdate<T> make_update(const Tensor& in, const Tensor& kappa_) {
  // κ itself may be laid out in any way: only its broadcast to `in` matters.
  const Tensor kappa = kappa_.expand_as(in);
  PathUpdate<T> p{};
  p.in = in.const_data_ptr<T>();
  p.kappa = kappa.const_data_ptr<T>();
  p.columns = std::max<int64_t>(1, in.numel());
  p.column_stride = 1;
  if (kappa.is_contiguous()) return p;
  p.columns = in.size(-1);
  p.column_stride = in.size(-1) == 1 ? 0 : kappa.stride(-1);
  p.row_stride = in.dim() == 2 ? kappa.stride(0) : 0;
  return p;
}

// κ as make_update reads it: dense, or broadcast along rows or columns.
std::vector<Tensor> readable(TensorList kappas, TensorList tensors, const char* name) {
  TORCH_CHECK_VALUE(kappas.size() == tensors.size(), "there are ", kappas.size(), " kappas for ", tensors.size(), " ",
                    name);
  std::vector<Tensor> result;
  double copies = 0;  // of each tensor: its result, or one that is dense
  for (const Tensor& t : tensors) copies += static_cast<double>(t.numel()) * t.element_size();
  check_memory(copies, "the update");
  for (size_t i = 0; i < kappas.size(); ++i) {
    check_floating(tensors[i], name);
    check_like(tensors[i], name, tensors[0], name);
    check_like(kappas[i], "kappa", tensors[i], name);
    TORCH_CHECK_VALUE(at::is_expandable_to(kappas[i].sizes(), tensors[i].sizes()), "kappa has shape ",
                      kappas[i].sizes(), ", which does not broadcast to that of its tensor, ", tensors[i].sizes());
    TORCH_CHECK_VALUE(tensors[i].dim() <= 2, name, " has shape ", tensors[i].sizes(),
                      "; it must have two dimensions at most");
    result.push_back(kappas[i].contiguous());
  }
  return result;
}

std::tuple<std::vector<Tensor>, Tensor> precondition_tensors(TensorList gradients, TensorList kappas_,
                                                             at::ArrayRef<double> scales, int64_t power) {
  const std::vector<Tensor> kappas = readable(kappas_, gradients, "gradients");
  TORCH_CHECK_VALUE(power >= 0 && power <= kMostPower, "power is ", power, "; it must be between 0 and ", kMostPower);
  TORCH_CHECK_VALUE(scales.size() == gradients.size(), "there are ", scales.size(), " scales for ", gradients.size(),
                    " gradients");
  std::vector<Tensor> results;
  Tensor overflowed = at::zeros({static_cast<int64_t>(gradients.size())}, at::kInt);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor g = gradients[i].contiguous();
    results.push_back(at::empty(g.sizes(), g.options()));
    AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "precondition", [&] {
      PathUpdate<scalar_t> p = make_update<scalar_t>(g, kappas[i]);
      p.out = results[i].mutable_data_ptr<scalar_t>();
      p.scale = static_cast<scalar_t>(scales[i]);
      p.multiply_first = power / 2;
      p.multiply_after = power - power / 2;
      std::atomic<bool> lost{false};
      at::parallel_for(0, g.numel(), kShare, [&](int64_t first, int64_t last) {
        if (kernels<scalar_t>().precondition(p, first, last)) lost = true;
      });
      overflowed.mutable_data_ptr<int>()[i] = lost;
    });
  }
  return {std::move(results), overflowed};
}

void shorten(TensorList parameters, TensorList before_, TensorList kappas_, at::ArrayRef<double> log_scales) {
  const std::vector<Tensor> kappas = readable(kappas_, parameters, "parameters");
  TORCH_CHECK_VALUE(before_.size() == parameters.size() && log_scales.size() == parameters.size(), "there are ",
                    before_.size(), " tensors before and ", log_scales.size(), " log_scales for ", parameters.size(),
                    " parameters");
  std::vector<Tensor> before;
  std::vector<double> logs;
  for (size_t i = 0; i < parameters.size(); ++i) {
    // Now, as the steps of those before it are not taken back.
    at::assert_no_internal_overlap(parameters[i]);
    TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && parameters[i].requires_grad()),
                      "parameters require a gradient and are written to: call shorten_ under torch.no_grad()");
    check_shape(before_[i], "before", parameters[i].sizes());
    check_like(before_[i], "before", parameters[i], "parameters");
    before.push_back(before_[i].contiguous());
    const Tensor after = parameters[i].contiguous();
    AT_DISPATCH_FLOATING_TYPES(after.scalar_type(), "shorten_", [&] {
      PathUpdate<scalar_t> p = make_update<scalar_t>(after, kappas[i]);
      p.before = before[i].const_data_ptr<scalar_t>();
      const int64_t n = after.numel(), shares = (n + kShare - 1) / kShare;
      std::vector<double> sums(shares);
      at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s) {
          sums[s] = kernels<scalar_t>().step_length(p, s * kShare, std::min(n, (s + 1) * kShare));
        }
      });
      double total = 0;
      for (const double sum : sums) total += sum;
      if (total != 0) logs.push_back(std::log(total) + log_scales[i]);
    });
  }
  double largest = -std::numeric_limits<double>::infinity(), total = 0;
  for (const double log : logs) largest = std::max(largest, log);
  for (const double log : logs) total += std::exp(log - largest);
  const double log_length = (largest + std::log(total)) / 2;
  // nan, from a gradient that is not finite, compares false: torch's own optimisers let it through too.
  if (!(log_length > 0) || std::isinf(log_length)) return;
  const double factor = std::exp(-log_length);
  for (size_t i = 0; i < parameters.size(); ++i) parameters[i].sub_(before[i]).mul_(factor).add_(before[i]);
}

std::vector<Tensor> norm_gradients(TensorList weights, TensorList kappas_, at::ArrayRef<double> log_scales,
                                   const Tensor& grad) {
  const std::vector<Tensor> kappas = readable(kappas_, weights, "weights");
  TORCH_CHECK_VALUE(log_scales.size() == weights.size(), "there are ", log_scales.size(), " log_scales for ",
                    weights.size(), " weights");
  const double factor = 2 * grad.item<double>();
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor w = weights[i].contiguous();
    results.push_back(at::empty(w.sizes(), w.options()));
    AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "norm_gradients", [&] {
      PathUpdate<scalar_t> p = make_update<scalar_t>(w, kappas[i]);
      p.out = results[i].mutable_data_ptr<scalar_t>();
      // In two halves, so that κ may be out of range where weight · κ is not.
      p.half = std::exp(std::max(-700.0, std::min(700.0, log_scales[i] / 2)));
      p.factor = factor;
      at::parallel_for(0, w.numel(), kShare,
                       [&](int64_t first, int64_t last) { kernels<scalar_t>().norm_gradient(p, first, last); });
    });
  }
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, CPU, m) {
  m.impl("precondition", &precondition_tensors);
  m.impl("shorten_", &shorten);
  m.impl("norm_gradients", &norm_gradients);
}

}  // namespace pathrnn

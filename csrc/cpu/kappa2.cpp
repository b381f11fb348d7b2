// kappa2: checks and allocation. The sum over lags: kappa2.inl.
#include <torch/library.h>

#include "check.h"
#include "isa.h"

namespace pathrnn {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> run(const Tensor& weight_hh, const Tensor& h, const Tensor& h_exponents, const Tensor& delta,
                               const Tensor& delta_exponents, int64_t workspace_bytes) {
  check_floating(weight_hh, "weight_hh");
  TORCH_CHECK_VALUE(weight_hh.dim() == 2 && weight_hh.size(0) == weight_hh.size(1) && weight_hh.size(0) > 0,
                    "weight_hh has shape ", weight_hh.sizes(), "; it must be [H, H]");
  TORCH_CHECK_VALUE(h.dim() == 2 && h.size(0) > 0, "h has shape ", h.sizes(), "; it must be [T, H]");
  const int64_t seq_len = h.size(0), hidden = weight_hh.size(0);
  check_shape(h, "h", {seq_len, hidden});
  check_shape(delta, "delta", {seq_len, hidden});
  check_like(h, "h", weight_hh, "weight_hh");
  check_like(delta, "delta", weight_hh, "weight_hh");
  for (const auto& [tensor, name] : {std::pair(h_exponents, "h_exponents"), {delta_exponents, "delta_exponents"}}) {
    check_shape(tensor, name, {seq_len});
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong && tensor.device().is_cpu(), name, " is ", tensor.toString(),
                     "; it must be int64 on the CPU");
  }
  TORCH_CHECK_VALUE(workspace_bytes >= 0, "workspace_bytes is ", workspace_bytes, "; it must be at least 0");
  const Tensor w = weight_hh.contiguous(), hc = h.contiguous(), dc = delta.contiguous();
  const Tensor he = h_exponents.contiguous(), de = delta_exponents.contiguous();
  Tensor term = at::empty_like(w), exponent = at::empty({}, h_exponents.options());
  Tensor lost = at::empty({}, w.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "kappa2", [&] {
    kernels<scalar_t>().kappa2(
        {seq_len, hidden, w.const_data_ptr<scalar_t>(), hc.const_data_ptr<scalar_t>(), he.const_data_ptr<int64_t>(),
         dc.const_data_ptr<scalar_t>(), de.const_data_ptr<int64_t>(), workspace_bytes,
         term.mutable_data_ptr<scalar_t>(), exponent.mutable_data_ptr<int64_t>(), lost.mutable_data_ptr<bool>()},
        threads_for(static_cast<double>(seq_len) * hidden * hidden * (seq_len + hidden)));
  });
  return {term, exponent, lost};
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, CPU, m) { m.impl("kappa2", &run); }
// A constant: its gradient is none, and a fallthrough costs nothing.
TORCH_LIBRARY_IMPL(pathrnn, Autograd, m) { m.impl("kappa2", torch::CppFunction::makeFallthrough()); }

}  // namespace pathrnn

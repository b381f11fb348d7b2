// The op path_chain, for those that go on with its results in the same call.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

namespace pathrnn {

// κ, exponents, unit exponents, entry exponents, log γ², lags, bounds, arithmetic: csrc/ops.h, PathChain.
using PathChainResult = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor,
                                   at::Tensor, at::Tensor, at::Tensor>;

PathChainResult path_chain_op(at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih,
                              at::TensorList bias_hh, const std::optional<at::Tensor>& head_weight,
                              const std::optional<at::Tensor>& head_bias, const std::optional<at::Tensor>& embedding,
                              int64_t seq_len, bool last_only, bool ones_h0, bool kappa1, double second_factor,
                              double rtol, at::IntArrayRef first_lags, int64_t workspace_bytes, bool bidirectional);

}  // namespace pathrnn

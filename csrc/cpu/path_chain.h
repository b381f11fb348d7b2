// The ops path_chain and path_step_, for those that call them without torch's dispatcher.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <utility>
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

// How the chains of κ⁽¹⁾ go: PathChain's ways, and the number of threads.
std::pair<std::vector<int64_t>, int> path_chain_ways(
    at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih, at::TensorList bias_hh,
    const std::optional<at::Tensor>& head_weight, const std::optional<at::Tensor>& head_bias,
    const std::optional<at::Tensor>& embedding, int64_t seq_len, bool last_only, bool ones_h0, bool bidirectional);

// Threads that it takes; `ends` counts the weights of head and embedding.
int path_chain_threads(int64_t chains, int64_t seq_len, int64_t hidden, bool second_term, int64_t ends);

int64_t path_step_op(at::TensorList weights, const std::vector<std::optional<at::Tensor>>& gradients,
                     at::TensorList first, at::TensorList second, at::TensorList counts,
                     const std::optional<at::Tensor>& constant, at::TensorList rates, at::ArrayRef<double> numbers,
                     c10::string_view rule, int64_t chains, bool bidirectional, bool bias, bool head, bool head_bias,
                     bool embedding, int64_t scale, double eps, double radius,
                     const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
                     int64_t seq_len, bool last_only, bool ones_h0, double second_factor, double rtol,
                     int64_t workspace_bytes, const std::optional<at::Tensor>& lags, at::TensorList bases);

}  // namespace pathrnn

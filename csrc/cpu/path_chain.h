// The ops path_chain and path_step_, for those that call them without torch's dispatcher.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace pathrnn {

// κ, exponents, unit exponents, entry exponents, log γ², lags, bounds, arithmetic: csrc/ops.h, PathChain.
using PathChainResult = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor,
                                   at::Tensor, at::Tensor, at::Tensor>;

// The same as it lies in memory, so that whoever reads none of it pays for no tensors but κ's.
struct PathChainPass {
  std::vector<at::Tensor> kappa;
  std::vector<int64_t> exponents, unit_exponents;
  std::vector<at::Tensor> entry_exponents;  // none, or one for each κ, without elements where they are zeros
  double log_path_norm;
  std::vector<int64_t> lags;
  std::vector<double> bounds;
  int8_t arithmetic;

  PathChainResult tensors() const;
};

PathChainPass path_chain_pass(at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih,
                              at::TensorList bias_hh, const std::optional<at::Tensor>& head_weight,
                              const std::optional<at::Tensor>& head_bias, const std::optional<at::Tensor>& embedding,
                              int64_t seq_len, bool last_only, bool ones_h0, bool kappa1, double second_factor,
                              double rtol, at::IntArrayRef first_lags, int64_t workspace_bytes, bool bidirectional);

// What a network has, and with it the order of its weights: of every chain weight_ih, weight_hh and, with biases, bias_ih,
// bias_hh; then the head's weight and bias and the embedding.
struct Chains {
  int64_t count;
  bool bidirectional, bias, head, head_bias, embedding;

  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t per_chain() const { return bias ? 4 : 2; }
  int64_t weights() const { return per_chain() * count + head + head_bias + embedding; }
  int64_t kappas() const { return (bias ? 3 : 2) * count + head + head_bias + embedding; }
  int64_t place(int64_t weight) const {  // of its κ
    const int64_t chain = weight / per_chain();
    if (chain >= count) return weight - per_chain() * count + (bias ? 3 : 2) * count;
    return (bias ? 3 : 2) * chain + std::min<int64_t>(weight % per_chain(), 2);
  }
  bool recurrent(int64_t weight) const { return weight < per_chain() * count && weight % per_chain() == 1; }
  int64_t head_bias_at() const { return head_bias ? per_chain() * count + head : -1; }
};

// κ of weights in that order, halves in float32.
PathChainPass path_chain_pass(at::TensorList weights, const Chains& chains, int64_t seq_len, bool last_only, bool ones_h0,
                              double second_factor, double rtol, at::IntArrayRef first_lags, int64_t workspace_bytes);
// The same with the options' defaults; none where weights are of several dtypes or devices, or one piece of memory.
std::optional<PathChainPass> path_chain_at_once(at::TensorList weights, const Chains& chains, int64_t seq_len,
                                                bool last_only, bool ones_h0, double second_factor, double rtol);

// How the chains of κ⁽¹⁾ go: PathChain's ways, and the number of threads.
std::pair<std::vector<int64_t>, int> path_chain_ways(
    at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih, at::TensorList bias_hh,
    const std::optional<at::Tensor>& head_weight, const std::optional<at::Tensor>& head_bias,
    const std::optional<at::Tensor>& embedding, int64_t seq_len, bool last_only, bool ones_h0, bool bidirectional);

// Threads that it takes; `ends` counts the weights of head and embedding.
int path_chain_threads(int64_t chains, int64_t seq_len, int64_t hidden, bool second_term, int64_t ends);

// path_step_ for the gradients that the weights have. State is of the weights at `places`; those of `foreign` never move;
// `owners` says which group's numbers each place has. None, and nothing has changed, where others have a gradient.
std::optional<int64_t> path_step_at_once(
    const std::vector<at::Tensor>& weights, const std::vector<int64_t>& places, const std::vector<int64_t>& foreign,
    const std::vector<int64_t>& owners, const std::vector<at::Tensor>& first, const std::vector<at::Tensor>& second,
    const std::vector<at::Tensor>& counts, const std::vector<at::Tensor>& bases, const std::string& rule,
    const Chains& chains, const std::vector<std::vector<double>>& numbers, const std::optional<at::Tensor>& constant,
    int64_t scale, double eps, double radius, const std::optional<at::Tensor>& grad_scale,
    const std::optional<at::Tensor>& found_inf, int64_t seq_len, bool last_only, bool ones_h0, double second_factor,
    double rtol, const std::optional<at::Tensor>& lags);

}  // namespace pathrnn

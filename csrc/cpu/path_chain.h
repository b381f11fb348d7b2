// The ops path_chain and path_step_, for those that call them without torch's dispatcher.
#pragma once

#include <ATen/ATen.h>

#include <array>
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

// A network's weights, of which κ is wanted again and again.
class NetworkWeights {
 public:
  NetworkWeights(std::vector<at::Tensor> weight_ih, std::vector<at::Tensor> weight_hh, std::vector<at::Tensor> bias_ih,
                 std::vector<at::Tensor> bias_hh, std::optional<at::Tensor> head_weight,
                 std::optional<at::Tensor> head_bias, std::optional<at::Tensor> embedding, bool bidirectional);
  // With κ; none where a weight has come to be of another shape, dtype or device, or to share another's memory.
  std::optional<PathChainPass> path_chain(int64_t seq_len, bool last_only, bool ones_h0, double second_factor,
                                          double rtol) const;
  // How the chains of κ⁽¹⁾ go: a Way of ops.h with its number for each of h, then of δ; and by how many threads.
  std::pair<std::vector<int64_t>, int> ways(int64_t seq_len, bool last_only, bool ones_h0) const;

 private:
  template <typename F>
  void each(const F& f) const;
  bool unchanged() const;

  std::vector<at::Tensor> weight_ih_, weight_hh_, bias_ih_, bias_hh_;
  std::optional<at::Tensor> head_weight_, head_bias_, embedding_;
  bool bidirectional_;
  std::vector<int64_t> sizes_;  // of all, one after the other
  at::ScalarType dtype_;
};

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

// path_step_ with all tensors but gradients held, for many steps.
class HeldStep {
 public:
  // State is of the weights at `places`; those of `foreign` never move. `owners`: which group's numbers each place has.
  HeldStep(std::vector<at::Tensor> weights, std::vector<int64_t> places, std::vector<int64_t> foreign,
           std::vector<int64_t> owners, std::vector<at::Tensor> first, std::vector<at::Tensor> second,
           std::vector<at::Tensor> counts, std::vector<at::Tensor> bases, std::string rule, int64_t chains,
           bool bidirectional, bool bias, bool head, bool head_bias, bool embedding);
  // The status; none, and nothing has changed, where other weights than those have a gradient, or of another dtype now.
  std::optional<int64_t> take(const std::vector<std::vector<double>>& numbers, std::optional<at::Tensor> constant,
                              int64_t scale, double eps, double radius, std::optional<at::Tensor> grad_scale,
                              std::optional<at::Tensor> found_inf, int64_t seq_len, bool last_only, bool ones_h0,
                              double second_factor, double rtol, std::optional<at::Tensor> lags) const;

 private:
  std::vector<at::Tensor> weights_, first_, second_, counts_, bases_;
  std::vector<int64_t> owners_;
  std::vector<int8_t> moves_;  // of every weight; -1: whatever its gradient is
  std::string rule_;
  std::array<int64_t, 6> structure_;
  at::ScalarType dtype_;
};

}  // namespace pathrnn

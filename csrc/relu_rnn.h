// relu_rnn: what its implementations share: the checks of the arguments, and cuDNN's two passes, which both the ops and
// autograd call.
#pragma once

#include <array>
#include <tuple>

#include "check.h"

namespace pathrnn {

struct ReluRnnSizes {
  int64_t seq_len, batch, input, hidden;
};

inline ReluRnnSizes check_relu_rnn(const at::Tensor& x, const std::optional<at::Tensor>& h_0,
                                   const at::Tensor& weight_ih, const at::Tensor& weight_hh,
                                   const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh,
                                   at::DeviceType device) {
  TORCH_CHECK_TYPE(x.device() == weight_hh.device(), "x is on ", x.device(), ", but weight_hh is on ",
                   weight_hh.device(), ": move one");
  check_floating(x, "x", device);
  TORCH_CHECK_VALUE(x.dim() == 3, "x has shape ", x.sizes(), "; it must be [T, B, I]");
  TORCH_CHECK_VALUE(weight_hh.dim() == 2 && weight_hh.size(0) == weight_hh.size(1), "weight_hh has shape ",
                    weight_hh.sizes(), "; it must be [H, H]");
  const ReluRnnSizes s{x.size(0), x.size(1), x.size(2), weight_hh.size(0)};
  TORCH_CHECK_VALUE(s.seq_len > 0 && s.batch > 0 && s.input > 0 && s.hidden > 0, "x has shape ", x.sizes(),
                    " and weight_hh ", weight_hh.sizes(), "; every size must be at least 1");
  check_shape(weight_ih, "weight_ih", {s.hidden, s.input});
  check_like(weight_ih, "weight_ih", x, "x");
  check_like(weight_hh, "weight_hh", x, "x");
  if (h_0) {
    check_shape(*h_0, "h_0", {s.batch, s.hidden});
    check_like(*h_0, "h_0", x, "x");
  }
  TORCH_CHECK_VALUE(bias_ih.has_value() == bias_hh.has_value(), "give both bias_ih and bias_hh, or neither");
  if (bias_ih) {
    check_shape(*bias_ih, "bias_ih", {s.hidden});
    check_shape(*bias_hh, "bias_hh", {s.hidden});
    check_like(*bias_ih, "bias_ih", x, "x");
    check_like(*bias_hh, "bias_hh", x, "x");
  }
  return s;
}

inline void check_gradients(const ReluRnnSizes& s, const std::optional<at::Tensor>& grad_y,
                            const std::optional<at::Tensor>& grad_h_n, const at::Tensor& x, const at::Tensor& y) {
  check_shape(y, "y", {s.seq_len, s.batch, s.hidden});
  check_like(y, "y", x, "x");
  if (grad_y) {
    check_shape(*grad_y, "grad_y", y.sizes());
    check_like(*grad_y, "grad_y", x, "x");
  }
  if (grad_h_n) {
    check_shape(*grad_h_n, "grad_h_n", {s.batch, s.hidden});
    check_like(*grad_h_n, "grad_h_n", x, "x");
  }
}

// Of x, h_0, weight_ih, weight_hh and either bias; empty where not needed.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// cuDNN's forward pass. Its backward pass reads all of it and writes into `reserve`.
struct CudnnForward {
  at::Tensor y;        // [T, B, H]
  at::Tensor h_n;      // [B, H]
  at::Tensor h_0;      // [1, B, H], dense
  at::Tensor weights;  // all of them, as cuDNN lays them out
  at::Tensor reserve;  // bytes, as many as cuDNN likes; none unless `training`
};

CudnnForward cudnn_forward(const at::Tensor& x, const std::optional<at::Tensor>& h_0, const at::Tensor& weight_ih,
                           const at::Tensor& weight_hh, const std::optional<at::Tensor>& bias_ih,
                           const std::optional<at::Tensor>& bias_hh, bool training);

// Gradients of x, h_0, weight_ih, weight_hh, bias_ih, bias_hh; undefined where not needed. Those of the weights share
// one piece of memory. grad_y or grad_h_n must be there.
std::array<at::Tensor, 6> cudnn_backward(const std::optional<at::Tensor>& grad_y,
                                         const std::optional<at::Tensor>& grad_h_n, const at::Tensor& x,
                                         const CudnnForward& forward, bool need_x, bool need_h_0, bool need_weights);

}  // namespace pathrnn

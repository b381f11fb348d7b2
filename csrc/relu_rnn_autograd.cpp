// relu_rnn's autograd, on every device.
//
// cuDNN's backward pass wants the forward pass's "reserve", a number of bytes that cuDNN alone knows, so that no op can
// return it to a tracer. Called with plain CUDA tensors, autograd runs cuDNN's two passes itself and keeps the reserve
// between them, as nn.RNN does and at its cost. Under a tracer (torch.compile, export) or another dispatch mode it
// calls the ops relu_rnn and relu_rnn_backward, which keep nothing: relu_rnn_backward on CUDA then costs another
// forward pass, and the memory of the reserve is saved.
//
// A backward pass that shall be differentiated itself (create_graph) is made of ATen's operations, step by step.
#include "relu_rnn.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>

namespace pathrnn {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const optional<Tensor>&, const Tensor&, const Tensor&,
                                           const optional<Tensor>&, const optional<Tensor>&,
                                           const optional<Tensor>&, bool);
using Backward = Gradients(const optional<Tensor>&, const optional<Tensor>&, const Tensor&, const optional<Tensor>&,
                           const Tensor&, const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
                           const Tensor&, std::array<bool, 5>, const optional<Tensor>&, bool);

// What the backward pass finds saved: the arguments, y, and after cuDNN's training pass what that gave besides.
enum Saved { kX, kH0, kWeightIh, kWeightHh, kBiasIh, kBiasHh, kLengths, kY, kDenseH0, kWeights, kReserve };

constexpr size_t kArguments = 9;  // of forward: those tensors, reverse and keep_reserve

bool is_traced(const Tensor& t) { return t.unsafeGetTensorImpl()->is_python_dispatch(); }

optional<Tensor> maybe(const Tensor& t) { return t.defined() ? optional<Tensor>(t) : std::nullopt; }

class ReluRnn : public torch::autograd::Function<ReluRnn> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const optional<Tensor>& h_0,
                               const Tensor& weight_ih, const Tensor& weight_hh, const optional<Tensor>& bias_ih,
                               const optional<Tensor>& bias_hh, const optional<Tensor>& lengths, bool reverse,
                               bool keep_reserve) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor y, h_n;
    // cuDNN's second forward pass alone asks for the biases' values: elsewhere they may change before the backward pass.
    const auto bias = [](const optional<Tensor>& b) {
      return !b ? Tensor() : b->is_cpu() && !is_traced(*b) ? b->variable_data() : *b;
    };
    variable_list saved{x, h_0.value_or(Tensor()), weight_ih, weight_hh, bias(bias_ih), bias(bias_hh),
                        lengths.value_or(Tensor())};
    if (keep_reserve) {
      const CudnnForward pass =
          cudnn_forward(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, /*training=*/true);
      y = pass.y;
      h_n = pass.h_n;
      saved.insert(saved.end(), {y, pass.h_0, pass.weights, pass.reserve});
    } else {
      static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("pathrnn::relu_rnn", "").typed<Forward>();
      std::tie(y, h_n) = op.call(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse);
      saved.push_back(y);
    }
    ctx->save_for_backward(std::move(saved));
    if (reverse) ctx->saved_data["reverse"] = true;
    // A loss on h_n alone, or on y alone, should not cost a tensor of zeros for the other.
    ctx->set_materialize_grads(false);
    return {y, h_n};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kArguments);
    // Under autocast ATen's products would run in half precision, whatever these tensors are.
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = ctx->get_saved_variables();
    const optional<Tensor> grad_y = maybe(grads[0]), grad_h_n = maybe(grads[1]), lengths = maybe(saved[kLengths]);
    const bool reverse = ctx->saved_data.count("reverse") > 0;
    // Autograd counts the tensors that were given, so an absent h_0 or bias shifts those after it.
    std::array<bool, 6> need;
    size_t edge = 0;
    for (size_t i = 0; i < need.size(); ++i) need[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    const bool need_bias = need[kBiasIh] || need[kBiasHh];

    std::array<Tensor, 6> found;
    // With create_graph the op is called, which is differentiable.
    if (saved.size() > kReserve && !at::GradMode::is_enabled()) {
      CudnnForward pass{saved[kY], {}, saved[kDenseH0], saved[kWeights], saved[kReserve]};
      if (torch::autograd::get_current_graph_task_keep_graph()) pass.reserve = pass.reserve.clone();
      found = cudnn_backward(grad_y, grad_h_n, saved[kX], pass, lengths, reverse, need[kX], need[kH0],
                             need[kWeightIh] || need[kWeightHh] || need_bias);
    } else {
      static const auto op =
          c10::Dispatcher::singleton().findSchemaOrThrow("pathrnn::relu_rnn_backward", "").typed<Backward>();
      std::tie(found[kX], found[kH0], found[kWeightIh], found[kWeightHh], found[kBiasIh]) =
          op.call(grad_y, grad_h_n, saved[kX], maybe(saved[kH0]), saved[kWeightIh], saved[kWeightHh],
                  maybe(saved[kBiasIh]), maybe(saved[kBiasHh]), saved[kY],
                  {need[kX], need[kH0], need[kWeightIh], need[kWeightHh], need_bias}, lengths, reverse);
      // A gradient of its own: the two are accumulated and scaled separately.
      if (need[kBiasHh]) found[kBiasHh] = found[kBiasIh].clone();
    }
    variable_list result(kArguments);
    for (size_t i = 0; i < need.size(); ++i) {
      if (need[i]) result[i] = std::move(found[i]);
    }
    return result;
  }
};

bool learns(const Tensor& t) { return t.requires_grad(); }
bool has_tangent(const Tensor& t) { return t._fw_grad(0).defined(); }

bool is_any(std::initializer_list<optional<Tensor>> tensors, bool (*test)(const Tensor&)) {
  return std::any_of(tensors.begin(), tensors.end(), [&](const optional<Tensor>& t) { return t && test(*t); });
}

std::tuple<Tensor, Tensor> differentiable(const Tensor& x, const optional<Tensor>& h_0, const Tensor& weight_ih,
                                          const Tensor& weight_hh, const optional<Tensor>& bias_ih,
                                          const optional<Tensor>& bias_hh, const optional<Tensor>& lengths,
                                          bool reverse) {
  const bool keep_reserve = x.is_cuda() && at::GradMode::is_enabled() && !c10::impl::dispatch_mode_enabled() &&
                            is_any({x, h_0, weight_ih, weight_hh, bias_ih, bias_hh}, learns) &&
                            !is_any({x, h_0, weight_ih, weight_hh, bias_ih, bias_hh}, is_traced);
  const variable_list out =
      ReluRnn::apply(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, keep_reserve);
  return {out[0], out[1]};
}

Gradients differentiable_backward(const optional<Tensor>& grad_y, const optional<Tensor>& grad_h_n, const Tensor& x,
                                  const optional<Tensor>& h_0, const Tensor& weight_ih, const Tensor& weight_hh,
                                  const optional<Tensor>& bias_ih, const optional<Tensor>& bias_hh, const Tensor& y,
                                  std::array<bool, 5> needs, const optional<Tensor>& lengths, bool reverse) {
  const auto is_one = [&](bool (*test)(const Tensor&)) {
    return is_any({grad_y, grad_h_n, x, h_0, weight_ih, weight_hh, y}, test);
  };
  if (!(at::GradMode::is_enabled() && is_one(learns)) && !is_one(has_tangent)) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("pathrnn::relu_rnn_backward", "").typed<Backward>();
    return op.call(grad_y, grad_h_n, x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, y, needs, lengths, reverse);
  }
  const ReluRnnSizes s = check_relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, x.device().type());
  check_gradients(s, grad_y, grad_h_n, x, y);
  const Steps steps(s, x, reverse);
  const Tensor x_rows = steps.gather(x), y_rows = steps.gather(y);
  const Tensor grad_rows = grad_y ? steps.gather(*grad_y) : Tensor();
  const Tensor shut = y_rows.detach() <= 0;  // where ReLU's derivative, itself a constant, is 0
  const Tensor start = h_0 ? steps.sort(*h_0) : Tensor();
  const Tensor grad_ends = grad_h_n ? steps.sort(*grad_h_n) : at::zeros({s.batch, s.hidden}, x.options());
  Tensor grad_h = grad_ends.narrow(0, 0, 0);
  variable_list deltas(s.seq_len);  // in the order of the rows
  variable_list reached, befores;   // of every step whose h_{t-1} is given: 0 · inf is not 0
  for (int64_t t = s.seq_len - 1; t >= 0; --t) {
    const int64_t first = steps.first[t], rows = steps.rows[t], longer = grad_h.size(0);
    const int64_t place = s.lengths.empty() ? first / s.batch : t;
    grad_h = at::cat({grad_h, grad_ends.narrow(0, longer, rows - longer)});
    if (grad_y) grad_h = grad_h + grad_rows.narrow(0, first, rows);
    deltas[place] = grad_h.masked_fill(shut.narrow(0, first, rows), 0);  // not 0 · inf, as in the kernels
    if (t > 0 || h_0) {
      reached.push_back(deltas[place]);
      befores.push_back(t > 0 ? y_rows.narrow(0, steps.first[t - 1], rows) : start);
    }
    grad_h = deltas[place].matmul(weight_hh);
  }
  const Tensor delta = at::cat(deltas), none = at::empty({0}, x.options());
  Tensor grad_weight_hh = none;
  if (needs[3]) {
    grad_weight_hh = befores.empty() ? at::zeros_like(weight_hh) : at::cat(reached).t().matmul(at::cat(befores));
  }
  return {needs[0] ? steps.scatter(delta.matmul(weight_ih), x.sizes()) : none, needs[1] ? steps.unsort(grad_h) : none,
          needs[2] ? delta.t().matmul(x_rows) : none, grad_weight_hh,
          needs[4] ? delta.sum(0) : none};
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, Autograd, m) {
  m.impl("relu_rnn", &differentiable);
  m.impl("relu_rnn_backward", &differentiable_backward);
}

}  // namespace pathrnn

// relu_rnn: checks, the products outside the recurrence (through ATen), autograd. Recurrence: relu_rnn.inl.
#include <torch/library.h>
#include <torch/csrc/autograd/custom_function.h>

#include "check.h"
#include "isa.h"

namespace pathrnn {
namespace {

using at::Tensor;
using std::optional;

struct Sizes {
  int64_t seq_len, batch, input, hidden;
};

Sizes check(const Tensor& x, const optional<Tensor>& h_0, const Tensor& weight_ih, const Tensor& weight_hh) {
  check_floating(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 3, "x has shape ", x.sizes(), "; it must be [T, B, I]");
  TORCH_CHECK_VALUE(weight_hh.dim() == 2 && weight_hh.size(0) == weight_hh.size(1), "weight_hh has shape ",
                    weight_hh.sizes(), "; it must be [H, H]");
  const Sizes s{x.size(0), x.size(1), x.size(2), weight_hh.size(0)};
  TORCH_CHECK_VALUE(s.seq_len > 0 && s.batch > 0 && s.input > 0 && s.hidden > 0, "x has shape ", x.sizes(),
                    " and weight_hh ", weight_hh.sizes(), "; every size must be at least 1");
  check_shape(weight_ih, "weight_ih", {s.hidden, s.input});
  check_like(weight_ih, "weight_ih", x, "x");
  check_like(weight_hh, "weight_hh", x, "x");
  if (h_0) {
    check_shape(*h_0, "h_0", {s.batch, s.hidden});
    check_like(*h_0, "h_0", x, "x");
  }
  return s;
}

// Threads for the recurrence. Splitting the batch costs no barrier; splitting the columns costs one a step, which
// pays only where a step is long.
int64_t row_groups(const Sizes& s) {
  const int threads = threads_for(static_cast<double>(s.seq_len) * s.batch * s.hidden * s.hidden);
  return std::max<int64_t>(1, std::min<int64_t>(threads, s.batch / kRowGroup));
}

int team_size(const Sizes& s) {
  constexpr double kWorthABarrier = 5e4;
  const double step = static_cast<double>(s.batch) / row_groups(s) * s.hidden * s.hidden;
  return step < kWorthABarrier ? static_cast<int>(row_groups(s))
                               : threads_for(static_cast<double>(s.seq_len) * s.batch * s.hidden * s.hidden);
}

// The input's product is cheaper inside the recurrence, which touches y once, where it is bound by memory or where a
// thread's rows fill register tiles; for fewer rows one large product over all steps reads the weights less often.
bool fuses_input(const Sizes& s) { return s.input <= 32 || (s.batch / row_groups(s) >= 6 && s.input <= 512); }

// The weights' gradients are cheaper inside the recurrence while a thread's share of them stays in its cache. A thread
// needs rows of its own for that, and whole vectors read past a row of y stay inside y.
bool fuses_gradients(const Sizes& s) {
  return s.hidden <= 512 && fuses_input(s) && team_size(s) == row_groups(s) && s.batch * s.hidden >= 64;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const optional<Tensor>& h_0_, const Tensor& weight_ih_,
                                   const Tensor& weight_hh_, const optional<Tensor>& bias_ih,
                                   const optional<Tensor>& bias_hh) {
  const Sizes s = check(x_, h_0_, weight_ih_, weight_hh_);
  TORCH_CHECK_VALUE(bias_ih.has_value() == bias_hh.has_value(), "give both bias_ih and bias_hh, or neither");
  Tensor bias;
  if (bias_ih) {
    check_shape(*bias_ih, "bias_ih", {s.hidden});
    check_shape(*bias_hh, "bias_hh", {s.hidden});
    check_like(*bias_ih, "bias_ih", x_, "x");
    check_like(*bias_hh, "bias_hh", x_, "x");
    bias = *bias_ih + *bias_hh;
  }
  const Tensor x = x_.contiguous(), weight_ih = weight_ih_.contiguous(), weight_hh = weight_hh_.contiguous();
  const Tensor h_0 = h_0_ ? h_0_->contiguous() : Tensor();
  Tensor y = at::empty({s.seq_len, s.batch, s.hidden}, x.options());
  const bool fused = fuses_input(s);
  if (!fused) {
    Tensor drive = y.view({s.seq_len * s.batch, s.hidden});
    const Tensor rows = x.view({s.seq_len * s.batch, s.input});
    if (bias.defined()) {
      at::addmm_out(drive, bias, rows, weight_ih.t());
    } else {
      at::mm_out(drive, rows, weight_ih.t());
    }
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "relu_rnn", [&] {
    kernels<scalar_t>().relu_rnn_forward(
        {s.seq_len, s.batch, s.input, s.hidden, fused ? x.const_data_ptr<scalar_t>() : nullptr,
         data_or_null<scalar_t>(h_0), weight_ih.const_data_ptr<scalar_t>(), weight_hh.const_data_ptr<scalar_t>(),
         data_or_null<scalar_t>(bias), y.mutable_data_ptr<scalar_t>()},
        team_size(s));
  });
  return {y, y[s.seq_len - 1].clone()};
}

// grad_x, grad_h_0, grad_weight_ih, grad_weight_hh, grad_bias; empty where not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const optional<Tensor>& grad_y_, const optional<Tensor>& grad_h_n_, const Tensor& x_, const optional<Tensor>& h_0_,
    const Tensor& weight_ih, const Tensor& weight_hh_, const Tensor& y_, std::array<bool, 5> needs) {
  const Sizes s = check(x_, h_0_, weight_ih, weight_hh_);
  check_shape(y_, "y", {s.seq_len, s.batch, s.hidden});
  check_like(y_, "y", x_, "x");
  if (grad_y_) {
    check_shape(*grad_y_, "grad_y", y_.sizes());
    check_like(*grad_y_, "grad_y", x_, "x");
  }
  if (grad_h_n_) {
    check_shape(*grad_h_n_, "grad_h_n", {s.batch, s.hidden});
    check_like(*grad_h_n_, "grad_h_n", x_, "x");
  }
  const auto dense = [](const optional<Tensor>& t) { return t ? t->contiguous() : Tensor(); };
  const Tensor grad_y = dense(grad_y_), grad_h_n = dense(grad_h_n_), weight_hh = weight_hh_.contiguous();
  const Tensor y = y_.contiguous(), x = x_.contiguous();

  const auto unneeded = [&] { return at::empty({0}, y.options()); };
  const auto wanted = [&](bool need, at::IntArrayRef shape) { return need ? at::empty(shape, y.options()) : unneeded(); };
  const bool fused = needs[2] && needs[3] && fuses_gradients(s);
  const bool whole_delta = needs[0] || !fused;
  Tensor delta = wanted(whole_delta, y.sizes());
  Tensor grad_h_0 = wanted(needs[1], {s.batch, s.hidden});
  Tensor grad_weight_ih = wanted(fused, weight_ih.sizes()), grad_weight_hh = wanted(fused, weight_hh.sizes());
  Tensor grad_bias = wanted(fused, {s.hidden});
  const Tensor h_0 = dense(h_0_);
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "relu_rnn_backward", [&] {
    const auto out = [](const Tensor& t, bool need) { return need ? t.mutable_data_ptr<scalar_t>() : nullptr; };
    kernels<scalar_t>().relu_rnn_backward(
        {s.seq_len, s.batch, s.input, s.hidden, weight_hh.const_data_ptr<scalar_t>(), y.const_data_ptr<scalar_t>(),
         data_or_null<scalar_t>(grad_y), data_or_null<scalar_t>(grad_h_n), out(delta, whole_delta),
         out(grad_h_0, needs[1]), x.const_data_ptr<scalar_t>(), data_or_null<scalar_t>(h_0),
         out(grad_weight_hh, fused), out(grad_weight_ih, fused), out(grad_bias, fused)},
        team_size(s));
  });

  const Tensor rows = whole_delta ? delta.view({s.seq_len * s.batch, s.hidden}) : delta;
  Tensor grad_x = needs[0] ? at::mm(rows, weight_ih).view(x.sizes()) : unneeded();
  if (!fused && needs[2]) grad_weight_ih = at::mm(rows.t(), x.view({s.seq_len * s.batch, s.input}));
  if (!fused && needs[3]) {
    // Σ_t delta_t h_{t-1}ᵀ: one product over all steps, where autograd through the steps makes one a step.
    const int64_t later = (s.seq_len - 1) * s.batch;
    const Tensor before = y.view({s.seq_len * s.batch, s.hidden}).narrow(0, 0, later);
    grad_weight_hh = at::mm(rows.narrow(0, s.batch, later).t(), before);
    if (h_0_) grad_weight_hh.addmm_(rows.narrow(0, 0, s.batch).t(), *h_0_);
  }
  if (!needs[4]) {
    grad_bias = unneeded();
  } else if (!fused) {
    grad_bias = rows.sum(0);
  }
  return {grad_x, grad_h_0, grad_weight_ih, grad_weight_hh, grad_bias};
}

class ReluRnn : public torch::autograd::Function<ReluRnn> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                                                const optional<Tensor>& h_0, const Tensor& weight_ih,
                                                const Tensor& weight_hh, const optional<Tensor>& bias_ih,
                                                const optional<Tensor>& bias_hh) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("pathrnn::relu_rnn", "")
                               .typed<decltype(pathrnn::forward)>();
    auto [y, h_n] = op.call(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh);
    ctx->save_for_backward({x, h_0.value_or(Tensor()), weight_ih, weight_hh, y});
    ctx->saved_data["bias"] = bias_ih.has_value();
    // A loss on h_n alone, or on y alone, should not cost a tensor of zeros for the other.
    ctx->set_materialize_grads(false);
    return {y, h_n};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    if (!grads[0].defined() && !grads[1].defined()) return torch::autograd::variable_list(6);
    const auto saved = ctx->get_saved_variables();
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("pathrnn::relu_rnn_backward", "")
                               .typed<decltype(pathrnn::backward)>();
    const auto maybe = [](const Tensor& t) { return t.defined() ? optional<Tensor>(t) : std::nullopt; };
    // Autograd counts the tensors that were given, so an absent h_0 or bias shifts those after it.
    size_t edge = 0;
    const auto need = [&](bool given) { return given && ctx->needs_input_grad(edge++); };
    const bool has_bias = ctx->saved_data["bias"].toBool();
    const bool need_x = need(true), need_h_0 = need(saved[1].defined());
    const bool need_ih = need(true), need_hh = need(true);
    const bool need_bias_ih = need(has_bias), need_bias_hh = need(has_bias);
    const std::array<bool, 5> needs{need_x, need_h_0, need_ih, need_hh, need_bias_ih || need_bias_hh};
    const auto [x, h_0, weight_ih, weight_hh, b] =
        op.call(maybe(grads[0]), maybe(grads[1]), saved[0], maybe(saved[1]), saved[2], saved[3], saved[4], needs);
    const auto take = [](const Tensor& t, bool needed) { return needed ? t : Tensor(); };
    return {take(x, need_x),
            take(h_0, need_h_0),
            take(weight_ih, need_ih),
            take(weight_hh, need_hh),
            take(b, need_bias_ih),
            // A gradient of its own: the two are accumulated and scaled separately.
            need_bias_hh ? b.clone() : Tensor()};
  }
};

std::tuple<Tensor, Tensor> differentiable(const Tensor& x, const optional<Tensor>& h_0, const Tensor& weight_ih,
                                          const Tensor& weight_hh, const optional<Tensor>& bias_ih,
                                          const optional<Tensor>& bias_hh) {
  const auto out = ReluRnn::apply(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, CPU, m) {
  m.impl("relu_rnn", &forward);
  m.impl("relu_rnn_backward", &backward);
}
TORCH_LIBRARY_IMPL(pathrnn, Autograd, m) { m.impl("relu_rnn", &differentiable); }

}  // namespace pathrnn

// What path_update_, path_step_ and path_norm_gradients refuse before anything is written.
#include <ATen/MemoryOverlap.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "../check.h"
#include "path_step.h"

namespace pathrnn::step {
namespace {

// Before any pointer is taken: what torch would say of an inference tensor, or of one whose entries are one piece of
// memory, afterwards. A lazy clone gets memory of its own.
void check_written(const Tensor& t, const char* name) {
  TORCH_CHECK(!t.is_inference() || c10::InferenceMode::is_enabled(), name,
              " was made under torch.inference_mode(), and can be written to there alone: do this there, or clone it "
              "outside");
  TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, name,
                    " has entries that share memory (expanded?): clone it");
  t.mutable_data_ptr();
}

void check_exponents(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kLong && t.is_contiguous(), name, " have dtype ", t.scalar_type(),
                   "; they must be int64, contiguous");
}

// The i-th weight and its κ.
void check_weight(const Arguments& a, int64_t i, TensorList factors, int64_t H) {
  const Tensor &w = a.weights[i], &factor = factors[a.chains.place(i)];
  const int64_t D = a.chains.directions(), per_chain = a.chains.per_chain();
  const int64_t chain = i / per_chain, kind = i % per_chain, rest = i - per_chain * a.chains.count;
  const bool of_chain = chain < a.chains.count;
  check_floating(w, "weights", at::kCPU, true);
  check_like(w, "weights", a.weights[0], "the first of them");
  const bool vector = of_chain ? kind > 1 : a.chains.head_bias && i == a.chains.head_bias_at();
  TORCH_CHECK_VALUE(w.dim() == (vector ? 1 : 2), "weight ", i, " has ", w.dim(), " dimensions");
  bool fits = !of_chain || w.size(0) == H;
  if (of_chain && kind == 1) fits &= w.size(1) == H;
  if (of_chain ? kind == 0 && chain >= D : rest == 0 && a.chains.head) fits &= w.size(1) == D * H;
  TORCH_CHECK_VALUE(fits, "weight ", i, " has shape ", w.sizes(), "; there are ", H, " hidden units");
  check_like(factor, "kappas", factors[0], "the first of them");
  const at::ScalarType dtype = w.scalar_type();
  TORCH_CHECK_TYPE(factor.scalar_type() == (at::isReducedFloatingType(dtype) ? at::kFloat : dtype) && factor.is_cpu(),
                   "kappas have dtype ", factor.scalar_type(), "; weights have ", dtype);
  TORCH_CHECK_VALUE(at::is_expandable_to(factor.sizes(), w.sizes()) && factor.dim() == w.dim(), "kappa has shape ",
                    factor.sizes(), ", which does not broadcast to that of its weight, ", w.sizes());
}

}  // namespace

void check_scalar(const Tensor& t, const char* name) {
  check_floating(t, name);
  TORCH_CHECK_VALUE(t.numel() == 1, name, " has shape ", t.sizes(), "; it must have one entry");
}

void check_count(const Arguments& a) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(a.weights.size()) == a.chains.weights() &&
                        a.gradients.size() == a.weights.size(),
                    "there are ", a.weights.size(), " weights and ", a.gradients.size(),
                    " gradients; these chains have ", a.chains.weights());
}

void check_options(const Arguments& a) {
  TORCH_CHECK_VALUE(a.rule == "sgd" || a.rule == "given" || a.in_coordinates(), "rule is ", a.rule,
                    "; use sgd, given, coordinates or eigenbases");
  TORCH_CHECK_VALUE(a.rule == "eigenbases" || a.bases.empty(), "rule is ", a.rule, ", which has no bases");
  if (a.grad_scale) check_scalar(*a.grad_scale, "grad_scale");
  TORCH_CHECK_VALUE(a.scale >= 0 && a.scale <= 2, "scale is ", a.scale, "; it must be 0, 1 or 2");
  const optional<Tensor>& constant = a.constant;
  TORCH_CHECK_VALUE(a.scale != 2 || (constant && constant->scalar_type() == at::kDouble && constant->numel() == 1),
                    "scale is 2 without a constant; give one of float64");
  if (!a.in_coordinates()) return;
  for (const TensorList state : {a.first, a.second, a.counts}) {
    TORCH_CHECK_VALUE(!state.empty(), "rule is ", a.rule, "; give first, second and counts");
  }
  for (const Tensor& count : a.counts) {
    TORCH_CHECK_TYPE(count.is_cpu() && count.scalar_type() == at::kFloat && count.numel() == 1, "counts have dtype ",
                     count.scalar_type(), "; they must be float32 scalars on the CPU");
  }
}

void check_written(const Arguments& a) {
  for (size_t i = 0; i < a.weights.size(); ++i) {
    if (!a.gradients[i]) continue;
    check_written(a.weights[i], "a weight");
    for (size_t j = 0; j < i; ++j) {
      const bool one = a.gradients[j] && a.weights[i].const_data_ptr() == a.weights[j].const_data_ptr();
      TORCH_CHECK_VALUE(!one || a.weights[i].numel() == 0, "two weights, of shapes ", a.weights[j].sizes(), " and ",
                        a.weights[i].sizes(), ", are one piece of memory (tied?): untie them");
    }
  }
  for (const TensorList state : {a.first, a.second, a.counts, a.bases}) {
    for (const Tensor& t : state) check_written(t, "an optimiser's state");
  }
  if (a.constant) check_written(*a.constant, "constant");
}

Kappa checked(const Arguments& a, TensorList factors, const Tensor& exponents, const Tensor& unit_exponents,
              TensorList entry_exponents) {
  check_count(a);
  TORCH_CHECK_VALUE(static_cast<int64_t>(factors.size()) == a.chains.kappas() &&
                        (entry_exponents.empty() || entry_exponents.size() == factors.size()) &&
                        exponents.sizes() == at::IntArrayRef({a.chains.kappas()}),
                    "there are ", factors.size(), " tensors of κ; these chains have ", a.chains.kappas());
  TORCH_CHECK_VALUE(unit_exponents.dim() == 2 && unit_exponents.size(0) == a.chains.count &&
                        unit_exponents.is_contiguous(),
                    "unit_exponents has shape ", unit_exponents.sizes(), "; it must be [chains, H]");
  TORCH_CHECK_VALUE(!a.chains.bidirectional || a.chains.count % 2 == 0, "there are ", a.chains.count,
                    " chains of two directions");
  check_exponents(exponents, "exponents");
  check_exponents(unit_exponents, "exponents");
  const int64_t* const units = unit_exponents.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(std::all_of(units, units + unit_exponents.numel(), [](int64_t d) { return d % 2 == 0; }),
                    "unit_exponents has an odd number; they must be even");
  for (size_t i = 0; i < entry_exponents.size(); ++i) {
    check_exponents(entry_exponents[i], "entry_exponents");
    if (entry_exponents[i].numel() > 0) check_shape(entry_exponents[i], "entry_exponents", factors[i].sizes());
  }
  const int64_t H = unit_exponents.size(1);
  for (int64_t i = 0; i < a.chains.weights(); ++i) check_weight(a, i, factors, H);
  return {factors, exponents.const_data_ptr<int64_t>(), units, H, entry_exponents, 0, false, kNative};
}

}  // namespace pathrnn::step

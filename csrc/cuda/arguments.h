// Arguments of the path kernels, checked: contiguous tensors, or an error that names the argument.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "../check.h"

namespace pathrnn {

inline unsigned blocks_for(int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); }

// None gives an undefined tensor, whose data_or_null is null.
inline at::Tensor checked(const std::optional<at::Tensor>& tensor, const char* name, at::IntArrayRef shape,
                          const at::Tensor& reference, const char* other) {
  if (!tensor) return {};
  check_shape(*tensor, name, shape);
  check_like(*tensor, name, reference, other);
  return tensor->contiguous();
}

inline void check_integral(const at::Tensor& tensor, const char* name, at::ScalarType type, const char* type_name,
                           const at::Tensor& reference, const char* other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " has dtype ", tensor.scalar_type(), "; use ", type_name);
  TORCH_CHECK_TYPE(tensor.device() == reference.device(), name, " is on ", tensor.device(), ", but ", other, " is on ",
                   reference.device(), ": move one");
}

inline at::Tensor checked_exponents(const std::optional<at::Tensor>& tensor, const char* name, int64_t count,
                                    const at::Tensor& reference, const char* other) {
  if (!tensor) return {};
  check_integral(*tensor, name, at::kLong, "int64", reference, other);
  check_shape(*tensor, name, {count});
  return tensor->contiguous();
}

// A flag that kernels set.
inline bool* checked_lost(const at::Tensor& lost, const at::Tensor& reference, const char* other) {
  check_integral(lost, "lost", at::kBool, "bool", reference, other);
  check_shape(lost, "lost", {1});
  return lost.mutable_data_ptr<bool>();
}

// Of any float dtype and size; `shape` describes it.
inline at::Tensor checked_first(const at::Tensor& tensor, const char* name, int64_t dim, const char* shape) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name, " has dtype ",
                   tensor.scalar_type(), "; use float32 or float64");
  TORCH_CHECK_VALUE(tensor.dim() == dim && tensor.size(dim - 1) > 0, name, " has shape ", tensor.sizes(),
                    "; it must be ", shape);
  return tensor.contiguous();
}

// Two arguments of which neither makes sense without the other.
inline void check_together(bool first, bool second, const char* names) {
  TORCH_CHECK_VALUE(first == second, names, " belong together; give both or none");
}

}  // namespace pathrnn

// Argument checks shared by the ops: ValueError or TypeError with the argument, its value and the remedy.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <limits>
#include <new>

namespace pathrnn {

// Bytes that this process can take before the system must kill something for them: of the machine and of its control
// group; infinity where neither says. check.cpp.
double available_memory();

// Refuses in a sentence (torch.OutOfMemoryError), before anything is taken, `bytes` that are not to be had: allocating
// them may well succeed, and the process is killed at their first use.
inline void check_memory(double bytes, const char* what) {
  constexpr double kAsks = 64 << 20, kGiB = 1 << 30;  // reading what is available takes some 50 µs
  if (bytes < kAsks) return;
  const double available = available_memory();
  TORCH_CHECK_WITH(OutOfMemoryError, bytes <= available, what, " takes about ", bytes / kGiB, " GiB at these sizes, but ",
                   available / kGiB, " GiB are available: use shorter sequences, smaller batches or fewer units");
}

// Runs f; what its own allocations throw becomes a sentence.
template <typename F>
auto allocating(const char* what, const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    C10_THROW_ERROR(OutOfMemoryError, c10::str(what, " got no memory for its workspace: use shorter sequences, smaller "
                                                     "batches or fewer units"));
  }
}

inline void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& reference, const char* other) {
  TORCH_CHECK_TYPE(tensor.device() == reference.device(), name, " is on ", tensor.device(), ", but ", other, " is on ",
                   reference.device(), ": move one");
  TORCH_CHECK_TYPE(tensor.scalar_type() == reference.scalar_type(), name, " has dtype ", tensor.scalar_type(), ", but ",
                   other, " has ", reference.scalar_type(), ": convert one");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, " is ", tensor.toString(), "; this kernel serves dense tensors");
}

inline void check_floating(const at::Tensor& tensor, const char* name, at::DeviceType device = at::kCPU,
                           bool half = false) {
  TORCH_CHECK_TYPE(tensor.device().type() == device && tensor.layout() == at::kStrided, name, " is ", tensor.toString(),
                   "; this kernel serves dense ", at::DeviceTypeName(device), " tensors");
  const at::ScalarType dtype = tensor.scalar_type();
  const bool served = dtype == at::kFloat || dtype == at::kDouble || (half && at::isReducedFloatingType(dtype));
  TORCH_CHECK_TYPE(served, name, " has dtype ", dtype, "; use float32 or float64", half ? ", bfloat16 or float16" : "");
}

inline void check_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), "; it must be ", shape);
}

// Threads for a call of `work` multiply-adds, where a second thread pays from `worth` on: some ten microseconds of work.
inline int threads_for(double work, [[maybe_unused]] double worth = 2e5) {
#ifdef PATHRNN_POISON
  worth = 0;  // small networks meet the code of teams, too
#endif
  return work < worth ? 1 : at::get_num_threads();
}

template <typename T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

}  // namespace pathrnn

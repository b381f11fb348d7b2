// What the kernels were compiled with, for build_info, and which of them a device would run.
#ifndef PATHRNN_EMULATE
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime.h>

#include <string>
#include <utility>

#define PATHRNN_TEXT_(...) #__VA_ARGS__
#define PATHRNN_TEXT(...) PATHRNN_TEXT_(__VA_ARGS__)

namespace pathrnn {

std::string cuda_build() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) + ", compute " +
         PATHRNN_TEXT(__CUDA_ARCH_LIST__);
}

namespace {
__global__ void any_kernel() {}
}  // namespace

// The architecture that the code which this device would run was compiled for, as 90 for compute_90, also where the
// driver compiles it from PTX. 0 and the reason where there is none.
std::pair<int, std::string> cuda_code(int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  cudaFuncAttributes found{};
  const cudaError_t error = cudaFuncGetAttributes(&found, any_kernel);
  if (error == cudaSuccess) return {found.ptxVersion, ""};
  cudaGetLastError();  // forget it
  return {0, cudaGetErrorString(error)};
}

}  // namespace pathrnn
#endif

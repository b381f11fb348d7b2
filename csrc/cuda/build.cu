// What the kernels were compiled with, for build_info.
#ifndef PATHRNN_EMULATE
#include <cuda_runtime.h>

#include <string>

#define PATHRNN_TEXT_(...) #__VA_ARGS__
#define PATHRNN_TEXT(...) PATHRNN_TEXT_(__VA_ARGS__)

namespace pathrnn {

std::string cuda_build() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) + ", compute " +
         PATHRNN_TEXT(__CUDA_ARCH_LIST__);
}

}  // namespace pathrnn
#endif

// How host code launches a kernel; with PATHRNN_EMULATE the kernel runs on the host (tests/emulation/).
#pragma once

#include <torch/library.h>

#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "device.cuh"

#ifdef PATHRNN_EMULATE
#define PATHRNN_DISPATCH_KEY CPU
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define PATHRNN_DISPATCH_KEY CUDA
#endif

namespace pathrnn {

struct Launch {
  unsigned cluster = 1;      // blocks of a cluster
  bool cooperative = false;  // all blocks are on the device at once, so that they may wait for each other
};

#ifdef PATHRNN_EMULATE

// The device of the tensors becomes the current one for a scope.
struct OnDevice {
  explicit OnDevice(const at::Tensor&) {}
};

// What a block of the largest GPU may have.
inline int64_t shared_bytes_limit() { return 227 * 1024; }

template <typename... P, typename... A>
void launch(const std::string& name, void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared, Launch options,
            A... arguments) {
  emulation::run(name, grid, block, shared, options.cluster, options.cooperative, [&] { kernel(arguments...); });
}

#else

struct OnDevice {
  explicit OnDevice(const at::Tensor& tensor) : guard(tensor.device()) {}
  c10::cuda::CUDAGuard guard;
};

inline int64_t shared_bytes_limit() {
  int device, bytes;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Lets a kernel take all shared memory that a block of the current device may have, and clusters of any size: once, for
// good, so that two threads which launch it with different sizes do not take the permission from each other.
inline cudaError_t allow(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes_limit()));
  int major;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (error == cudaSuccess && major >= 9) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) allowed.emplace(kernel, device);
  return error;
}

// On the current stream of the current device. `name` is the op's and its plan's, for the message of an error.
template <typename... P, typename... A>
void launch(const std::string& name, void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared, Launch options,
            A... arguments) {
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // forget it: the next launch must not report this one's
    TORCH_CHECK(false, name, ": ", cudaGetErrorString(error), " (", grid.x, " x ", grid.y, " x ", grid.z, " blocks of ",
                block.x * block.y * block.z, " threads, ", shared, " bytes of shared memory, clusters of ",
                options.cluster, options.cooperative ? ", cooperative)" : ")");
  };
  constexpr int64_t without_asking = 48 * 1024, portable_cluster = 8;
  if (shared > without_asking || options.cluster > portable_cluster) {
    check(allow(reinterpret_cast<const void*>(kernel)));
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = c10::cuda::getCurrentCUDAStream();
  config.attrs = attributes;
  if (options.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = options.cluster;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
  }
  if (options.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

#endif

}  // namespace pathrnn

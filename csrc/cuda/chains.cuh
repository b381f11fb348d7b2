// The two chains h and δ of the squared network: what chains_in_registers.cuh (plans block and cluster) and
// chains_on_grid.cuh (plan grid) have in common. Function `chains` in tests/gpu_model.py says what is computed.
#pragma once

#include "path_chain.cuh"

namespace pathrnn {

// How a chain holds W̃ and hands on its rows.
enum class ChainPlan {
  block,    // one block, W̃ in its registers
  cluster,  // a cluster, W̃ sliced over the registers of its blocks, which write into each other's shared memory
  grid      // blocks all over the device meet in global memory; rows of W̃ beyond shared memory are read in every step
};

// y_s = M y_{s-1} + drive_s for s = 1 … seq_len, M = W̃ or W̃ᵀ.
template <typename T>
struct Chain {
  const T* weight;  // [H, H]
  const T* largest;
  bool transposed;
  bool starts_with_ones;  // y_0 = 1 instead of 0
  bool keeps_start;       // y_0 is a result, too
  // Step s is driven by row drive_first + s · drive_step; with driven_once only step 1 is.
  const T* drive;
  const int64_t* drive_exponents;
  int64_t drive_first, drive_step;
  bool driven_once;
  // y_s is row first + s · step of the results.
  T* rows;
  int64_t* exponents;
  int64_t first, step;
};

template <typename T>
struct Chains {
  Chain<T> chain[2];
  int seq_len, hidden;
  int blocks;  // of each chain
  int slice;   // rows of M that a block has
  bool* lost;  // set where something has underflowed
};

// What a block has of a chain.
struct Slice {
  int which, rank;  // the chain, and the block in it
  int first, rows;  // of M
  template <typename T>
  __device__ explicit Slice(const Chains<T>& a)
      : which(static_cast<int>(blockIdx.x) / a.blocks),
        rank(static_cast<int>(blockIdx.x) % a.blocks),
        first(static_cast<int>(min(int64_t{rank} * a.slice, int64_t{a.hidden}))),
        rows(min(a.slice, a.hidden - first)) {}
};

}  // namespace pathrnn

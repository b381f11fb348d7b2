// Every kernel in one instruction set: the body of a namespace in isa_*.cpp.
#include "tile.inl"
// Each needs those before it.
static_assert(kTileRows / 2 <= kRowGroup, "a row group fills half a tile");
#include "relu_rnn.inl"
#include "chain.inl"
#include "chain_blocks.inl"
#include "kappa2.inl"
#include "path_chain.inl"
#include "path_chain_exact.inl"
#include "path_step.inl"

template <typename T>
constexpr Kernels<T> kKernels{&relu_rnn_forward<T>,
                              &relu_rnn_backward<T>,
                              &path_chain<T>,
                              {&sgd_measure<T, T>, &sgd_measure<T, double>},
                              {&sgd_apply<T, T>, &sgd_apply<T, double>},
                              {&coordinate_measure<T, T>, &coordinate_measure<T, double>},
                              {&coordinate_apply<T, T>, &coordinate_apply<T, double>},
                              &path_mass<T>,
                              &raw_and_divided<T>,
                              &norm_gradient<T>};

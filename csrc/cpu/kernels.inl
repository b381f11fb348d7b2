// Every kernel in one instruction set: the body of a namespace in isa_*.cpp. Each file needs those before it.
#include "tile.inl"
static_assert(tile_rows(kTileVectors) / 2 <= kRowGroup, "a row group fills half a tile");
#include "workspace.inl"
#include "relu_rnn.inl"
// path_chain: numbers, the network in canonical coordinates, its chains, sums over time, κ⁽²⁾, all together.
#include "lanes.inl"
#include "rows.inl"
#include "network.inl"
#include "canonical.inl"
#include "boundary.inl"
#include "matrix_vector.inl"
#include "chain.inl"
#include "closed_form.inl"
#include "chain_steps.inl"
#include "chain_shared.inl"
#include "support.inl"
#include "pair_sum.inl"
#include "chain_blocks.inl"
#include "drives.inl"
#include "path_chain_results.inl"
#include "kappa2_powers.inl"
#include "kappa2_lags.inl"
#include "kappa2_scan.inl"
#include "kappa2_rank_one.inl"
#include "kappa2_geometric.inl"
#include "kappa2.inl"
#include "path_chain.inl"
#include "path_chain_exact.inl"
#include "path_step.inl"

template <typename T>
constexpr Kernels<T> kKernels{&relu_rnn_forward<T>,
                              &relu_rnn_backward<T>,
                              &path_chain<T>,
                              {&far_gradients<T, T>, &far_gradients<double, T>},
                              {&sgd_measure<T, T>, &sgd_measure<T, double>},
                              {&sgd_apply<T, T>, &sgd_apply<T, double>},
                              {&coordinate_measure<T, T>, &coordinate_measure<T, double>},
                              {&coordinate_apply<T, T>, &coordinate_apply<T, double>},
                              {&coordinate_gradient<T, T>, &coordinate_gradient<T, double>},
                              {&coordinate_average<T>, &coordinate_average<double>},
                              {&coordinate_move<T, T>, &coordinate_move<T, double>},
                              &path_mass<T>,
                              &add_raw_and_divided<T>,
                              &norm_gradient<T>};

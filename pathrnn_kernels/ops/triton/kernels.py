"""The kernels of a pass, which ``ops.gpu`` calls; tests/gpu_model.py specifies them."""

from .canonical import canonical_, maxima, reach
from .kappa2 import second_term
from .path_chain import chains
from .sums import column_sums, ends, finish, pair_sums, row_sums

__all__ = [
    "canonical_",
    "chains",
    "column_sums",
    "ends",
    "finish",
    "maxima",
    "pair_sums",
    "reach",
    "row_sums",
    "second_term",
]

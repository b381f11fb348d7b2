"""Path-normalised optimisation of plain ReLU RNNs (Neyshabur, Wu, Salakhutdinov, Srebro, 2016)."""

from . import init, rescale
from .explain import explain
from .feedforward import FeedForward, kappa_of_module
from .gated import GatedPathSGD
from .kappa import Kappa, kappa, log_path_norm, path_norm
from .network import PathNetwork
from .optim import PathOptimizer
from .path_adam import PathAdam
from .path_sgd import PathSGD
from .path_soap import PathSOAP
from .rnn import ReLURNN

__version__ = "0.1.0"

__all__ = [
    "FeedForward",
    "GatedPathSGD",
    "Kappa",
    "PathAdam",
    "PathNetwork",
    "PathOptimizer",
    "PathSGD",
    "PathSOAP",
    "ReLURNN",
    "explain",
    "init",
    "kappa",
    "kappa_of_module",
    "log_path_norm",
    "path_norm",
    "rescale",
]

"""The operators: one module an op, with its schema, fake kernel and autograd; ``backend`` says which one serves."""

from .kappa2 import kappa2
from .path_chain import PathChain, path_chain
from .relu_rnn import relu_rnn

__all__ = ["PathChain", "kappa2", "path_chain", "relu_rnn"]

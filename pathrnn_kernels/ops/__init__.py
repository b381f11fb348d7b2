"""The operators: one module an op, with its schema, fake kernel and autograd; ``backend`` says which one serves."""

from .path_chain import PathChain, path_chain
from .relu_rnn import relu_rnn, working_dtype

__all__ = ["PathChain", "path_chain", "relu_rnn", "working_dtype"]

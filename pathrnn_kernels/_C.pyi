from torch import Tensor

def build_info() -> dict[str, str]: ...
def path_chain_ways(
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    bias_ih: list[Tensor],
    bias_hh: list[Tensor],
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    embedding: Tensor | None,
    seq_len: int,
    last_only: bool,
    ones_h0: bool,
    bidirectional: bool,
) -> tuple[list[int], int]: ...

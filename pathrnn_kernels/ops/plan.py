"""How a GPU runs the chains of path_chain: the plans, what each costs, and the choice among them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .backend import cuda_code

#: In the order in which ``explain`` lists them.
PLANS = {
    "block": "one thread block a chain, W̃ on chip",
    "cluster": "one thread-block cluster a chain, W̃ sliced over its shared memories",
    "grid": "up to half of the multiprocessors a chain, W̃ sliced over them, one barrier a step",
}
ENVIRONMENT = "PATHRNN_PLAN"


@dataclass(frozen=True)
class Device:
    """What the cost model knows of a GPU. The defaults are an H100's."""

    multiprocessors: int = 132
    shared_bytes: int = 227 << 10  # that one block may take
    clusters: bool = True
    code: int = 90  # the architecture that the CUDA kernels it runs were compiled for, 90 for compute_90
    cache_bytes: int = 50 << 20


@dataclass(frozen=True)
class Plan:
    """A way to run the chains, and the time that the cost model gives it."""

    name: str
    #: Thread blocks a chain; for "grid", at most.
    blocks: int
    microseconds: float

    def __str__(self) -> str:
        shape = f" ({self.blocks} blocks a chain)" if self.blocks > 1 else ""
        return f"{PLANS[self.name]}{shape}; about {self.microseconds:.3g} µs by the cost model"


# The cost model: per step the bytes of W̃ over a rate, a latency, and what every further block adds to the barrier.
# Rates and latencies are an H100's by its data sheet and by published microbenchmarks; no GPU has measured this
# package's kernels yet. bench/gpu_gate.py times every plan, so that these can be corrected by a commit that shows the
# figures.
_SHARED_RATE = 200e3  # bytes a microsecond that one multiprocessor reads from its shared memory
_CACHE_RATE = 4e6  # bytes a microsecond from the second-level cache, all multiprocessors together
_MEMORY_RATE = 2.5e6  # the same from device memory
_STEP = {"block": 0.2, "cluster": 1.0, "grid": 2.5}  # microseconds of barrier and reduction a step
_BLOCK = {"block": 0.0, "cluster": 0.05, "grid": 0.004}  # microseconds of a block's share in it
_LAUNCH = 5.0  # microseconds of a kernel of its own
_CLUSTER_CODE = 90
CLUSTER_SIZES = (2, 4, 8)  # portable; 16 would need a kernel attribute of its own
#: Largest hidden size that one Triton program holds in registers, by bytes a number.
TRITON_RESIDENT = {4: 128, 8: 64}


def describe(device: torch.device) -> Device:
    """The device of a tensor; of CPU tensors, which come by emulation or interpretation, a small H100."""
    if device.type != "cuda":
        return Device(multiprocessors=2)  # one block a chain: interpreted programs run one after another
    found = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    return Device(
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
        nvidia and found.major >= 9,
        cuda_code(device)[0] if nvidia else 0,
        found.L2_cache_size,
    )


def block_bytes(hidden: int, blocks: int, itemsize: int) -> int:
    """Shared memory of a block that keeps its slice of W̃ on chip: csrc/cuda's ``chain_shared_bytes``."""
    row = -(-hidden * itemsize // 16) * 16  # in whole loads of a thread
    return (math.ceil(hidden / blocks) + 2) * row + 80  # two rows, and the maxima of three steps


def plans(backend: str, device: Device, hidden: int, seq_len: int, itemsize: int) -> dict[str, Plan | str]:
    """For every plan, what it would cost, or why it does not serve."""
    matrix = hidden * hidden * itemsize
    result: dict[str, Plan | str] = {}

    def fits(blocks: int) -> bool:
        return block_bytes(hidden, blocks, itemsize) <= device.shared_bytes

    def stepwise(name: str, blocks: int, rate: float) -> Plan:
        step = _STEP[name] + _BLOCK[name] * blocks + matrix / rate
        return Plan(name, blocks, _LAUNCH + seq_len * step)

    def cheapest(found: Iterable[Plan]) -> Plan:
        return min(found, key=lambda plan: plan.microseconds)

    if backend == "triton":
        limit = TRITON_RESIDENT[itemsize]
        result["block"] = (
            stepwise("block", 1, _SHARED_RATE)
            if hidden <= limit
            else f"hidden_size is {hidden}; a program holds {limit}"
        )
        result["cluster"] = "Triton has no distributed shared memory; use the cuda backend"
    else:
        result["block"] = (
            stepwise("block", 1, _SHARED_RATE)
            if fits(1)
            else f"a block would take {block_bytes(hidden, 1, itemsize)} bytes of shared memory; it may have "
            f"{device.shared_bytes}"
        )
        sizes = cluster_sizes(device, hidden, itemsize)
        if not device.clusters:
            result["cluster"] = "the device has no thread-block clusters (compute capability 9.0 on)"
        elif device.code < _CLUSTER_CODE:
            result["cluster"] = (
                f"the extension's code for this device is compute_{device.code}'s, without thread-block clusters: "
                "rebuild it with TORCH_CUDA_ARCH_LIST=9.0, or the device's own, in the environment"
            )
        elif not sizes:
            result["cluster"] = (
                f"each of {CLUSTER_SIZES[-1]} blocks would take {block_bytes(hidden, CLUSTER_SIZES[-1], itemsize)} "
                f"bytes of shared memory; it may have {device.shared_bytes}"
            )
        else:
            result["cluster"] = cheapest(stepwise("cluster", n, n * _SHARED_RATE) for n in sizes)
    most = max(1, min(device.multiprocessors // 2, hidden))
    from_cache = (_CACHE_RATE if 2 * matrix <= device.cache_bytes else _MEMORY_RATE) / 2
    result["grid"] = cheapest(
        stepwise("grid", n, n * _SHARED_RATE if backend == "cuda" and fits(n) else from_cache * n / most)
        for n in sorted({*(1 << i for i in range(most.bit_length())), most})
    )
    return result


def cluster_sizes(device: Device, hidden: int, itemsize: int) -> list[int]:
    """Blocks a cluster whose shared memories together hold W̃."""
    if not device.clusters or device.code < _CLUSTER_CODE:
        return []
    return [n for n in CLUSTER_SIZES if block_bytes(hidden, n, itemsize) <= device.shared_bytes]


def check_plan(plan: str) -> tuple[str, str]:
    """The plan asked for, "auto" giving way to PATHRNN_PLAN, and its number of blocks, or "".

    Raises:
        ValueError: an unknown plan.
    """
    if plan == "auto":
        plan = os.environ.get(ENVIRONMENT, "auto")
    name, colon, count = plan.partition(":") if isinstance(plan, str) else ("", "", "")
    counted = name in ("cluster", "grid") and count.isdecimal() and int(count) > 0
    if name not in ("auto", *PLANS) or (colon and not counted):
        raise ValueError(
            f"plan is {plan!r}; use one of {', '.join(map(repr, ('auto', *PLANS)))}, or 'grid:4' or 'cluster:4' for "
            "that many blocks a chain"
        )
    return name, count


def choose(backend: str, device: Device, hidden: int, seq_len: int, itemsize: int, plan: str = "auto") -> Plan:
    """The cheapest plan, or the one asked for: "grid", or "grid:4" for that many blocks a chain.

    Raises:
        ValueError: an unknown plan, or one that does not serve, with every reason.
    """
    name, count = check_plan(plan)
    found = plans(backend, device, hidden, seq_len, itemsize)
    if name == "auto":
        return min((p for p in found.values() if isinstance(p, Plan)), key=lambda p: p.microseconds)
    wanted = found[name]
    if name == "cluster" and count and int(count) not in cluster_sizes(device, hidden, itemsize):
        wanted = wanted if isinstance(wanted, str) else _refusal_of_size(device, hidden, itemsize, int(count))
    if isinstance(wanted, str):
        others = "; ".join(f"{k}: {v if isinstance(v, str) else 'would serve'}" for k, v in found.items() if k != name)
        raise ValueError(f"plan {name!r} does not serve this call on backend {backend!r}: {wanted} ({others})")
    return Plan(name, int(count), wanted.microseconds) if count else wanted


def _refusal_of_size(device: Device, hidden: int, itemsize: int, blocks: int) -> str:
    sizes = ", ".join(map(str, cluster_sizes(device, hidden, itemsize)))
    return (
        f"clusters have {', '.join(map(str, CLUSTER_SIZES))} blocks, and each of {blocks} would take "
        f"{block_bytes(hidden, blocks, itemsize)} bytes of shared memory of {device.shared_bytes}; use {sizes}"
    )

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
    "block": "one thread block a chain, W̃ in its registers",
    "cluster": "one thread-block cluster a chain, W̃ sliced over the registers of its blocks",
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


# The cost model: the time of a step is what its warps issue and what nothing hides of its latencies; a barrier between
# blocks; and in plan "grid" bytes of W̃ over a rate. Instructions are counted in the machine code (bench/NOTES.md),
# rates and latencies are an H100's by its data sheet and by published microbenchmarks; no GPU has measured this
# package's kernels yet. bench/gpu_gate.py times every plan, so that these can be corrected by a commit that shows the
# figures.
_CLOCK = 1755  # cycles a microsecond
_SCHEDULERS = 4  # of a multiprocessor: a warp of each issues an instruction a cycle
_SHUFFLE = 28  # cycles of a shuffle and an addition
_LATENCY = 60  # cycles of a row's way through shared memory, and of the block's barrier
_SHARED_RATE = 200e3  # bytes a microsecond that one multiprocessor reads from its shared memory
_CACHE_RATE = 4e6  # bytes a microsecond from the second-level cache, all multiprocessors together
_MEMORY_RATE = 2.5e6  # the same from device memory
_STEP = {"block": 0.2, "grid": 2.5}  # microseconds of barrier and reduction a step; "block" of Triton's
_CLUSTER_BARRIER = 0.25  # microseconds
_BLOCK = {"block": 0.0, "cluster": 0.02, "grid": 0.004}  # microseconds of a block's share in a barrier
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


@dataclass(frozen=True)
class Layout:
    """How W̃ lies in the registers of a warp, and of how many rows of a block: csrc/cuda's ``Layout``."""

    lanes: int
    rows: int
    columns: int
    most_rows: int
    #: Instructions a warp and step beside the products.
    others: int

    def microseconds(self, rows: int, itemsize: int) -> float:
        """Of a step of a block with so many rows, without the barrier between blocks."""
        warps = math.ceil(rows / (32 // self.lanes * self.rows))
        products = self.rows * self.columns * itemsize // 4  # float64 has half the rate
        issued = math.ceil(warps / _SCHEDULERS) * (products + self.others)
        return (issued + _LATENCY + _SHUFFLE * math.log2(self.lanes)) / _CLOCK


#: By plan and bytes a number, in the order in which csrc/cuda/chains.cu tries them. They take less than the 48 KiB of
#: shared memory that every GPU has.
LAYOUTS = {
    ("block", 4): (
        Layout(8, 8, 8, 64, 72),
        Layout(8, 8, 13, 104, 76),
        Layout(8, 8, 16, 128, 75),
        Layout(16, 16, 13, 208, 104),
    ),
    ("block", 8): (Layout(16, 8, 4, 64, 108), Layout(16, 8, 7, 112, 112)),
    ("cluster", 4): (Layout(32, 8, 8, 120, 185), Layout(32, 8, 16, 64, 193)),
    ("cluster", 8): (Layout(32, 8, 8, 56, 242),),
}


def layout(plan: str, hidden: int, blocks: int, itemsize: int) -> Layout | None:
    """The first that holds W̃ in the registers of ``blocks`` blocks, if there is one."""
    rows = math.ceil(hidden / blocks)
    fitting = (x for x in LAYOUTS[plan, itemsize] if hidden <= x.lanes * x.columns and rows <= x.most_rows)
    return next(fitting, None)


def grid_bytes(hidden: int, rows: int, itemsize: int) -> int:
    """Shared memory of a block that keeps so many rows of W̃ there: csrc/cuda's ``grid_shared_bytes``."""
    row = -(-hidden * itemsize // 16) * 16  # in whole loads of a thread
    return (rows + 2) * row + 80  # two rows, and the maxima of three steps


def plans(backend: str, device: Device, hidden: int, seq_len: int, itemsize: int) -> dict[str, Plan | str]:
    """For every plan, what it would cost, or why it does not serve."""
    result: dict[str, Plan | str] = {}
    matrix = hidden * hidden * itemsize

    def in_registers(name: str, blocks: int, barrier: float) -> Plan | None:
        found = layout(name, hidden, blocks, itemsize)
        if found is None:
            return None
        step = found.microseconds(math.ceil(hidden / blocks), itemsize) + barrier + _BLOCK[name] * blocks
        return Plan(name, blocks, _LAUNCH + seq_len * step)

    def cheapest(found: Iterable[Plan]) -> Plan:
        return min(found, key=lambda plan: plan.microseconds)

    most = max(1, min(device.multiprocessors // 2, hidden))
    from_cache = (_CACHE_RATE if 2 * matrix <= device.cache_bytes else _MEMORY_RATE) / 2

    def on_grid(blocks: int) -> Plan:
        rows = math.ceil(hidden / blocks)
        none, all_rows = (grid_bytes(hidden, n, itemsize) for n in (0, rows))
        held = (device.shared_bytes - none) / (all_rows - none)
        resident = min(1.0, max(0.0, held)) if backend == "cuda" else 0.0
        reads = resident * matrix / (blocks * _SHARED_RATE) + (1 - resident) * matrix * most / (blocks * from_cache)
        return Plan("grid", blocks, _LAUNCH + seq_len * (_STEP["grid"] + _BLOCK["grid"] * blocks + reads))

    if backend == "triton":
        limit = TRITON_RESIDENT[itemsize]
        result["block"] = (
            Plan("block", 1, _LAUNCH + seq_len * (_STEP["block"] + matrix / _SHARED_RATE))
            if hidden <= limit
            else f"hidden_size is {hidden}; a program holds {limit}"
        )
        result["cluster"] = "Triton has no distributed shared memory; use the cuda backend"
    else:
        widest = {name: LAYOUTS[name, itemsize][-1] for name in ("block", "cluster")}
        result["block"] = in_registers("block", 1, 0.0) or (
            f"hidden_size is {hidden}; the registers of a block hold W̃ up to {widest['block'].most_rows}"
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
            limit = min(
                widest["cluster"].lanes * widest["cluster"].columns, CLUSTER_SIZES[-1] * widest["cluster"].most_rows
            )
            result["cluster"] = (
                f"hidden_size is {hidden}; the registers of {CLUSTER_SIZES[-1]} blocks hold W̃ up to {limit}"
            )
        else:
            found = (in_registers("cluster", n, _CLUSTER_BARRIER) for n in sizes)
            result["cluster"] = cheapest(plan for plan in found if plan is not None)
    result["grid"] = cheapest(on_grid(n) for n in sorted({*(1 << i for i in range(most.bit_length())), most}))
    return result


def cluster_sizes(device: Device, hidden: int, itemsize: int) -> list[int]:
    """Blocks a cluster whose registers together hold W̃."""
    if not device.clusters or device.code < _CLUSTER_CODE:
        return []
    return [n for n in CLUSTER_SIZES if layout("cluster", hidden, n, itemsize) is not None]


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
        f"clusters have {', '.join(map(str, CLUSTER_SIZES))} blocks, and {math.ceil(hidden / blocks)} rows of {hidden} "
        f"units do not fit into the registers of each of {blocks}; use {sizes}"
    )

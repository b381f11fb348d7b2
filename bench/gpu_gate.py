"""Proves and times everything on the GPU at hand: `python bench/gpu_gate.py proof`, then `… figures`.

`proof`, eight minutes at most: what machine this is; the tests marked gpu, four minutes; compute-sanitizer on small
sizes, as long as is left. `figures`, six minutes at most: the card's ceilings; κ, ReLURNN and whole training steps
against what a user would otherwise run; every kernel; the goals beside what was measured. No figure is given for code
that disagrees with its oracle. What is missing, and what no time was left for, is skipped with a reason. One JSON and
one Markdown file a run, named by device, half and date, are written anew after every part, so that a run that is cut
off leaves what it found. No setting of the card is changed.

The GPU is touched by children alone. One does part after part of the figures and writes down each; after a part that
spoils the device for the process (an illegal address), takes too long or kills it, another goes on with the next.

Times are medians of turns with CUDA events around them, the contenders of a row taking turns: bench/measure.py.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # heeded when triton is first imported

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: an installed pathrnn_kernels goes before the tree's

import pathrnn_kernels as pk  # noqa: E402
from bench import measure  # noqa: E402
from bench.baselines import paper_kappa1, paper_kappa2  # noqa: E402
from bench.measure import Row, Run, Skip, commit, output_of, quartiles, working  # noqa: E402
from bench.rows import assert_close, forward_backward, recurrent, rounding  # noqa: E402
from pathrnn_kernels import _C  # noqa: E402
from pathrnn_kernels.ops.backend import refusals  # noqa: E402
from pathrnn_kernels.ops.plan import Plan, choose, describe, plans  # noqa: E402

F32, F64 = torch.float32, torch.float64


#: Seconds for one part of the figures, compilation included.
PART_LIMIT = 90.0
#: Exit status of a child whose device is no use any more.
SPOILED = 87


class Gate:
    """The results so far, the time that is left, and the files that both end up in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cpu: bool = options.cpu
        self.started = time.monotonic()
        self.limit = 60.0 * options.minutes
        name = "cpu" if self.cpu else output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0")
        stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M")
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.path = Path(options.out) / f"gpu-gate-{slug}-{options.half}-{stamp}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.result: dict[str, Any] = {"device": name, "date": stamp, "complete": False, "skipped": {}, "rows": []}

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.started)

    def part(self, name: str, run: Callable[[], Any]) -> None:
        """One part that this process does: its result under its name, or the reason why there is none."""
        self.note(attempt(name, run if self.left() > 0 else self.too_late))

    def too_late(self) -> None:
        raise Skip(f"the limit of {self.limit / 60:g} minutes was reached")

    def note(self, entry: dict[str, Any]) -> None:
        name, found = entry["name"], entry.get("found")
        if "row" in entry:
            self.result["rows"].append(with_rates(entry["row"], self.result.get("ceilings", {})))
        elif found is not None:
            self.result[name] = found
        if "failed" in entry:
            self.result.setdefault("failed", {}).update(entry["failed"])
        for kind, key in (("skipped", "skipped"), ("errors", "traceback")):
            if key in entry:
                self.result.setdefault(kind, {})[name] = entry[key]
        verdict = str(entry.get("skipped", "done")).splitlines()[0]
        print(f"{name:<56} {entry['seconds']:6.1f} s  {verdict[:160]}", flush=True)
        self.write()

    def children(self, names: Sequence[str]) -> None:
        """Parts by children, one after the other as long as each lives."""
        left = list(names)
        while left:
            if self.left() <= 0:
                for name in left:
                    self.part(name, self.too_late)
                return
            with tempfile.TemporaryDirectory() as folder:
                notes, log = Path(folder) / "notes", Path(folder) / "log"
                notes.touch()
                command = [sys.executable, str(Path(__file__).resolve()), self.options.half, "--notes", str(notes)]
                command += ["--seconds", str(self.options.seconds), *(["--cpu"] if self.cpu else []), "--parts", *left]
                with log.open("w") as out:
                    child = subprocess.Popen(command, env=child_environment(), stdout=out, stderr=out, text=True)
                since, read, late = time.monotonic(), 0, False
                while True:
                    ended = child.poll() is not None
                    lines = notes.read_text(encoding="utf-8").splitlines(keepends=True)
                    for line in lines[read:]:
                        if not line.endswith("\n"):
                            break
                        self.note(json.loads(line))
                        left.remove(json.loads(line)["name"])
                        since, read = time.monotonic(), read + 1
                    if ended:
                        break
                    if time.monotonic() - since > PART_LIMIT or self.left() <= 0:
                        late = True
                        child.kill()
                        child.wait()
                    time.sleep(0.05)
                if left and child.returncode != SPOILED:
                    why = f"took longer than {PART_LIMIT:g} s" if late else f"the process ended with {child.returncode}"
                    if self.left() > 0 or not late:
                        text = log.read_text(errors="replace")[-2000:]
                        entry = {"name": left.pop(0), "seconds": time.monotonic() - since, "skipped": why}
                        self.note(entry | ({} if late else {"traceback": text}))

    def write(self) -> None:
        self.result["minutes"] = round((time.monotonic() - self.started) / 60, 2)
        for suffix, text in ((".json", json.dumps(self.result, indent=1)), (".md", markdown(self.result))):
            scratch = self.path.with_name(self.path.name + suffix + ".part")
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(self.path.with_name(self.path.name + suffix))


def attempt(name: str, run: Callable[[], Any]) -> dict[str, Any]:
    """What a part found, or why it did not, as one entry of the notes."""
    start, entry = time.monotonic(), {"name": name}
    try:
        found = run()
        entry |= found if isinstance(found, dict) and ("row" in found or "failed" in found) else {"found": found}
    except Skip as reason:
        entry["skipped"] = str(reason)
    except Exception as error:
        entry |= {"skipped": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return entry | {"seconds": time.monotonic() - start}


def with_rates(row: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    for rate, ceiling, share in (("GB/s", "copy GB/s", "of copy"), ("GFLOP/s", "fp32 GFLOP/s", "of fp32")):
        if rate in row and ceiling in ceilings:
            row[share] = row[rate] / ceilings[ceiling]
    return row


class Child:
    """One of the processes that do the figures."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device("cpu" if options.cpu else "cuda")
        self.cpu: bool = options.cpu
        self.seconds: float = options.seconds

    def run(self, names: Sequence[str], notes: Path) -> int:
        parts = {"environment": lambda: environment(self), "ceilings": lambda: ceilings(self), **benchmarks(self)}
        for name in names:
            entry = attempt(name, parts[name])
            spoiled = self.spoiled()
            with notes.open("a", encoding="utf-8") as out:
                out.write(json.dumps(entry) + "\n")
            if spoiled:
                return SPOILED
        return 0

    def spoiled(self) -> bool:
        """Whether the device answers this process no more."""
        if self.cpu:
            return False
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return int(torch.ones(2, device=self.device).sum()) != 2
        except RuntimeError:
            return True


# ---- the machine -----------------------------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, from PATH or CUDA_HOME."""
    homes = [os.environ.get(key, "") for key in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [str(Path(home) / part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


NVIDIA_SMI = (
    "name,driver_version,vbios_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,"
    "temperature.gpu,mig.mode.current"
)


def environment(gate: Child) -> dict[str, str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    nvcc = tool("nvcc")
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton_version,
        "nvcc": output_of(nvcc, "--version").splitlines()[-1] if nvcc else "not found",
        "commit": commit(),
        "processor": f"{platform.machine()}, {os.cpu_count()} threads",
        "backends": "; ".join(f"{k}: {v or 'serves'}" for k, v in refusals(gate.device, F32).items()),
    }
    found |= {f"extension: {key}": value for key, value in _C.build_info().items()}
    if not gate.cpu:
        card = torch.cuda.get_device_properties(0)
        found["card"] = (
            f"{card.name}, compute capability {card.major}.{card.minor}, {card.multi_processor_count} multiprocessors, "
            f"{card.total_memory >> 30} GiB, of {torch.cuda.device_count()}"
        )
        smi = output_of("nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader", "--id=0")
        found["nvidia-smi"] = f"{NVIDIA_SMI}: {smi}"
    return found


def backends(gate: Child) -> list[str]:
    return [name for name in ("cuda", "triton") if refusals(gate.device, F32)[name] is None]


# ---- tests and sanitizers --------------------------------------------------------------------------------------------


def child_environment(**more: str) -> dict[str, str]:
    """The same package for a child that runs elsewhere: in the source tree it would take the tree's."""
    return os.environ | {"PYTHONPATH": str(Path(pk.__file__).parents[1])} | more


def stop(process: subprocess.Popen[str], seconds: float) -> bool:
    """Waits; whether the process had to be stopped, first politely, so that it writes down what it has."""
    try:
        process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return True
    return False


def run_tests(gate: Gate, limit: float) -> dict[str, Any]:
    """All files at once: most of their time is compilation on the host."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "reasons": {}, "cut off": []}
    with tempfile.TemporaryDirectory() as folder:
        extra = ["-k", "refused or mixed or routed"] if gate.cpu else []
        more = {"PATHRNN_GPU_TESTS_ON_CPU": "1"} if gate.cpu else {}
        children = []
        for file in files:
            xml, log = (Path(folder) / f"{file.stem}.{kind}" for kind in ("xml", "log"))
            # Warnings of new versions of torch are no reason to call a kernel wrong.
            command = [sys.executable, "-m", "pytest", str(file), "-q", "-m", "gpu", "-W", "default", *extra]
            command += [f"--junitxml={xml}", "-p", "no:cacheprovider"]
            with log.open("w") as out:
                child = subprocess.Popen(
                    command, cwd=folder, env=child_environment(**more), stdout=out, stderr=out, text=True
                )
            children.append((file.stem, child, xml, log))
        end = time.monotonic() + min(limit, gate.left() - 30)
        for name, child, xml, log in children:
            if stop(child, end - time.monotonic()):
                counts["cut off"].append(name)
            if not xml.exists():
                counts["failures"].append([name, f"no results: {log.read_text()[-2000:]}"])
                counts["failed"] += 1
                continue
            for case in ElementTree.parse(xml).getroot().iter("testcase"):
                label = f"{name}::{case.get('name')}"
                for kind in ("failure", "error"):
                    if (found := case.find(kind)) is not None:
                        counts["failed"] += 1
                        counts["failures"].append([label, (found.text or found.get("message") or "")[-3000:]])
                        break
                else:
                    if (found := case.find("skipped")) is not None:
                        counts["skipped"] += 1
                        reason = found.get("message") or ""
                        counts["reasons"][reason] = counts["reasons"].get(reason, 0) + 1
                    else:
                        counts["passed"] += 1
    return counts


def workload(backend: str) -> None:
    """Every kernel of a backend once or twice on small sizes: what compute-sanitizer watches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ["PATHRNN_BACKEND"] = backend
    for hidden, dtype in ((5, F32), (67, F64)):
        net = small_network(device, hidden, dtype)
        for plan, found in plans(backend, describe(device), hidden, 4, dtype.itemsize).items():
            if isinstance(found, Plan):
                pk.kappa(net, 4, backend=backend, plan=plan)
        pk.kappa(net, 13, second_term=True, backend=backend)
        optimizer = pk.PathSGD(net, lr=1e-3, scale="path_norm", trust_radius=1e-3)
        x = torch.ones(4, 3, net.rnn.input_size, device=device, dtype=dtype)
        net(x).square().sum().backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def small_network(device: torch.device, hidden: int, dtype: torch.dtype) -> pk.PathNetwork:
    return pk.PathNetwork(pk.ReLURNN(3, hidden, 2, dtype=dtype), nn.Linear(hidden, 2, dtype=dtype)).to(device)


TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": [],
    # torch's own kernels read padding that nobody wrote; CUDA's are told apart by their namespace.
    "initcheck": ["--kernel-regex", "kns=pathrnn"],
}


def sanitize(gate: Gate, limit: float) -> dict[str, Any]:
    sanitizer = tool("compute-sanitizer")
    if gate.cpu:
        raise Skip("needs a GPU")
    if sanitizer is None:
        raise Skip("compute-sanitizer is neither in PATH nor in CUDA_HOME")
    children = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in TOOLS.items():
            for backend in ("cuda", "triton"):
                # Triton compiles for long under a sanitizer; its kernels share no memory that racecheck would watch.
                if name != "memcheck" and backend != "cuda":
                    continue
                log = Path(folder) / f"{name}-{backend}.log"
                command = [sanitizer, "--tool", name, "--error-exitcode", "86", "--print-limit", "5", *arguments]
                command += [sys.executable, str(Path(__file__).resolve()), "proof", "--workload", backend]
                with log.open("w") as out:
                    child = subprocess.Popen(
                        command,
                        cwd=folder,
                        # One allocation a tensor: else an access beyond one lies within another.
                        env=child_environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
                        stdout=out,
                        stderr=out,
                        text=True,
                    )
                children.append((f"{name}, {backend}", child, log))
        end = time.monotonic() + min(limit, gate.left() - 30)
        found: dict[str, Any] = {}
        for name, child, log in children:
            cut = stop(child, end - time.monotonic())
            text = log.read_text(errors="replace")
            summary = re.findall(r"(?:ERROR|RACECHECK|LEAK) SUMMARY:.*", text)
            verdict = "cut off" if cut else "clean" if child.returncode == 0 else "errors"
            found[name] = {"verdict": verdict, "summary": summary, "log": "" if verdict == "clean" else text[-4000:]}
    return found


# ---- timing ----------------------------------------------------------------------------------------------------------


def bench(gate: Child, row: Callable[[], Row]) -> dict[str, Any]:
    """Build, check and time a row."""
    torch.manual_seed(0)
    built = row()
    failed: dict[str, str] = {}
    ours, baselines = (working(runs, failed) for runs in (built.ours, built.baselines))
    for name in list(ours):
        try:
            built.check(name)
        except AssertionError as error:
            failed[name] = f"DISAGREES with its oracle, so no figure: {str(error)[:300]}"
            del ours[name]
    failures = {"failed": {built.label: failed}} if failed else {}
    if not ours:
        if failed:
            return failures
        raise Skip("no backend serves")
    found_times = measure.measure({**ours, **baselines}, gate.seconds, gate.device)
    times = {name: quartiles(values) for name, values in found_times.items()}
    best = min(ours, key=lambda n: times[n][0])
    found: dict[str, Any] = {"label": built.label, "milliseconds": times, "ours": list(ours), "best": best}
    found["ratios"] = {n: times[n][0] / times[best][0] for n in baselines}
    if built.bytes:
        found["GB/s"] = built.bytes / times[best][0] / 1e6
    if built.flops:
        found["GFLOP/s"] = built.flops / times[best][0] / 1e6
    return {"row": found, **failures}


def ceilings(gate: Child) -> dict[str, float]:
    """What the card gives: a product of float32 without TF32, its memory, and a launch."""
    small = torch.ones(4, device=gate.device)
    launch = measure.measure({"launch": lambda: small.add_(1)}, 0.5, gate.device)["launch"]
    return {**measure.ceilings(gate.device, 2.0, tiny=gate.cpu), "launch µs": min(launch) * 1e3}


# ---- rows ------------------------------------------------------------------------------------------------------------


def contenders(gate: Child, hidden: int, seq_len: int) -> list[tuple[str, str]]:
    """Every backend with every plan that serves. Interpreted, the programs of a grid cannot wait for each other."""
    return [
        (backend, "grid:1" if gate.cpu and plan == "grid" else plan)
        for backend in backends(gate)
        for plan, found in plans(backend, describe(gate.device), hidden, seq_len, 4).items()
        if isinstance(found, Plan)
    ]


def check_kappa(net: pk.PathNetwork, seq_len: int, runs: dict[str, Run], second_term: bool) -> Callable[[str], None]:
    """Against the CPU's kernels in float64."""
    exact = pk.kappa(copy.deepcopy(net).cpu().double(), seq_len, second_term, rtol=1e-9, backend="cpu")

    def check(name: str) -> None:
        found = cast(pk.Kappa, runs[name]())
        for parameter, truth in exact.factors.items():
            steps = round((found.log_scales[parameter] - exact.log_scales[parameter]) / math.log(2))
            factor = torch.ldexp(found.factors[parameter].double().cpu(), torch.tensor(steps)).expand(truth.shape)
            assert_close(factor, truth, rounding(seq_len, net.hidden_size) + found.bound + exact.bound)

    return check


def row_kappa1(gate: Child, hidden: int, seq_len: int, compiled: bool) -> Row:
    net = recurrent(hidden, "Gaussian").to(gate.device)
    kinds = contenders(gate, hidden, seq_len)
    ours: dict[str, Run] = {
        f"{backend} {plan}": functools.partial(pk.kappa, net, seq_len, backend=backend, plan=plan)
        for backend, plan in kinds
    }
    ours["auto"] = functools.partial(pk.kappa, net, seq_len)  # what a user gets
    eager = paper_kappa1(net, seq_len)
    baselines: dict[str, Run] = {"eager autograd": eager}
    if compiled:
        baselines["torch.compile"] = torch.compile(eager)

    # Both chains read W̃ every step; κ is two vectors' outer products over the steps, and is written.
    matrix = hidden * hidden
    return Row(
        f"κ⁽¹⁾ H={hidden} T={seq_len}",
        ours,
        baselines,
        check_kappa(net, seq_len, ours, False),
        bytes=4.0 * (3 * matrix + 4 * seq_len * hidden),
        flops=6.0 * seq_len * matrix,
    )


def row_kappa2(gate: Child, hidden: int, seq_len: int, kind: str) -> Row:
    net = recurrent(hidden, kind).to(gate.device)
    ours: dict[str, Run] = {}
    baselines: dict[str, Run] = {}
    for backend in backends(gate):
        ours[f"{backend} κ⁽¹⁾+κ⁽²⁾"] = functools.partial(pk.kappa, net, seq_len, True, backend=backend)
        baselines[f"{backend} κ⁽¹⁾ alone"] = functools.partial(pk.kappa, net, seq_len, backend=backend)
    baselines["paper's sum"] = paper_kappa2(net, seq_len)

    check = check_kappa(net, seq_len, ours, True)
    return Row(f"κ⁽¹⁾+κ⁽²⁾ H={hidden} T={seq_len} {kind}", ours, baselines, check)


def row_rnn(gate: Child, batch: int, seq_len: int, hidden: int, input_size: int, compiled: bool = False) -> Row:
    theirs = nn.RNN(input_size, hidden, nonlinearity="relu", device=gate.device)
    ours = pk.ReLURNN.from_torch(theirs)
    x = torch.randn(seq_len, batch, input_size, device=gate.device)
    weight = torch.randn(seq_len, batch, hidden, device=gate.device)
    runs: dict[str, Run] = {"ReLURNN": lambda: forward_backward(ours, x, weight)}
    if compiled:
        traced = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager" if gate.cpu else "inductor")
        runs["ReLURNN compiled"] = lambda: forward_backward(traced, x, weight)
    from pathrnn_kernels.ops.triton.relu_rnn import limit

    if "triton" in backends(gate) and hidden <= limit(F32):

        def triton() -> object:
            os.environ["PATHRNN_BACKEND"] = "triton"
            try:
                return forward_backward(ours, x, weight)
            finally:
                del os.environ["PATHRNN_BACKEND"]

        runs["Triton"] = triton

    def check(name: str) -> None:
        # In float64: in float32 rounding moves a pre-activation across zero now and then, and gradients differ. The
        # compiled module and the Triton kernel are covered by the tests.
        if name != "ReLURNN":
            return
        exact = [
            forward_backward(copy.deepcopy(module).double(), x.double(), weight.double()) for module in (ours, theirs)
        ]
        for a, b in zip(*exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())

    flops = 6.0 * seq_len * batch * hidden * (hidden + input_size)
    label = f"ReLURNN forward+backward B={batch} T={seq_len} H={hidden} I={input_size}"
    return Row(label, runs, {"nn.RNN": lambda: forward_backward(theirs, x, weight)}, check, flops=flops)


def row_step(gate: Child, batch: int, seq_len: int, hidden: int, second_term: bool) -> Row:
    """A training step whose κ is computed, against the same with κ from the cache: the difference is κ's share."""

    def stepper(make: Callable[[pk.PathNetwork], torch.optim.Optimizer]) -> Run:
        torch.manual_seed(0)
        net = recurrent(hidden, "Gaussian").to(gate.device)
        net.outputs = "last"
        with torch.no_grad():
            net.weights()["rnn.weight_hh_l0"].mul_(0.7)  # the forward pass must not grow
        optimizer = make(net)
        x, target = torch.rand(seq_len, batch, 2, device=gate.device), torch.rand(batch, 10, device=gate.device)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), target).backward()
            optimizer.step()

        return step

    def path(update_every: int) -> Callable[[pk.PathNetwork], torch.optim.Optimizer]:
        return lambda net: pk.PathSGD(
            net, lr=1e-12, scale="path_norm", second_term=second_term, update_every=update_every
        )

    baselines: dict[str, Run] = {
        "PathSGD, κ cached": stepper(path(1 << 30)),
        "SGD": stepper(lambda net: torch.optim.SGD(net.parameters(), lr=1e-12)),
    }
    term = "κ⁽¹⁾+κ⁽²⁾" if second_term else "κ⁽¹⁾"
    return Row(f"step with {term} B={batch} T={seq_len} H={hidden}", {"PathSGD": stepper(path(1))}, baselines)


def rows_of_kernels(gate: Child, hidden: int, seq_len: int) -> dict[str, Callable[[], Row]]:
    """The kernels of path_chain one by one, each against the plainest torch that does its work."""
    from pathrnn_kernels.ops.path_chain import _kernels

    modules = {name: _kernels(name) for name in backends(gate)}
    w = torch.randn(hidden, hidden, device=gate.device) / hidden**0.5
    top = w.abs().max().reshape(1)
    rows = torch.rand(seq_len, hidden, device=gate.device) + 0.5
    zeros = torch.zeros(seq_len, dtype=torch.int64, device=gate.device)
    lost = torch.zeros(1, dtype=torch.bool, device=gate.device)
    one = (rows[:1], zeros[:1])
    matrix, sequence = 4.0 * hidden * hidden, 4.0 * hidden * seq_len
    size = f"H={hidden} T={seq_len}"

    def kernel(
        name: str,
        what: str,
        call: Sequence[object],
        plain: Run,
        moved: float,
        flops: float,
        truth: Callable[[], Tensor],
        depth: int,
    ) -> Callable[[], Row]:
        def build() -> Row:
            runs: dict[str, Run] = {b: functools.partial(getattr(m, name), *call) for b, m in modules.items()}

            def check(name: str) -> None:
                data, exponent, *_ = cast(Any, runs[name]())
                scale = exponent.double().reshape(-1, *[1] * (data.dim() - 1))
                assert_close(data.double() * torch.exp2(scale), truth(), rounding(depth, 1))

            return Row(f"{name}{what} {size}", runs, {"plain torch": plain}, check, moved, flops)

        return build

    def chains() -> Row:
        runs: dict[str, Run] = {}
        for backend, plan in contenders(gate, hidden, seq_len):
            chosen = choose(backend, describe(gate.device), hidden, seq_len, 4, plan)
            call = (w, top, *one, w, top, *one, seq_len, False, False, chosen.name, chosen.blocks, lost)
            runs[f"{backend} {plan}"] = functools.partial(modules[backend].chains, *call)
        squared = w.square()

        def plain() -> object:
            h, d = [rows[0]], [rows[0]]
            for _ in range(seq_len - 1):
                h.append(rows[0] + squared @ h[-1])
                d.append(rows[0] + squared.T @ d[-1])
            return h, d

        def check(name: str) -> None:
            exact, h = w.cpu().double().square(), rows[0].cpu().double()
            for _ in range(seq_len - 1):
                h = rows[0].cpu().double() + exact @ h
            found, exponents, *_ = cast(Any, runs[name]())
            assert_close(found[-1].double() * torch.exp2(exponents[-1].double()), h, rounding(seq_len, hidden))

        # Every step reads W̃ twice, from registers, shared memory or cache: no bytes of device memory are counted.
        return Row(f"chains {size}", runs, {"plain torch": plain}, check, flops=4.0 * seq_len * hidden * hidden)

    return {
        "column_sums": kernel(
            "column_sums",
            "",
            (w, top, lost),
            lambda: w.square().sum(0),
            matrix,
            0,
            lambda: w.double().square().sum(0),
            hidden,
        ),
        "ends": kernel(
            "ends",
            "",
            (w, [], [], w, None, None, None, 1, top.repeat(3), lost),
            lambda: (w.square().sum(1), w.square().sum(0)),
            2 * matrix,
            0,
            lambda: w.double().square().sum(1)[None],
            hidden,
        ),
        "chains": chains,
        "row_sums": kernel(
            "row_sums",
            "",
            (rows, zeros, None, None, lost),
            lambda: rows.sum(0),
            sequence,
            0,
            lambda: rows.double().sum(0),
            seq_len,
        ),
        "pair_sums": kernel(
            "pair_sums",
            "",
            (rows, zeros, rows, zeros, lost),
            lambda: rows.T @ rows,
            2 * sequence + matrix,
            2.0 * seq_len * hidden * hidden,
            lambda: rows.double().T @ rows.double(),
            seq_len,
        ),
    }


def benchmarks(gate: Child) -> dict[str, Callable[[], dict[str, Any]]]:
    """The rows with a goal first."""
    rows: dict[str, Callable[[], Row]] = {}
    steps = ((2, 4, 8),) if gate.cpu else ((16, 784, 100), (32, 20, 200), (100, 50, 2048))
    for hidden, seq_len in ((8, 4),) if gate.cpu else ((100, 784), (200, 20), (2048, 50)):
        rows[f"κ⁽¹⁾ H={hidden} T={seq_len}"] = functools.partial(row_kappa1, gate, hidden, seq_len, seq_len == 20)
    for batch, seq_len, hidden in steps:
        size, compiled = f"B={batch} T={seq_len} H={hidden}", hidden == 200 or gate.cpu
        input_size = 1 if hidden < 2000 else 50
        rows[f"ReLURNN {size}"] = functools.partial(row_rnn, gate, batch, seq_len, hidden, input_size, compiled)
        for second_term in (False, True):
            name = f"step {'κ⁽¹⁾+κ⁽²⁾' if second_term else 'κ⁽¹⁾'} {size}"
            rows[name] = functools.partial(row_step, gate, batch, seq_len, hidden, second_term)
    for hidden, seq_len in ((8, 4),) if gate.cpu else ((100, 784), (512, 100)):
        for kind in ("Gaussian", "nn.RNN", "I+0.02N"):
            rows[f"κ⁽²⁾ H={hidden} {kind}"] = functools.partial(row_kappa2, gate, hidden, seq_len, kind)
    for hidden, seq_len in ((8, 4),) if gate.cpu else ((100, 784), (2048, 50)):
        for name in KERNELS:
            row = functools.partial(row_kernel, gate, name, hidden, seq_len)
            rows[f"{name} H={hidden} T={seq_len}"] = row
    return {name: functools.partial(bench, gate, row) for name, row in rows.items()}


KERNELS = ("column_sums", "ends", "chains", "row_sums", "pair_sums")


def row_kernel(gate: Child, name: str, hidden: int, seq_len: int) -> Row:
    return rows_of_kernels(gate, hidden, seq_len)[name]()


# ---- goals and files -------------------------------------------------------------------------------------------------


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The issue's goals for an H100 beside what was measured."""
    rows = {row["label"]: row for row in result["rows"]}
    found = []

    def goal(text: str, label: str, measured: Callable[[dict[str, Any]], float], met: Callable[[float], bool]) -> None:
        row = rows.get(label)
        value = None if row is None else measured(row)
        verdict = "not measured" if value is None else "met" if met(value) else "missed"
        found.append({"goal": text, "row": label, "measured": value, "verdict": verdict})

    def ratio(baseline: str, ours: str) -> Callable[[dict[str, Any]], float]:
        return lambda row: row["milliseconds"][baseline][0] / row["milliseconds"][ours][0]

    def share(row: dict[str, Any]) -> float:
        times = {name: entry[0] for name, entry in row["milliseconds"].items()}
        return (times["PathSGD"] - times["PathSGD, κ cached"]) / times["SGD"]

    for row in result["rows"]:
        if row["label"].startswith("ReLURNN"):
            text = "ReLURNN never slower than nn.RNN (ratio at least 1)"
            goal(text, row["label"], ratio("nn.RNN", "ReLURNN"), lambda v: v >= 1)
    goal(
        "κ⁽¹⁾ at least 100x eager autograd",
        "κ⁽¹⁾ H=100 T=784",
        ratio("eager autograd", "auto"),
        lambda v: v >= 100,
    )
    for size in ("B=16 T=784 H=100", "B=32 T=20 H=200", "B=100 T=50 H=2048"):
        goal("κ⁽¹⁾ at most 2 % of a step", f"step with κ⁽¹⁾ {size}", share, lambda v: v <= 0.02)
        goal("κ⁽¹⁾+κ⁽²⁾ at most 10 % of a step", f"step with κ⁽¹⁾+κ⁽²⁾ {size}", share, lambda v: v <= 0.1)
    return found


def markdown(result: dict[str, Any]) -> str:
    lines = [f"# GPU gate: {result['device']}, {result['date']}", ""]
    if not result["complete"]:
        lines += ["**This run did not finish.**", ""]
    lines += [f"{result['minutes']} minutes. Written by `python bench/gpu_gate.py`.", ""]
    if "environment" in result:
        lines += ["## Machine", "", *(f"- {key}: {value}" for key, value in result["environment"].items()), ""]
    if "tests" in result:
        tests = result["tests"]
        lines += ["## Tests", "", f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped."]
        lines += [f"- cut off by the time limit: {name}" for name in tests["cut off"]]
        lines += [f"- skipped {count}: {reason}" for reason, count in tests["reasons"].items()]
        lines += [
            f"- FAILED {name}: `{text.strip().splitlines()[-1][:300]}`"
            for name, text in tests["failures"]
            if text.strip()
        ]
        lines += [""]
    if "sanitizers" in result:
        lines += ["## compute-sanitizer", ""]
        for name, entry in result["sanitizers"].items():
            lines.append(f"- {name}: {entry['verdict']} {' '.join(entry['summary'])}")
        lines += [""]
    if "ceilings" in result:
        lines += ["## Ceilings", "", *(f"- {key}: {value:.4g}" for key, value in result["ceilings"].items()), ""]
    if "goals" in result:
        lines += ["## Goals", "", "| goal | row | measured | |", "|---|---|---|---|"]
        for entry in result["goals"]:
            value = "" if entry["measured"] is None else f"{entry['measured']:.4g}"
            lines.append(f"| {entry['goal']} | {entry['row']} | {value} | {entry['verdict']} |")
        lines += [""]
    if result["rows"]:
        lines += ["## Times", "", "Median [quartiles] in milliseconds; ratios are to the best of ours.", ""]
        lines += ["| row | contender | ms | ratio | rate of ours |", "|---|---|---|---|---|"]
        for row in result["rows"]:
            rates = [f"{row[key]:.4g} {key}" for key in ("GB/s", "GFLOP/s") if key in row]
            rates += [f"{100 * row[key]:.0f} % {key}" for key in ("of copy", "of fp32") if key in row]
            for name, (median, low, high) in row["milliseconds"].items():
                ratio = f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "ours"
                rate = ", ".join(rates) if name == row["best"] else ""
                lines.append(f"| {row['label']} | {name} | {median:.4f} [{low:.4f}, {high:.4f}] | {ratio} | {rate} |")
        lines += [""]
    if "failed" in result:
        lines += ["## Contenders that failed", ""]
        lines += [f"- {row}, {name}: {why}" for row, names in result["failed"].items() for name, why in names.items()]
        lines += [""]
    if result["skipped"]:
        lines += ["## Skipped", "", *(f"- {name}: {reason}" for name, reason in result["skipped"].items()), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=("proof", "figures"), help="what to do; each in a command of its own")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results"), help="folder of the two files (%(default)s)")
    parser.add_argument("--minutes", type=float, help="limit of the whole run (8 for proof, 6 for figures)")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for one row of figures (%(default)s)")
    parser.add_argument("--skip", nargs="+", choices=("tests", "sanitizers"), default=[], help="leave out")
    parser.add_argument(
        "--cpu", action="store_true", help="try the gate itself without a GPU: Triton interpreted, tiny sizes"
    )
    parser.add_argument("--parts", nargs="+", help="of the figures, these alone")
    parser.add_argument("--notes", help=argparse.SUPPRESS)
    parser.add_argument("--workload", choices=("cuda", "triton"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workload is not None:
        workload(options.workload)
        return 0
    os.environ.pop("PATHRNN_BACKEND", None)
    if options.notes is not None:
        return Child(options).run(options.parts, Path(options.notes))
    if not options.cpu and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False here; --cpu tries the gate itself", file=sys.stderr)
        return 2
    options.minutes = options.minutes or (8.0 if options.half == "proof" else 6.0)
    gate = Gate(options)
    if options.half == "proof":
        gate.children(["environment"])
        for name, run in {
            "tests": lambda: run_tests(gate, 0.5 * gate.limit),
            "sanitizers": lambda: sanitize(gate, gate.limit),
        }.items():
            if name in options.skip:
                gate.result["skipped"][name] = "as asked"
            else:
                gate.part(name, run)
    else:
        gate.children(options.parts or ["environment", "ceilings", *benchmarks(Child(options))])
        if not gate.cpu:
            gate.result["goals"] = goals(gate.result)
    gate.result["complete"] = True
    gate.write()
    print(f"wrote {gate.path}.json and {gate.path}.md")
    unclean = any(entry["verdict"] == "errors" for entry in gate.result.get("sanitizers", {}).values())
    failed = gate.result.get("tests", {}).get("failed", 0) > 0
    return 1 if failed or unclean or "failed" in gate.result or "errors" in gate.result else 0


if __name__ == "__main__":
    sys.exit(main())

"""Both chains in Triton against their specification, gpu_model."""

import subprocess
import sys

import gpu_model
import pytest
import tolerances
import torch
from triton_cases import DEVICE, F32, F64, MARKS, dtypes, largest, run, same, truth

pytestmark = MARKS

ZERO = gpu_model.ZERO
LAST, VARYING = {"last_only": True, "ones_h0": True}, {"varying": True, "ones_h0": True}
#: Plan, hidden size, steps and dtype: every remainder of a tile, and one step.
CASES = (
    ("block", 1, 1, F32, {}),
    ("block", 3, 2, F64, LAST),
    ("block", 17, 7, F32, VARYING),
    ("block", 63, 3, F64, VARYING),
    ("block", 100, 3, F32, {}),
    ("grid", 1, 2, F64, VARYING),
    ("grid", 17, 1, F32, LAST),
    ("grid", 33, 7, F64, {}),
    ("grid", 100, 2, F64, VARYING),
    ("grid", 130, 3, F32, LAST),
    ("grid", 3, 40, F64, LAST),
)


def chain(hidden, seq_len, dtype=F64, gain=1.0, varying=False, last_only=False, ones_h0=False, backward=True):
    """Arguments of ``chains`` up to the plan."""
    w, v = (gain * torch.randn(hidden, hidden, dtype=dtype) / hidden**0.5 for _ in range(2))
    rows = seq_len if varying else 1
    drives = [(2**25 * torch.rand(rows, hidden, dtype=dtype), torch.randint(-40, 40, (rows,))) for _ in range(2)]
    other = (v, largest(v), *drives[1]) if backward else (None,) * 4
    return [w, largest(w), *drives[0], *other, seq_len, last_only, ones_h0]


def check_chains(arguments, plan="grid", blocks=1, lost=False):
    h, h_exponents, d, d_exponents, flag = run("chains", *arguments, plan, blocks)
    truth_h, truth_h_exponents, truth_d, truth_d_exponents = truth("chains", *arguments, plan, blocks)
    rtol = tolerances.path(arguments[0].dtype, arguments[8], len(arguments[0]))
    same((h, h_exponents), (truth_h, truth_h_exponents), rtol)
    same((d, d_exponents), (truth_d, truth_d_exponents), rtol)
    for rows, exponents in ((h, h_exponents), (d, d_exponents)):
        assert torch.equal(exponents == ZERO, (rows == 0).all(1))
    assert flag.item() == lost
    return h, h_exponents, d, d_exponents


@pytest.mark.parametrize("plan, hidden, seq_len, dtype, flags", CASES, ids=str)
def test_chains(plan, hidden, seq_len, dtype, flags):
    """Both chains, constant and varying drives, outputs at all steps and at the last, h_0 of zeros and ones."""
    check_chains(chain(hidden, seq_len, dtype, **flags), plan)


@pytest.mark.parametrize("plan", ("block", "grid"))
def test_forward_alone(plan):
    h, _, d, d_exponents = check_chains(chain(17, 5, backward=False), plan)
    assert h.shape == (6, 17) and d.shape == (0, 17) and d_exponents.shape == (0,)


@dtypes
@pytest.mark.parametrize("gain", (1e-4, 1e6))
def test_chains_beyond_the_range(gain, dtype):
    """Rows grow by 2^40 a step, or fade as fast; exponents alone tell."""
    seq_len = 5 if dtype == F32 else 30
    _, h_exponents, _, _ = check_chains(chain(17, seq_len, dtype, gain, **LAST), "block")
    if gain > 1:
        assert h_exponents[-1] > 30 * seq_len


@pytest.mark.parametrize("hidden, flags", ((130, {"last_only": True}), (200, VARYING), (130, {"ones_h0": True})))
def test_streamed(hidden, flags, monkeypatch):
    """W̃ that does not stay in registers is read tile by tile."""
    from pathrnn_kernels.ops.triton import path_chain

    monkeypatch.setattr(path_chain, "RESIDENT_BYTES", 1 << 10)
    assert path_chain.shape(hidden, 4, "grid", 1).TILE
    check_chains(chain(hidden, 3, F32, **flags))


@pytest.mark.skipif(DEVICE == "cpu", reason="interpreted programs run one after another and cannot synchronise")
@pytest.mark.parametrize("hidden, blocks", ((17, 2), (130, 5), (600, 40), (2100, 64)))
def test_programs_meet(hidden, blocks):
    for flags in (LAST, VARYING):
        check_chains(chain(hidden, 20, F32, **flags), "grid", blocks)


@dtypes
@pytest.mark.parametrize("plan", ("block", "grid"))
@pytest.mark.parametrize("last_only", (False, True))
def test_rest(last_only, plan, dtype):
    """A chain that comes to rest is copied from there on, whatever the step at which it is noticed."""
    for seq_len in (40, 47):
        arguments = chain(5, seq_len, dtype, gain=0.01, last_only=last_only)
        if last_only:
            arguments[4] = 2 * torch.eye(5, dtype=dtype) / 2  # W̃ = 1: δ stays what it is
        h, h_exponents, d, d_exponents = check_chains(arguments, plan)
        assert torch.equal(h[-1], h[-2]) and h_exponents[-1] == h_exponents[-2]
        assert torch.equal(d[0], d[1]) and d_exponents[0] == d_exponents[1]


@pytest.mark.parametrize("plan", ("block", "grid"))
def test_zeros(plan):
    """Nothing, and what remains where nothing drives it: a nilpotent W̃ ends in rows of zeros."""
    arguments = chain(4, 9)
    arguments[0], arguments[1] = torch.zeros(4, 4, dtype=F64), torch.zeros(1, dtype=F64)
    arguments[2], arguments[3] = torch.zeros(1, 4, dtype=F64), torch.tensor([ZERO])
    arguments[4] = torch.ones(4, 4, dtype=F64).triu(1)
    arguments[9] = True
    h, _, d, d_exponents = check_chains(arguments, plan)
    assert not h.any() and not d[:5].any() and d[5:].any(1).all() and (d_exponents[:5] == ZERO).all()


@pytest.mark.parametrize("place", ("weight", "product", "drive"))
@pytest.mark.parametrize("plan", ("block", "grid"))
@dtypes
def test_lost(dtype, plan, place):
    """What the dtype cannot hold is noticed, at no more than half of its range nothing is."""
    far = -80 if dtype == F32 else -700
    for power, lost in ((far, True), (far // 4, False)):
        w, drive = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=dtype)), torch.ones(1, 3, dtype=dtype)
        if place == "weight":
            w[0, 2] = 2.0**power
        elif place == "product":
            w[0, 2], drive[0, 2] = 2.0 ** (power // 2 - 8), 2.0 ** (power - 20)
            w[2, 2] = 0
        else:  # which stays where it is while the row's largest entry grows
            w = torch.diag(torch.tensor([0, 0, 2.0 ** (-power // 2)], dtype=dtype))
        arguments = [w, largest(w), drive, torch.tensor([0])] * 2 + [3, False, False]
        if lost:
            assert run("chains", *arguments, plan, 1)[-1].item()
        else:
            check_chains(arguments, plan)


def test_refusals():
    def shape(*arguments):
        from pathrnn_kernels.ops.triton import path_chain

        return path_chain.shape(*arguments)

    with pytest.raises(ValueError, match=r"plan is 'cluster'; the triton backend has 'block' and 'grid'"):
        shape(8, 4, "cluster", 2)
    for arguments, limit in (((129, 4, "block", 1), 128), ((65, 8, "block", 1), 64), ((8, 4, "block", 2), 128)):
        with pytest.raises(ValueError, match=rf"hidden sizes up to {limit} .* use plan 'grid'"):
            shape(*arguments)
    with pytest.raises(ValueError, match=r"up to 16384, not 16385; use backend"):
        shape(16385, 4, "grid", 64)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="blocks is 2, but .* use blocks=1"):
            shape(8, 4, "grid", 2)


def test_without_triton(tmp_path):
    """The backend says what is missing; importing it, and the rest of the package, does without."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from pathrnn_kernels.ops import triton\n"
        "assert 'pip install triton' in triton.problem(), triton.problem()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)

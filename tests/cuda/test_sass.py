"""sass.py finds what it looks for, in listings of a few lines."""

import pytest
import sass

pytestmark = pytest.mark.slow  # conftest.py compiles all kernels for the host, whatever is asked for here

#: Kernels, and what the warp without rows does in a step.
NAMES = {
    "block": "_ZN7pathrnn10run_chainsINS_6LayoutIfLi8ELi8ELi13ELi104ELi0EEELNS_9ChainPlanE0EEEvNS_6ChainsINT_1TEEE",
    "cluster": "_ZN7pathrnn10run_chainsINS_6LayoutIfLi32ELi8ELi8ELi120ELi0EEELNS_9ChainPlanE1EEEvNS_6ChainsINT_1TEEE",
    "grid": "_ZN7pathrnn18run_chains_on_gridIfEEvNS_10GridChainsIT_EE",
}
SCALES = {"block": ["BAR.SYNC.DEFER_BLOCKING 0x0"], "cluster": ["UCGABAR_ARV", "UCGABAR_WAIT"], "grid": []}
STEPS = {
    "block": ["LDG.E R4, desc[UR8][R2.64]", "LDS.128 R8, [R6]", "BAR.SYNC.DEFER_BLOCKING 0x0"],
    "cluster": ["PRMT R8, R59, 0x654, R4", "ST.E desc[UR6][R8.64], R2", "UCGABAR_ARV", "UCGABAR_WAIT"],
    "grid": [
        "LDG.E R4, desc[UR8][R2.64]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "@P0 MEMBAR.ALL.GPU",
        "@P0 REDG.E.ADD.64.STRONG.GPU desc[UR8][R6.64], R8",
        "LDG.E.64.STRONG.GPU R8, desc[UR8][R6.64]",
        "CCTL.IVALL",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LDG.E.STRONG.GPU R35, desc[UR8][R10.64]",
        "LDG.E.STRONG.GPU R6, desc[UR8][R6.64]",
    ],
}


def complaints(plan, step, architecture=90):
    """Of a kernel that makes such steps, in the form of cuobjdump."""
    body = ["S2R R3, SR_TID.X"]
    for loop in filter(None, (SCALES[plan], ["FFMA R1, R2, R3, R1", *step])):
        body += [*loop, f"@!P0 BRA 0x{16 * len(body):x}"]
    body.append("EXIT")
    lines = [f"        /*{16 * i:04x}*/    {text} ;    /* 0x0000 */\n    /* 0x0000 */" for i, text in enumerate(body)]
    return sass.complaints("\n".join([f"arch = sm_{architecture}", f"\t\tFunction : {NAMES[plan]}", *lines]))


@pytest.mark.parametrize("plan", STEPS)
def test_nothing_is_said_of_right_code(plan):
    assert complaints(plan, STEPS[plan]) == []


@pytest.mark.parametrize("plan", STEPS)
def test_whatever_is_missing_is_noticed(plan):
    """Each instruction that a step cannot do without."""
    needless = ("LDG.E R4", "LDS", "ST.E", "BAR.SYNC") if plan == "grid" else ("LDG.E R4", "LDS", "ST.E")
    for i, text in enumerate(STEPS[plan]):
        if not text.startswith(needless):
            assert complaints(plan, STEPS[plan][:i] + STEPS[plan][i + 1 :]), text


@pytest.mark.parametrize(
    "plan, added, said",
    (
        ("block", "MEMBAR.ALL.GPU", "a fence of the whole GPU"),
        ("block", "CCTL.IVALL", "a fence of the whole GPU"),
        ("block", "LDG.E.CONSTANT R4, desc[UR8][R2.64]", "a non-coherent load"),
        ("grid", "LDG.E R4, desc[UR8][R2.64]", "a plain load of what other blocks wrote"),
        ("grid", "LD.E.64 R4, desc[UR8][R2.64]", "a plain load of what other blocks wrote"),
    ),
)
def test_what_should_not_be_there_is_noticed(plan, added, said):
    (found,) = complaints(plan, [*STEPS[plan], added])
    assert said in found and added in found


def test_a_long_step_is_noticed(monkeypatch):
    limit, limit_of_scales = sass.MOST["float32", "block", 104]
    (found,) = complaints("block", STEPS["block"] * limit)
    assert f"instructions a step, of at most {limit}" in found
    monkeypatch.setitem(SCALES, "block", SCALES["block"] * (limit_of_scales + 1))
    (found,) = complaints("block", STEPS["block"])
    assert f"instructions a step, of at most {limit_of_scales}" in found


def test_a_layout_without_a_limit_is_noticed(monkeypatch):
    monkeypatch.setitem(NAMES, "block", NAMES["block"].replace("Li13E", "Li12E"))
    assert "of width 96" in complaints("block", STEPS["block"])[0]


def test_code_behind_the_end_is_no_loop():
    body = [(0, "BAR.SYNC"), (16, "BRA 0x0"), (32, "EXIT"), (48, "BRA 0x0")]
    assert sass.loops_around(body, "BAR") == [["BAR.SYNC", "BRA 0x0"]]


def test_clusters_are_not_asked_of_architectures_without_them_which_must_trap():
    assert complaints("cluster", ["BPT.TRAP 0x1"], 80) == []
    assert "does not trap" in complaints("cluster", ["NOP"], 80)[0]
    assert "it traps" in complaints("cluster", [*STEPS["cluster"], "BPT.TRAP 0x1"])[0]
    assert complaints("cluster", ["NOP"]) != []


def test_registers_and_stack_are_read_by_architecture():
    said = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fPf:
  REG:38 STACK:88 SHARED:0 LOCAL:0 CONSTANT[0]:364 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_120
"""
    assert list(sass.resources(said)) == [(80, "_Z1fPf", 38, 88)]

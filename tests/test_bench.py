"""`pathrnn bench`: no figure for a wrong kernel, intervals that hold what they say, comparisons, files."""

import copy
import itertools
import json
import math
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import pathrnn_kernels as pk
from bench import measure, memory, readme, report, rows
from bench.rows import OURS, Spec
from pathrnn_kernels import cli

ROOT = Path(__file__).resolve().parents[1]

TINY = (
    Spec("kappa1", 4, 5, kind="Gaussian", axes="T"),
    Spec("kappa1", 4, 9, kind="Gaussian", axes="T"),
    Spec("kappa1", 6, 5, kind="nn.RNN", axes="P"),
    Spec("kappa2", 4, 5, kind="Gaussian"),
    Spec("path_norm", 4, 5, kind="nn.RNN"),
    Spec("forward", 4, 5, 2, 1),
    Spec("backward", 4, 5, 2, 1),
    Spec("backward", 3, 4, 2, 2, axes="random"),
    Spec("step", 4, 5, 2, 2, "κ⁽¹⁾"),
    Spec("step", 4, 5, 2, 2, "κ⁽¹⁾+κ⁽²⁾"),
    Spec("step", 4, 5, 2, 2, "GatedPathSGD"),
    *(Spec("update", 4, 5, kind=kind) for kind in ("κ", "PathSGD", "PathAdam", "PathSOAP", "GatedPathSGD")),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.chdir(ROOT)
    # The tree's command, whatever is installed.
    commands = metadata.EntryPoints([metadata.EntryPoint("bench", "bench.command:main", cli.COMMANDS)])
    monkeypatch.setattr(cli, "further_commands", lambda: commands)
    monkeypatch.setattr(rows, "specs", lambda quick, random: list(TINY))
    monkeypatch.setattr(measure, "FEWEST", 6)
    monkeypatch.setattr(measure, "ceilings", lambda *_: {"fp32 GFLOP/s": 100.0, "copy GB/s": 10.0, "read GB/s": 12.0})
    before = measure.denormals()
    yield
    torch.set_flush_denormal(before == "flushed")


def bench(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = cli.main(["bench", *map(str, arguments)])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def run(capsys, folder, *arguments) -> tuple[int, str, dict]:
    code, out, err = bench(capsys, "--quick", "--seconds", "0.01", "--out", folder, *arguments)
    (file,) = folder.glob("*.json")
    assert err == "", err
    return code, out, json.loads(file.read_text())


def wrong(function, seq_len):
    """The kernel with one entry a part in a hundred off, at one sequence length alone."""

    def broken(net, steps, *arguments, **options):
        found = function(net, steps, *arguments, **options)
        if steps == seq_len:
            found.factors[rows.RECURRENT].view(-1)[1] *= 1.01
        return found

    return broken


def test_every_row_has_figures_ratios_and_a_share_of_the_roofline(capsys, tmp_path):
    code, out, result = run(capsys, tmp_path)
    assert code == 0 and result["complete"] and result["withheld"] == {} and result["gate"]["disagree"] == {}
    assert [row["label"] for row in result["rows"]] == [spec.label for spec in TINY]
    for row in result["rows"]:
        assert row["label"] in out
        # Left out with a reason, or compared: no baseline is lost, nor disagrees with the oracle.
        assert row["ratios"] and not any("disagrees" in why or "Error" in why for why in row["absent"].values())
        for median, low, high in (*row["figures"].values(), *row["ratios"].values()):
            assert 0 < low <= median <= high
        assert row["roofline"] == pytest.approx(
            max(row["flops"] / 100e9, row["bytes"] / 12e9) * 1e3 / row["figures"][OURS][0]
        )


def test_a_broken_kernel_shows_no_figure_at_any_size_nor_where_it_is_used(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(pk, "kappa", wrong(pk.kappa, 9))
    code, out, result = run(capsys, tmp_path)
    assert code == 1
    assert list(result["gate"]["disagree"]) == ["kappa1 T=9 H=4 Gaussian"]
    assert {row["part"] for row in result["rows"]} == {"forward", "backward", "random"}
    assert len(result["withheld"]) == len(TINY) - len(result["rows"])
    lines = [line for line in out.splitlines() if line.startswith(("kappa1", "kappa2", "path_norm", "update", "step"))]
    assert len(lines) == 13 and all(line.endswith("no figure: kappa1 disagrees with the oracle") for line in lines)
    table = next(tmp_path.glob("*.md")).read_text()
    assert "no figure for kappa1 T=9 H=4 Gaussian" in table and "| T=9 H=4 Gaussian" not in table


@pytest.mark.parametrize("group", ["forward", "backward", "path_norm", "kappa2", "update", "step"])
def test_the_gate_notices_a_wrong_entry_of_every_kernel(monkeypatch, group):
    spec = next(spec for spec in TINY if spec.group == group and spec.kind not in ("κ⁽¹⁾+κ⁽²⁾", "κ"))
    row = rows.build(spec, measure.CPU, quick=True)
    row.check(OURS)
    if group in ("update", "step"):
        true = pk.PathSGD.step

        def step(self):
            true(self)
            if self.param_groups[0]["fused"] is None:  # not the step that it is compared with
                with torch.no_grad():
                    self.net.weights()[rows.RECURRENT][0, 1] *= 1.01

        monkeypatch.setattr(pk.PathSGD, "step", step)
    else:
        found = row.ours[OURS]()
        entries = found.factors[rows.RECURRENT] if group == "kappa2" else found[-1].detach()
        entries.view(-1)[1 % entries.numel()] *= 1.01
        row.ours[OURS] = lambda: found
    with pytest.raises(AssertionError):
        row.check(OURS)


def test_a_wrong_baseline_is_left_out_with_the_reason(capsys, monkeypatch, tmp_path):
    true = rows.baselines.paper_kappa2
    monkeypatch.setattr(rows.baselines, "paper_kappa2", lambda *a: lambda: true(*a)() * 1.1)
    code, _, result = run(capsys, tmp_path, "--only", "kappa2")
    assert code == 0
    assert "disagrees with the oracle" in result["rows"][0]["absent"]["paper's sum"]
    assert "paper's sum" not in result["rows"][0]["figures"]


def test_the_interval_holds_the_median_of_a_skewed_distribution_as_often_as_it_says():
    generator = random.Random(0)
    for n in (6, 20, 101):
        trials = 4000
        held = 0
        for _ in range(trials):
            _, low, high = measure.interval([generator.expovariate(1) for _ in range(n)])
            held += low <= math.log(2) <= high
        # Order statistics cannot have exactly 95 %; the next narrower pair would have less. 4 standard deviations.
        slack = 4 * math.sqrt(0.05 * 0.95 / trials)
        tails = [2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n // 2)]
        assert abs(held / trials - (1 - max(tail for tail in tails if tail <= 0.05))) < slack
    assert measure.interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert measure.interval([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_formed_within_rounds():
    # A slow spell in two of six rounds, on both sides.
    ours, theirs = [1.0, 1.0, 9.0, 9.0, 1.0, 1.0], [3.0, 3.0, 27.0, 27.0, 3.0, 3.0]
    assert measure.ratio(ours, theirs) == (3.0, 3.0, 3.0)


def test_contenders_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or sum(range(50_000)) for name in "ab"}
    times = measure.measure(runs, 0.0)
    assert {name: len(found) for name, found in times.items()} == {"a": measure.FEWEST, "b": measure.FEWEST}
    changes = sum(a != b for a, b in itertools.pairwise(calls))
    assert changes >= 2 * measure.FEWEST - 1


def test_before_a_cold_call_other_memory_goes_through_the_caches(monkeypatch):
    order = []

    class Other:
        def add_(self, one):
            order.append("other")

    monkeypatch.setattr(measure, "_other_memory", Other)
    times = measure.measure({"a": lambda: order.append("a")}, 0.0, from_memory=True)
    assert len(times["a"]) == measure.FEWEST
    assert order[-2 * measure.FEWEST :] == ["other", "a"] * measure.FEWEST


def result_with(ratio: list[float]) -> dict:
    row = {
        **{"part": "kappa1", "label": "T=5 H=6 nn.RNN", "axes": "", "hidden": 6, "seq_len": 5, "batch": 0},
        **{"unit": "ms", "flops": 1.0, "bytes": 1.0, "absent": {}},
        "figures": {OURS: [1.0, 1.0, 1.0], "eager autograd": ratio},
        "ratios": {"eager autograd": ratio},
    }
    return {"schema": report.SCHEMA, "machine": {"torch": "2"}, "parts": ["kappa1"], "rows": [row]}


@pytest.mark.parametrize(
    ("later", "kind"),
    [
        ([5.0, 4.9, 5.1], None),
        ([4.0, 3.9, 4.1], "slower"),
        ([4.0, 3.0, 5.0], None),  # intervals overlap
        ([4.7, 4.65, 4.75], None),  # beyond this run's noise, yet less than a tenth
        ([6.0, 5.9, 6.1], "faster"),
    ],
)
def test_baseline_finds_changes_beyond_noise_alone(capsys, tmp_path, later, kind):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    report.save(result_with([5.0, 4.9, 5.1]), old)
    report.save(result_with(later), new)
    code, out, err = bench(capsys, "--baseline", old, "--compare", new)
    assert code == (1 if kind == "slower" else 0) and err == ""
    if kind is None:
        assert out == "nothing changed beyond noise\n"
    else:
        assert out.startswith(f"{kind} beyond noise: kappa1 T=5 H=6 nn.RNN against eager autograd: 5.00x")


def test_a_run_compares_itself_with_an_earlier_file(capsys, tmp_path):
    _, _, result = run(capsys, tmp_path, "--only", "kappa1", "path_norm")
    old = copy.deepcopy(result)
    old["rows"][2]["ratios"]["eager autograd"] = [1e6, 0.99e6, 1.01e6]
    old["rows"][0]["label"] = "T=5 H=77 Gaussian"
    old["machine"]["torch"] = "1.0"
    report.save(old, tmp_path / "old.txt")
    code, out, _ = run(capsys, tmp_path, "--only", "kappa1", "--baseline", tmp_path / "old.txt")
    assert code == 1
    assert "slower beyond noise: kappa1 T=5 H=6 nn.RNN" in out
    assert "no figure any more: kappa1 T=5 H=77 Gaussian" in out and "path_norm" not in out  # which was not asked for
    assert "not in the earlier file: kappa1 T=5 H=4 Gaussian" in out
    assert f"torch: 1.0 → {result['machine']['torch']}" in out


def test_files_come_back_as_they_went(capsys, tmp_path):
    _, _, result = run(capsys, tmp_path)
    (file,) = tmp_path.glob("*.json")
    assert report.load(file) == result
    report.save(result, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    table = next(tmp_path.glob("*.md")).read_text()
    for row in result["rows"]:
        if row["part"] != "random":
            assert f"| {row['label']} | {report.spread(row['figures'][OURS])} |" in table
    names = {path.name.rpartition("-quick-")[2] for path in tmp_path.glob("*.png")}
    assert names == {"speedups.png", "cost-T.png"}
    for path in tmp_path.glob("*.png"):
        assert path.name in table and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": 0}', '{"schema": 1}', '{"schema": 1, "machine": {}, "parts": [], "rows": [{}]}']
)
def test_a_file_that_is_no_result_is_one_sentence(capsys, tmp_path, text):
    (tmp_path / "old.json").write_text(text)
    code, out, err = bench(capsys, "--baseline", tmp_path / "old.json", "--out", tmp_path / "out")
    assert code == 2 and out == "" and err.startswith("pathrnn: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--compare", "x.json"], "--compare needs --baseline"),
        *((["--seconds", value], f"--seconds is {float(value)}; it must be finite") for value in ("0", "nan", "inf")),
        (["--threads", "0"], "--threads is 0; it must be finite and positive"),
        (["--random", "-1"], "--random is -1; it must be finite and at least 0"),
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_wrong_option_is_one_sentence(capsys, arguments, expected):
    code, out, err = bench(capsys, *arguments)
    assert code == 2 and out == "" and expected in err and err.count("\n") == 1


def test_help_says_what_the_exit_status_means_and_names_every_option(capsys):
    code, out, _ = bench(capsys, "--help")
    assert code == 0 and "Exit status: 0; 1 if a kernel disagreed or something became slower" in out
    for option in ("--quick", "--only", "--baseline", "--compare", "--out", "--seconds", "--random", "--threads"):
        assert option in out
    for part in rows.PARTS:
        assert part in out


def test_an_installation_in_a_repository_does_not_give_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "ROOT", tmp_path / "site-packages")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "site-packages").mkdir()
    assert measure.commit() == "not available (no source tree)"


def test_peak_memory_is_that_of_the_call():
    """In a process of its own, as in a row: one that has run for long has memory to give without asking for more."""
    program = (
        "import torch; from bench import measure, memory; held = []; "
        "print(memory.peak(lambda: held.append(torch.ones(5_000_000)), measure.CPU), "
        "memory.peak(lambda: torch.ones(10_000_000).sum(), measure.CPU))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, given_back = map(float, done.stdout.split())
    assert 19 < kept < 25
    assert 39 < given_back < 50  # what a call allocates and gives back counts too, once


@pytest.mark.slow
def test_a_row_of_memory_asks_a_process_of_its_own(capsys):
    row = memory.row(Spec("backward", 300, 100, 50, 1, memory=True), measure.CPU)
    # nn.RNN keeps at least every h_t.
    assert 100 * 50 * 300 * 4e-6 < row.baselines["nn.RNN"]() < 300
    row = memory.row(Spec("kappa2", 200, 50, kind="I+0.02N", memory=True), measure.CPU)
    # At least the cached powers and κ; nothing ran before that call.
    assert row.ours[OURS]() > 3 * 200 * 200 * 4e-6


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: str(page.relative_to(measure.ROOT)))
def test_pages_show_the_committed_results_and_what_is_refused(page):
    assert readme.updated(page) == page.read_text(encoding="utf-8"), "type: python -m bench.readme"


def test_the_committed_results_can_be_drawn(tmp_path):
    """All of them: a full run ends with its pictures."""
    pytest.importorskip("matplotlib")
    from bench import plots

    found = plots.draw(json.loads(readme.RESULT.read_text(encoding="utf-8")), tmp_path / "all")
    assert [path.name for path in found] == ["all-speedups.png", "all-cost-T.png", "all-cost-H.png", "all-cost-B.png"]
    assert all(path.stat().st_size > 10_000 for path in found)


def test_tables_lead_with_trained_weights():
    result = report.load(readme.RESULT)
    [row] = [row for row in result["rows"] if (row["part"], row["label"]) == ("kappa1", "T=784 H=100 nn.RNN")]
    trained = [row | {"label": label} for _, label, _ in readme.TRAINED]
    lines = readme.speed({**result, "rows": [*result["rows"], *trained]}, readme.SHORT).splitlines()
    first = lines[lines.index("|---|---|---|") + 1 :][:3]
    expected = [words for *_, words in (*readme.TRAINED, readme.SHORT[0])]
    assert [line.split(" | ")[0] for line in first] == [f"| {words}" for words in expected]

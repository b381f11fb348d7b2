"""``pathrnn check``: what it finds, what it says, how it ends."""

import math
import os

import pytest
import tolerances
import torch

import pathrnn_kernels as pk
from pathrnn_kernels import check, cli, reference
from pathrnn_kernels.ops import backend, plan

CPU = torch.device("cpu")
FEW = (check.CASES[0], check.CASES[6], check.CASES[9])  # one step; two layers; both directions, two layers


def row(name="cpu", dtype=torch.float32, chosen="auto"):
    return check.Row(CPU, name, chosen, dtype)


@pytest.mark.parametrize("dtype", check.DTYPES, ids=str)
@pytest.mark.parametrize("name", ("cpu", "reference"))
def test_all_that_a_cpu_has_agrees(name, dtype):
    found = row(name, dtype)
    check.run(found)
    assert found.failures == []
    assert set(found.worst) == set(check.CHECKS) and all(0 <= worst <= 1 for worst in found.worst.values())
    assert any(worst > 0 for worst in found.worst.values())  # something was compared


def test_the_rows_are_what_the_backends_serve(monkeypatch):
    found = [(r.device, r.backend, r.plan, r.dtype) for r in check.rows()]
    here = [name for name in ("cpu", "reference") if backend.refusals(CPU, torch.float32)[name] is None]
    assert found == [(CPU, name, "auto", dtype) for name in here for dtype in check.DTYPES]
    # As on a GPU, whose kernels cannot run here.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "refusals", lambda *_: dict.fromkeys(backend.BACKENDS) | {"cpu": "no CPU tensors"})
    monkeypatch.setattr(plan, "describe", lambda device: plan.Device())
    gpu = {(r.backend, r.plan, r.dtype) for r in check.rows() if r.device.type == "cuda"}
    assert {p for b, p, d in gpu if b == "cuda" and d == torch.float64} == set(plan.PLANS)
    assert {p for b, p, d in gpu if b == "triton" and d == torch.float32} == {"block", "grid"}
    assert ("cuda", "auto", torch.bfloat16) in gpu and ("reference", "auto", torch.float32) in gpu


def test_gpu_kernels_under_their_interpreter():
    """Triton's, interpreted on the CPU (conftest.py), by a plan that is named."""
    pytest.importorskip("triton")
    found = row("triton", torch.float32, "block")
    check.run(found, FEW[:2])
    assert found.failures == [] and "ReLURNN" in found.worst
    other = row("triton", torch.float32, "grid")
    check.run(other, FEW[:1])
    assert other.failures == [] and "ReLURNN" not in other.worst  # once for every backend


def test_the_environment_is_as_it_was(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "reference")
    monkeypatch.delenv(plan.ENVIRONMENT, raising=False)
    before = torch.backends.cudnn.rnn.fp32_precision
    check.run(row(), FEW[:1])
    assert os.environ[backend.ENVIRONMENT] == "reference" and plan.ENVIRONMENT not in os.environ
    assert torch.backends.cudnn.rnn.fp32_precision == before


#: A wrong kernel, by what it spoils: the function that check calls, and what it then gives.
WRONG = {
    "κ⁽¹⁾": ("kappa", lambda right: lambda net, *rest, **options: right(_scaled(net, "head.weight"), *rest, **options)),
    "log γ²": ("log_path_norm", lambda right: lambda *call: right(*call) + 1e-3),
    "PathSGD": ("PathSGD", lambda right: lambda net, lr, **options: right(net, lr=1.001 * lr, **options)),
}


def _scaled(net, name):
    with torch.no_grad():
        net.get_parameter(name).mul_(1.001)
    return net


@pytest.mark.parametrize("spoilt", WRONG)
def test_a_wrong_kernel_is_found(monkeypatch, spoilt):
    name, wrong = WRONG[spoilt]
    monkeypatch.setattr(check, name, wrong(getattr(check, name)))
    found = row()
    check.run(found, FEW)
    assert found.worst[spoilt] > 1
    assert any(failure.startswith(f"two layers: {spoilt} of ") for failure in found.failures)
    assert found.worst["ReLURNN"] <= 1


@pytest.mark.parametrize("name", ("weight_hh_l0", "bias_ih_l0"))
def test_a_wrong_module_is_found(monkeypatch, name):
    class Wrong(pk.ReLURNN):
        def forward(self, *call):
            found = super().forward(*call)
            return found[0], found[1] + 1e-3 * getattr(self, name).sum()

    monkeypatch.setattr(check, "ReLURNN", Wrong)
    found = row()
    check.run(found, FEW)
    assert found.worst["ReLURNN"] > 1 and found.worst["κ⁽¹⁾"] <= 1


def test_nan_and_exceptions_are_failures(monkeypatch):
    monkeypatch.setattr(check, "log_path_norm", lambda *_: torch.tensor(math.nan, requires_grad=True))

    def raises(*_, **__):
        raise RuntimeError("a launch\nfailed")

    monkeypatch.setattr(check, "PathSGD", raises)
    found = row()
    check.run(found, FEW[:1])
    assert found.worst["log γ²"] == math.inf and found.worst["PathSGD"] == math.inf
    assert "one step: PathSGD raises RuntimeError: a launch failed" in found.failures


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(check, "rows", lambda: [row()])
    assert cli.main(["check"]) == 0
    out = capsys.readouterr().out
    for text in (torch.__version__, "isa_active", "float32", *check.CHECKS, "the one row agrees with the oracle"):
        assert text in out
    monkeypatch.setattr(check, "kappa", lambda net, *_, **__: pk.kappa(net, 1))
    assert cli.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "1 of 1 row FAILED. In a bug report, send all of this output" in out
    assert "cpu on cpu, plan auto, float32:" in out and "one unit: κ⁽¹⁾ of rnn.weight_hh_l0 is off by" in out


def test_the_last_lines_count_rows(monkeypatch):
    monkeypatch.setattr(check, "run", lambda row: None)

    def last(count, seconds):
        lines = []
        monkeypatch.setattr(check, "rows", lambda: [row() for _ in range(count)])
        assert check.check(seconds, lines.append) == (seconds > 0)  # of nothing is no success
        return lines[-1]

    assert last(1, 9.0) == "the one row agrees with the oracle"
    assert last(2, 9.0) == "all 2 rows agree with the oracle"
    assert last(1, 0.0) == "1 row was not run; pathrnn check --seconds 600 runs it"
    assert last(2, 0.0) == "2 rows were not run; pathrnn check --seconds 600 runs them"


def test_the_time_is_heeded(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["check", "--seconds", "0"])
    assert exit.value.code == 2 and "--seconds is 0.0" in capsys.readouterr().err
    assert cli.main(["check", "--seconds", "1e-9"]) == 1
    out = capsys.readouterr().out
    assert out.count("not run: the time was up") == len(check.rows())
    assert "rows were not run; pathrnn check --seconds 600 runs them" in out and "agree" not in out


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("PATHRNN_BACKEND", "PATHRNN_BACKEND is 'foo'; use one of 'auto', 'cpu'"), ("PATHRNN_PLAN", "plan is 'foo'")],
)
def test_the_command_refuses_what_the_environment_misspells(capsys, monkeypatch, name, sentence):
    monkeypatch.setenv(name, "foo")
    assert cli.main(["check"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"pathrnn: {sentence}") and err.count("\n") == 1


def test_tolerances_are_those_of_the_tests():
    for dtype in (torch.float32, torch.float64):
        for seq_len, layers, size in ((1, 1, 1), (12, 1, 13), (20, 1, 70)):
            assert check.path_error(dtype, seq_len, layers, size) == tolerances.path(dtype, seq_len, size)
            expected = tolerances.rnn(dtype, seq_len, check._BATCH, size)
            assert check.rnn_error(dtype, seq_len, layers, size) == pytest.approx(layers * expected)


def test_the_networks_cover_what_there_is():
    every = check.CASES
    assert len({case.name for case in every}) == len(every) >= 12
    for case in every:
        steps = [1, 64] if not case.identity else [1]
        for p in case.parameters.values():
            for dtype in check.DTYPES:
                assert torch.equal(p.to(dtype).double(), p), case.name  # one truth for all
            assert any(torch.equal(p * n, (p * n).round()) for n in steps) or case.identity
        assert case.path_norm.isfinite() and case.path_norm > 0
        largest = max(
            (check._RATE * case.path_norm * case.gradients[name] / k).abs()[k > 0].max().item()
            for name, k in case.kappa1.items()
            if (k > 0).any()
        )
        assert largest < torch.finfo(torch.float16).max / 100, case.name
    assert {case.outputs for case in every} == {"all", "last"} and {case.h0 for case in every} == {"zeros", "ones"}
    assert {case.layers for case in every} >= {1, 2, 3} and {case.bidirectional for case in every} == {True, False}
    assert {case.embedding is None for case in every} == {case.head is None for case in every} == {True, False}
    assert reference.kappa1(every[0].parameters, 1)["rnn.weight_hh_l0"].max() == 0

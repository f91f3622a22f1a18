"""Bags: MNIST-bags as Ilse et al. 2018 make them, or the features of slides. What is in the folder tells which.

MNIST-bags from the four files of MNIST (`train-images-idx3-ubyte` and so on, plain or .gz). The size of a bag is
normal with mean 10 and deviation 2, as in the authors' code, one at least; its images are any; it is positive if a 9
is among them. 200 bags of the first five sixths of the training images are trained on, 100 of the others are for
validation, which the authors do not have, and 1000 of the test images for test. Bags are the same for every seed. The
truth of the weights are the nines, which are located in positive bags. As in the code: LeNet's convolutions,
instances 500 wide, scores 128, a bag a batch, Adam, 5e-4, a penalty of 1e-4 (here decoupled).

Features of slides in the layout of CLAM (Lu et al. 2021): `labels.csv` with the columns slide_id and label, and
beside it, or in `h5_files`, a `SLIDE_ID.h5` each, with `features` (N, D) and possibly `coords` (N, 2). A column
`split` (train, val or validation, test) has the splits; without val a fixed tenth of train is it. Without the column
a fixed fifth is for test, and a tenth of the others for validation. What is fixed is drawn by a hash of the slide's
id, or of its `case_id` where there is such a column, so that the slides of a patient stay together. Features are read
when a batch needs them. As in CLAM's code: a layer of 512 with ReLU, gated scores of 256, a slide a batch, Adam,
2e-4, a penalty of 1e-5 (here decoupled). This takes h5py.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from .._arms import on_truth
from ..mil import GatedMIL
from ..protocol import Setting
from ..tasks import TEST, TRAIN, VALIDATION, Panel, Task
from ..tasks.mil import MaxMIL
from ._classify import Answer, Part, auc, classify
from ._files import TENTH, DataError, beside, choose, csv_table, fail, open_binary
from ._packed import Packed, pack

FORMATS = {"MNIST": "train-images?idx3-ubyte", "slides": "labels.csv"}
KEY, MEAN, DEVIATION = 9, 10, 2
BAGS = {TRAIN: 200, VALIDATION: 100, TEST: 1000}
SIDE = 28
SHADE, CONTRAST = 0.1307, 0.3081  # mean and deviation of MNIST's pixels
SPLITS = {"train": TRAIN, "val": VALIDATION, "validation": VALIDATION, "test": TEST}
TEST_SHARE = 0.2
ATTENDED = 10  # patches of a slide in a picture


class Bags(NamedTuple):
    """MNIST-bags of a split."""

    images: Tensor  # uint8 (I, H, W)
    digits: Tensor  # int64 (I,)
    bags: Packed  # a row a bag: its images

    @property
    def labels(self) -> Tensor:
        """int64 ``(R,)``: whether there is a nine."""
        bag = torch.arange(len(self.bags.lengths)).repeat_interleave(self.bags.lengths)
        nines = (self.digits[self.bags.numbers.long()] == KEY).long()
        return torch.zeros(len(self.bags.lengths), dtype=torch.int64).index_add(0, bag, nines).clamp(max=1)


def read_idx(path: Path, axes: int) -> Tensor:
    """The uint8 numbers of a file of MNIST, of so many axes."""
    with open_binary(path) as file:
        raw = file.read()
    start = 4 + 4 * axes
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, axes]):
        fail(path, None, f"expected an idx file of bytes with {axes} axes, which begins with 0, 0, 8, {axes}")
    shape = struct.unpack(f">{axes}I", raw[4:start])
    if len(raw) - start != np.prod(shape, dtype=np.int64):
        fail(
            path,
            None,
            f"expected {' x '.join(map(str, shape))} bytes after the first {start}; got {len(raw) - start}",
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def draw_bags(pool: Tensor, count: int, rng: np.random.Generator) -> Packed:
    """Rows of images from the pool, as often as they come."""
    sizes = np.maximum(1, rng.normal(MEAN, DEVIATION, count).astype(np.int64))
    return pack(pool[torch.from_numpy(rng.integers(0, len(pool), size))].tolist() for size in sizes)


@lru_cache(1)
def read_mnist(train: Path) -> dict[str, Bags]:
    """The bags of each split."""
    data = {}
    for name in ("train", "t10k"):
        of_images = train.name.replace("train", name)
        files = [beside(train, x) for x in (of_images, of_images.replace("images", "labels").replace("idx3", "idx1"))]
        images, digits = read_idx(files[0], 3), read_idx(files[1], 1).long()
        if images.shape[1:] != (SIDE, SIDE):
            fail(files[0], None, f"expected images of {SIDE} x {SIDE}; got {tuple(images.shape[1:])}")
        if len(images) != len(digits):
            fail(files[1], None, f"expected a label for each of the {len(images)} images; got {len(digits)}")
        if not len(digits) or digits.max() > 9:
            fail(files[1], None, "expected labels from 0 to 9")
        data[name] = images, digits
    last = len(data["train"][1])
    if last < 2:
        fail(train, None, "expected two images at least, one for validation; got one")
    pools = {
        TRAIN: ("train", torch.arange(last * 5 // 6)),
        VALIDATION: ("train", torch.arange(last * 5 // 6, last)),
        TEST: ("t10k", torch.arange(len(data["t10k"][1]))),
    }
    rng = np.random.default_rng(0)
    return {split: Bags(*data[name], draw_bags(pool, BAGS[split], rng)) for split, (name, pool) in pools.items()}


def lenet() -> nn.Module:
    """From images ``(N, 1, 28, 28)`` to ``(N, 500)``."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, 500),
        nn.ReLU(),
    )


def make_bags(file: Path, device: torch.device) -> Task:
    """Whether there is a nine in the bag."""
    data = read_mnist(file)

    def build(arm: str) -> nn.Module:
        model = MaxMIL(lenet(), 500) if arm == "max" else GatedMIL(lenet(), attention=arm == "attention")
        return model.to(device)

    def collate(split: str, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, where bags end, and which are nines."""
        images, digits, bags = data[split]
        which, ends = bags.joined(rows)
        shades = (images[which, None].float() / 255 - SHADE) / CONTRAST
        return shades.to(device), ends.to(device), (digits[which] == KEY).to(device)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Logits of no and of yes, and the weights of an attention."""
        images, ends, nines = batch
        weights = None
        if isinstance(model, MaxMIL):
            logits = model(images, ends)
        else:
            with on_truth(model, model.get_submodule("pooling"), or_all(nines, ends)):
                logits, weights = model(images, ends, return_weights=True)
        return torch.cat([torch.zeros_like(logits), logits], 1), weights

    def answer(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Answer:
        logits, weights = forward(model, batch)
        if weights is None:
            return Answer(logits)
        _, ends, nines = batch
        on_nines, there = (sum_of(x, ends) for x in (weights * nines, nines.float()))
        return Answer(logits, {"nines": on_nines.masked_fill(there == 0, torch.nan)})

    def panels(model: nn.Module) -> list[Panel]:
        shown = []
        for i in range(4):
            batch = collate(TEST, torch.tensor([i]))
            logits, weights = forward(model, batch)
            assert weights is not None
            title = f"{'a' if batch[2].any() else 'no'} nine, taken for one by {float(logits.softmax(1)[0, 1]):.0%}"
            names = [str(int(data[TEST].digits[image])) for image in data[TEST].bags.row(i)]
            shown.append(Panel(title, weights[None], ["attention"], names, batch[2][None]))
        return shown

    return classify(
        build,
        {split: Part(x.labels, x.bags.lengths) for split, x in data.items()},
        collate,
        answer,
        panels,
        batch=1,
        device=device,
        metric=auc,
        arms=("attention", "uniform", "max", "oracle"),
        setting=Setting(5e-4, 1e-4),
        epochs=100,
    )


def sum_of(x: Tensor, ends: Tensor) -> Tensor:
    """The sum of each bag: ``(N,)`` -> ``(S,)``."""
    return torch.segment_reduce(x, "sum", offsets=ends.long())


def or_all(truth: Tensor, ends: Tensor) -> Tensor:
    """The bool truth of each instance, and all of a bag in which there is none."""
    lengths = ends.diff()
    none = sum_of(truth.float(), ends) == 0
    return truth | none.repeat_interleave(lengths)


class Slide(NamedTuple):
    """A slide, whose features are in a file."""

    file: Path
    label: int
    patches: int
    width: int


def h5py() -> Any:
    """The module, which reads HDF5."""
    try:
        import h5py
    except ImportError as error:
        raise DataError("h5py, which reads features of slides, is not installed: pip install h5py") from error
    return h5py


def draw(text: str) -> float:
    """A number from 0 to 1 that follows from a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(row: dict[str, str], divided: bool, validation: bool) -> str:
    """Of a slide; divided: there are splits; validation: one of them is for validation."""
    place = draw(row.get("case_id") or row["slide_id"])
    if divided:
        split = SPLITS[row["split"]]
        return VALIDATION if split == TRAIN and not validation and place < 1 / TENTH else split
    if place < TEST_SHARE:
        return TEST
    return VALIDATION if place < TEST_SHARE + (1 - TEST_SHARE) / TENTH else TRAIN


def measure(file: Path) -> tuple[int, int]:
    """N and D of a slide's features."""
    try:
        with h5py().File(file) as store:
            if "features" not in store:
                fail(file, None, f"expected features; got {', '.join(store) or 'nothing'}")
            shape = store["features"].shape
            points = store["coords"].shape if "coords" in store else None
    except OSError as error:
        fail(file, None, f"expected HDF5: {error}")
    if len(shape) != 2 or not all(shape):
        fail(file, None, f"features: expected (N, D), one patch at least; got {shape}")
    if points is not None and points != (shape[0], 2):
        fail(file, None, f"coords: expected ({shape[0]}, 2), a place for each patch; got {points}")
    return shape


def load(file: Path, name: str) -> Tensor | None:
    """An array of a slide."""
    with h5py().File(file) as store:
        return torch.from_numpy(store[name][()]) if name in store else None


@lru_cache(1)
def read_slides(table: Path) -> tuple[dict[str, list[Slide]], list[str]]:
    """The slides of each split, and the names of the labels."""
    inner = table.parent / "h5_files"
    folder = inner if inner.is_dir() else table.parent
    rows = dict[str, tuple[int, dict[str, str]]]()
    for number, row in csv_table(table, "slide_id", "label"):
        name, split = row["slide_id"], row.get("split")
        if name in rows:
            fail(table, number, f"slide_id: {name} is there twice")
        if split is not None and split not in SPLITS:
            fail(table, number, f"split: expected one of {', '.join(SPLITS)}; got {split!r}")
        if not row["label"]:
            fail(table, number, "label: expected one; got nothing")
        rows[name] = number, row
    others = sorted({file.stem for file in folder.glob("*.h5")} - rows.keys())
    if others:
        more = " and others" * (len(others) > 5)
        fail(table, None, f"expected a row for each file; there is none for {', '.join(others[:5])}{more}")
    divided = any("split" in row for _, row in rows.values())
    validation = any(SPLITS.get(row.get("split", "")) == VALIDATION for _, row in rows.values())
    names = sorted({row["label"] for _, row in rows.values()})
    slides: dict[str, list[Slide]] = {TRAIN: [], VALIDATION: [], TEST: []}
    width = None
    for name, (number, row) in rows.items():
        file = folder / f"{name}.h5"
        if not file.is_file():
            fail(table, number, f"slide_id: there is no {file}")
        slide = Slide(file, names.index(row["label"]), *measure(file))
        width = width or slide.width
        if slide.width != width:
            fail(file, None, f"features: expected {width} a patch, as in the slides before; got {slide.width}")
        slides[split_of(row, divided, validation)].append(slide)
    for split, some in slides.items():
        missing = [name for i, name in enumerate(names) if i not in {slide.label for slide in some}]
        if missing or len(names) < 2:
            fail(table, None, f"expected two labels at least, and slides of each for {split}; got none of {missing}")
    return slides, names


def make_slides(table: Path, device: torch.device) -> Task:
    """Name the label of a slide."""
    slides, names = read_slides(table)

    def build(arm: str) -> nn.Module:
        encoder = nn.Sequential(nn.Linear(slides[TRAIN][0].width, 512), nn.ReLU())
        if arm == "max":
            return MaxMIL(encoder, 512, len(names)).to(device)
        return GatedMIL(encoder, 512, 256, len(names), attention=arm == "attention").to(device)

    def collate(split: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and where slides end."""
        some = [slides[split][i] for i in rows.tolist()]
        features = torch.cat([cast("Tensor", load(slide.file, "features")) for slide in some]).float()
        ends = torch.tensor([0, *(slide.patches for slide in some)]).cumsum(0).int()
        return features.to(device), ends.to(device)

    def answer(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Answer:
        return Answer(model(*batch))

    def panels(model: nn.Module) -> list[Panel]:
        """The patches with most weight."""
        shown = []
        for i, slide in enumerate(slides[TEST][:3]):
            logits, weights = model(*collate(TEST, torch.tensor([i])), return_weights=True)
            most = weights.topk(min(ATTENDED, len(weights)))
            rest = (1 - most.values.sum()).clamp(min=0)[None]
            places = load(slide.file, "coords")
            patches = [
                f"patch {j}" if places is None else f"{tuple(places[j].tolist())}" for j in most.indices.tolist()
            ]
            title = f"{slide.file.stem}: {names[slide.label]}, taken for {names[int(logits.argmax())]}"
            columns = [*patches, f"the other {len(weights) - len(patches)}"]
            shown.append(Panel(title, torch.cat([most.values, rest])[None], ["attention"], columns))
        return shown

    parts = {
        split: Part(torch.tensor([x.label for x in some]), torch.tensor([x.patches for x in some]))
        for split, some in slides.items()
    }
    return classify(
        build,
        parts,
        collate,
        answer,
        panels,
        batch=1,
        device=device,
        metric=auc,
        arms=("attention", "uniform", "max"),
        setting=Setting(2e-4, 1e-5),
        epochs=100,
    )


def make(path: Path, seed: int, device: torch.device) -> Task:
    """The task of what is there."""
    name, file = choose(path, FORMATS)
    return make_bags(file, device) if name == "MNIST" else make_slides(file, device)

"""Features of images from a small student, computed once and kept in a file.

The student (``models/student.py`` with scope ``batch``, so that the graph head is trained too) sees only the old
classes. For each part, x, z, the logits of the self path and the labels are kept:

    train, calibration, test     images of the old classes; calibration images are never trained on
    pool, new_test               images of the classes left out: to add, and to test with
    noise_*, blur_*, other       the old classes' test images with Gaussian noise or blur, and another set

Class numbers: old classes 0 … C−1, then the new ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import simplejpeg
import torch
import torch.nn.functional as F
from kept_files import digest, made_from

from cnn2gnn_dist import models
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.models.student import Student, StudentOutput

NOVEL = [
    "n01930112",
    "n01981276",
    "n02099601",
    "n02110063",
    "n02110341",
    "n02116738",
    "n02129165",
    "n02219486",
    "n02443484",
    "n02871525",
    "n03127925",
    "n03146219",
    "n03272010",
    "n03544143",
    "n03775546",
    "n04146614",
    "n04149813",
    "n04418357",
    "n04522168",
    "n07613480",
]
"""Mini-ImageNet's test classes (Ravi and Larochelle, 2017)."""
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
DIM, GRAPH_DIM, HIDDEN, BATCH, RATE = 160, 64, 160, 256, 4e-3
WIDTHS, EPOCHS = (16, 64, 128), 8


@dataclass
class Images:
    """Pixels uint8 [N, S, S, 3] and labels int64 [N] of the parts of a data set."""

    classes: list[str]
    old: int
    pixels: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def read(files: list[Path], size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pixels [N, size, size, 3], labels [N] and class names of Parquet files in the Hub's layout."""
    import json

    table = pq.ParquetFile(files[0])
    names = json.loads(table.schema_arrow.metadata[b"huggingface"])["info"]["features"]["label"]
    pixels, labels = [], []
    for file in files:
        columns = pq.read_table(file)
        for cell in columns["image"].to_pylist():
            image = simplejpeg.decode_jpeg(cell["bytes"])
            if image.shape[0] != size:
                nchw = torch.from_numpy(image).permute(2, 0, 1)[None].float()
                small = F.interpolate(nchw, (size, size), mode="bilinear", antialias=True)
                image = small[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
            pixels.append(image)
        labels.append(columns["label"].to_numpy())
    return np.stack(pixels), np.concatenate(labels).astype(np.int64), list(names["names"])


def split(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    names: list[str],
    new: list[str],
    calibration: int,
    test: int,
) -> Images:
    """Parts of a data set with classes left out.

    Args:
        first, second: pixels and labels of the training files and of the test files.
        names: class names.
        new: names of the classes left out.
        calibration: training images of each old class set apart for calibration.
        test: training images of each class used as test images, in addition to the test files.
    """
    order = [name for name in names if name not in new] + new
    number = np.array([order.index(name) for name in names])
    old = len(names) - len(new)
    pixels = np.concatenate([first[0], second[0]])
    labels = number[np.concatenate([first[1], second[1]])]
    held_out = np.arange(len(labels)) >= len(first[1])
    rng = np.random.default_rng(0)
    part = np.full(len(labels), "", dtype=object)
    for c in range(len(names)):
        mine = rng.permutation(np.flatnonzero((labels == c) & ~held_out))
        rest = np.flatnonzero((labels == c) & held_out)
        tested, mine = np.concatenate([mine[:test], rest]), mine[test:]
        part[tested] = "test" if c < old else "new_test"
        if c < old:
            part[mine[:calibration]] = "calibration"
            part[mine[calibration:]] = "train"
        else:
            part[mine] = "pool"
    parts = ("train", "calibration", "test", "pool", "new_test")
    return Images(
        order, old, {p: pixels[part == p] for p in parts}, {p: labels[part == p] for p in parts}
    )


def cifar10(data: Path, new: list[str]) -> Images:
    """CIFAR-10 with classes left out, together with shifted images."""
    folder = data / "cifar10"
    train = read(sorted(folder.glob("train*.parquet")), 32)
    test = read(sorted(folder.glob("test*.parquet")), 32)
    images = split(train[:2], test[:2], train[2], new, calibration=500, test=0)
    clean = images.pixels["test"][::2].astype(np.float32)
    rng = np.random.default_rng(1)
    for sd in (15, 40):
        noisy = clean + rng.standard_normal(clean.shape, dtype=np.float32) * sd
        images.pixels[f"noise_{sd}"] = noisy.round().clip(0, 255).astype(np.uint8)
    for sigma in (1.0, 2.0):
        images.pixels[f"blur_{sigma:.0f}"] = blurred(clean, sigma)
    other = sorted((data / "mini-imagenet").glob("val*.parquet"))
    images.pixels["other"] = read(other, 32)[0]
    for shifted in images.pixels.keys() - images.labels.keys():
        images.labels[shifted] = np.full(len(images.pixels[shifted]), -1)
    return images


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Blur float32 [N, S, S, 3] by a Gaussian; return uint8."""
    reach = int(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1, 1)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).reshape(-1, 1, *pixels.shape[1:3])
    planes = F.pad(planes, (reach,) * 4, mode="reflect")
    planes = F.conv2d(F.conv2d(planes, kernel), kernel.transpose(2, 3))
    out = planes.reshape(-1, 3, *pixels.shape[1:3]).permute(0, 2, 3, 1)
    return out.round().clamp(0, 255).byte().numpy()


def mini_imagenet(data: Path) -> Images:
    """Mini-ImageNet at 42 pixels, with Ravi and Larochelle's test classes left out."""
    folder = data / "mini-imagenet"
    train = read(sorted(folder.glob("train*.parquet")), 42)
    test = read(sorted(folder.glob("val*.parquet")), 42)
    return split(train[:2], test[:2], train[2], NOVEL, calibration=40, test=40)


def network(images: Images, seed: int = 0) -> Student:
    """The student with its initial weights."""
    torch.manual_seed(seed)
    size = images.pixels["train"].shape[1]
    stem = build_stem("conv3", DIM, size, widths=WIDTHS)
    student = Student(stem, DIM, GRAPH_DIM, HIDDEN, images.old, 0, 10, "batch", MEAN, STD)
    return student.to(memory_format=torch.channels_last)


def optimization(
    student: Student, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and one cycle of learning rates over so many steps."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.02)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)


def answered(
    student: Student, batch: torch.Tensor, target: torch.Tensor
) -> tuple[StudentOutput, torch.Tensor]:
    """What the student says about uint8 [B, 3, S, S], crops and flips of them; cross-entropy of both paths."""
    batch = augmented(batch)
    bf16 = torch.cpu._is_avx512_bf16_supported()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = student(batch.permute(0, 2, 3, 1))
    loss = F.cross_entropy(out.logits_BC.float(), target)
    return out, loss + F.cross_entropy(out.self_logits_BC.float(), target)


def train(images: Images, epochs: int, seed: int = 0) -> Student:
    """Train a student on the old classes: cross-entropy of both paths, crops and flips."""
    student = network(images, seed)
    pixels = torch.from_numpy(images.pixels["train"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(images.labels["train"])
    optimizer, schedule = optimization(student, epochs * (len(labels) // BATCH))
    started = time.process_time()
    for epoch in range(epochs):
        order = torch.randperm(len(labels))
        total = 0.0
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = answered(student, pixels[rows], labels[rows])[1]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) / 2
        mean = total / (len(labels) // BATCH)
        print(
            f"epoch {epoch + 1}: loss {mean:.3f}, {time.process_time() - started:.0f} s", flush=True
        )
    return student.eval()


def augmented(batch: torch.Tensor) -> torch.Tensor:
    """Random crops with 4 pixels of padding, and flips, of uint8 [B, 3, S, S]."""
    count, _, size, _ = batch.shape
    padded = F.pad(batch.float(), (4,) * 4, mode="reflect").byte()
    down, right = torch.randint(0, 9, (2, count))
    across = torch.arange(size)
    columns = torch.where(torch.rand(count, 1) < 0.5, across, across.flip(0)) + right[:, None]
    rows = across + down[:, None]
    where = torch.arange(count)[:, None, None]
    return padded[where, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def features(student: Student, images: Images) -> dict[str, np.ndarray]:
    """x, z and logits of every part, as ``{part}/{name}``."""
    kept: dict[str, np.ndarray] = {"old": np.array(images.old), "classes": np.array(images.classes)}
    for part, pixels in images.pixels.items():
        columns: dict[str, list[torch.Tensor]] = {"x": [], "z": [], "logits": []}
        for start in range(0, len(pixels), 500):
            x, z = student.embed(torch.from_numpy(pixels[start : start + 500]))
            columns["x"].append(x)
            columns["z"].append(z)
            columns["logits"].append(student.gnn(x)[1])
        kept |= {f"{part}/{name}": torch.cat(column).numpy() for name, column in columns.items()}
        kept[f"{part}/labels"] = images.labels[part]
    return kept


def made_by(data: Path, which: str) -> str:
    """What the features of a data set are made from: the data, this module, and the student's."""
    of_data = {
        which.partition(":")[0],
        "mini-imagenet",
    }  # whose images are the odd ones of CIFAR-10
    files = [one for name in of_data for one in (data / name).glob("*.parquet")]
    code = [Path(__file__), *Path(models.__file__).parent.glob("*.py")]
    return digest(which, files=[*files, *code])


def load(file: Path, data: Path, which: str) -> dict[str, np.ndarray]:
    """Features of a data set, read from the file, or computed and written there: also if code or data are others now.

    Args:
        file: ``.npz``.
        data: folder of the data sets.
        which: ``mini-imagenet``, or ``cifar10:NEW,NEW`` with the classes left out.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with made_from(made_by(data, which), file) as missing:
        if missing:
            if which == "mini-imagenet":
                images = mini_imagenet(data)
            else:
                images = cifar10(data, which.partition(":")[2].split(","))
            np.savez(file.with_suffix(".part.npz"), **features(train(images, EPOCHS), images))
            file.with_suffix(".part.npz").rename(file)
    with np.load(file) as kept:
        return dict(kept)

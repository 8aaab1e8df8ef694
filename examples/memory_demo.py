"""Add a class to a trained model without training: a model of nine digits gets the tenth.

Trains on the digits 0 to 8, exports the model, adds 20 images of the digit 9 to its memory, and removes them
again. Prints the accuracy on the old digits and on the new one after each step.

    make demo-memory
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import cnn2gnn_dist
from cnn2gnn_dist.inference import editing

NEW, GIVEN = 9, 20
"""The digit that is added, and the number of images of it."""


def write_images(folder: Path) -> None:
    """Write the digits as PNGs: train/ and test/ by class, and those of the new digit to a separate folder."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    for label in range(10):
        rows = rng.permutation(np.flatnonzero(digits.target == label))
        first = GIVEN if label == NEW else int(0.75 * len(rows))
        for place, row in enumerate(rows):
            part = "train" if place < first else "test"
            name = f"new-{part}" if label == NEW else f"{part}/{label}"
            path = folder / name / f"digit-{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[row] / 16 * 255).astype(np.uint8)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR).save(path)


def train(root: Path) -> Path:
    """Train on nine digits; return the model's folder."""
    images, run = root / "images", root / "run"
    command = [str(Path(sys.executable).with_name("cnn2gnn")), "run", "--config", "demo", "name=nine-digits",
               "data.source=imagefolder", f"data.train={images / 'train'}", f"data.test={images / 'test'}",
               "data.calibration=0.15", "student.control=false", f"run.dir={run}"]  # fmt: skip
    subprocess.run(command, check=True)
    return run / "model"


def accuracies(model: cnn2gnn_dist.Classifier, images: Path) -> str:
    """Accuracy on held-out images of the old digits and of the new one."""
    old = [
        answer.label == label.name
        for label in sorted((images / "test").iterdir())
        for answer in model.predict(label)
    ]
    new = [answer.label == str(NEW) for answer in model.predict(images / "new-test")]
    return f"old digits {np.mean(old):7.2%} of {len(old)}   the {NEW} {np.mean(new):7.2%} of {len(new)}"


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-memory"))
    root = parser.parse_args().out
    shutil.rmtree(root / "images", ignore_errors=True)
    write_images(root / "images")
    shutil.rmtree(root / "model", ignore_errors=True)
    shutil.copytree(train(root), root / "model")

    model = cnn2gnn_dist.load(root / "model")
    print(f"\nas trained                {accuracies(model, root / 'images')}")
    done = editing.add(model, root / "images" / "new-train", str(NEW))
    print(f"{GIVEN} images of the {NEW} added  {accuracies(model, root / 'images')}")
    editing.remove(model, done.keys)
    print(f"removed again             {accuracies(model, root / 'images')}")
    print(f"\npredict  cnn2gnn predict --model {root / 'model'} IMAGE…")
    print(f"add      cnn2gnn memory add {root / 'model'} IMAGE… --class NAME")


if __name__ == "__main__":
    main()

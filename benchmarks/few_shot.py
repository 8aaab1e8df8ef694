"""Novel classes of Mini-ImageNet from a few images: 5-way episodes with the product's memory.

    python benchmarks/few_shot.py FOLDER
    python benchmarks/few_shot.py FOLDER --episodes 600 --preset mini_imagenet_cpu --set teacher.epochs=2      (a trial)

By Ravi and Larochelle's split (2017): the preset is trained on the 64 base classes alone (480 images each, 20 more for
evaluation). The run is exported, and each of 600 episodes draws 5 of the 20 novel classes, with 1 or 5 images each to
learn from and 15 to answer. Inductive: each query by the score of new classes with which ``memory add`` answers,
restricted to the episode's classes. Transductive: the 75 queries of an episode together, over the same scores, by rule
T's EM and by the learned network of ``predict --together``. For comparison: the nearest class mean, soft k-means (Ren
et al., ICLR 2018), LaplacianShot (Ziko et al., ICML 2020). Constants are chosen on episodes of the 16 validation
classes. FOLDER keeps the data, the run, the model and the features; when it is run again, it continues, and what was
made from another run is made again. Prints Markdown, mean ± 95 %
over episodes. Needs $CNN2GNN_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from kept_files import made_from
from remembering import episodes
from remembering.features import NOVEL
from tqdm import tqdm

from cnn2gnn_dist import durable, ledger
from cnn2gnn_dist.inference.classifier import Classifier, load
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory.old_classes import Images, OldClasses
from cnn2gnn_dist.inference.network import joined
from cnn2gnn_dist.inference.scoring import HeldOut
from cnn2gnn_dist.inference.sets.learned import LearnedSets
from cnn2gnn_dist.inference.sets.together import Together

VALIDATION = (
    "n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 "
    "n03075370 n03417042 n03535780 n03584254 n03770439 n03773504 n03980874 n09256479"
)
"""Mini-ImageNet's validation classes (Ravi and Larochelle, 2017)."""


def stage(folder: Path) -> None:
    """Write base-train, base-test and novel.parquet in the Hub's layout, unless they exist."""
    source = Path(os.environ["CNN2GNN_DATA"]) / "mini-imagenet"
    parts = {
        "train": sorted(source.glob("train*.parquet")),
        "val": sorted(source.glob("val*.parquet")),
    }
    names = _class_names(parts["val"][0])
    novel = [name for name in names if name.split()[0].rstrip(",") in NOVEL]
    validation = [name for name in names if name.split()[0].rstrip(",") in VALIDATION]
    base = [name for name in names if name not in {*novel, *validation}]
    if (len(base), len(validation), len(novel)) != (64, 16, 20):
        raise SystemExit(f"the class names ({names[0]}, …) are not those of Mini-ImageNet")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "base-train.parquet", parts["train"], names, base)
    _write(folder / "base-test.parquet", parts["val"], names, base)
    everything = [*parts["train"], *parts["val"]]
    _write(folder / "validation.parquet", everything, names, validation)
    _write(folder / "novel.parquet", everything, names, novel)


def _class_names(file: Path) -> list[str]:
    metadata = json.loads(pq.read_schema(file).metadata[b"huggingface"])
    label = metadata["info"]["features"]["label"]
    return list(label.get("names") or label["feature"]["names"])


def _write(target: Path, files: list[Path], names: list[str], kept: list[str]) -> None:
    if target.exists():
        return
    number = {names.index(name): place for place, name in enumerate(kept)}
    tables = []
    for file in files:
        table = pq.read_table(file)
        labels = [number.get(label, -1) for label in table["label"].to_pylist()]
        at = table.column_names.index("label")
        table = table.set_column(at, "label", pa.array(labels, pa.int64()))
        tables.append(table.filter(pa.compute.greater_equal(table["label"], 0)))
    joined = pa.concat_tables(tables)
    metadata = json.loads(joined.schema.metadata[b"huggingface"])
    metadata["info"]["features"]["label"]["names"] = kept
    joined = joined.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    partial = target.with_suffix(".tmp")
    pq.write_table(joined, partial, row_group_size=1000)
    partial.rename(target)


def train(folder: Path, preset: str, overrides: list[str]) -> Path:
    """Run the preset on the base classes, and export its student."""
    data = [f"data.train={folder}/base-train.parquet", f"data.test={folder}/base-test.parquet"]
    program = [sys.executable, "-m", "cnn2gnn_dist"]
    run = [*program, "run", "--config", preset, f"run.dir={folder}/run", *data, *overrides]
    subprocess.run(run, check=True)
    record = ledger.finished(folder / "run" / "model")
    assert record is not None, "the run is finished"
    model = folder / "model"
    with made_from(record.digest, model) as missing:
        if missing:
            export = [*program, "export", str(folder / "run"), "--to", str(model), "--force"]
            subprocess.run(export, check=True)
    return model


def features(folder: Path, model: Classifier, part: str) -> tuple[Images, np.ndarray]:
    """Features and labels of a part's images, kept in FOLDER."""
    kept, file = folder / f"{part}.npz", folder / f"{part}.parquet"
    with made_from(durable.sha256(Path(model.folder) / artefact.CHECKSUMS), kept) as missing:
        if missing:
            _compute(model, file, kept)
    with np.load(kept) as arrays:
        images = Images(arrays["logits"], arrays["x"])
    return images, pq.read_table(file)["label"].to_numpy()


def _compute(model: Classifier, file: Path, kept: Path) -> None:
    rows, made = pq.ParquetFile(file).metadata.num_rows, []
    with tqdm(total=rows, desc=f"features of {file.stem}", unit="image", disable=None) as bar:
        for many in model.batches(str(file), 64):
            made.append(model.outputs(many))
            bar.update(len(many))
    both = joined(made)
    np.savez(kept.with_suffix(".tmp.npz"), x=both.x, logits=both.logits)
    kept.with_suffix(".tmp.npz").rename(kept)


def print_table(
    folder: Path, model: Classifier, count: int, ways: int = 5, queries: int = 15
) -> None:
    """Accuracy of every rule over the episodes of the novel classes."""
    held_out = HeldOut.read(model.folder)
    memory = model.required_memory()
    assert held_out is not None
    calibration, labels_n = held_out.images, held_out.labels_n
    rows = memory.live_ids
    old = OldClasses.fit(memory.x(rows), memory.labels[rows], calibration, labels_n)
    fitted_on = calibration.logits_nC, old.features(calibration.x_nD).f_BD, labels_n
    rules = LearnedSets.fit(*fitted_on), Together.fit(*fitted_on)
    parts = {
        part: episodes.Features(old, *features(folder, model, part))
        for part in ("validation", "novel")
    }
    print(f"| {ways} classes, {count} episodes | 1 image | 5 images |")
    print("| --- | --- | --- |")
    cells_of: dict[str, list[str]] = {}
    for shots in (1, 5):

        def drawn(part: str, many: int, shots: int = shots) -> list[episodes.Episode]:
            labels = parts[part].labels
            return [episodes.draw(labels, ways, shots, queries, i) for i in range(many)]

        def scored(of: episodes.Features, episode: episodes.Episode) -> np.ndarray:
            return episodes.product_scores(old, calibration, labels_n, of, episode)

        val = parts["validation"]
        fitted = episodes.fit(lambda e, val=val: scored(val, e), val, drawn("validation", 100))
        found: dict[str, list[float]] = {}
        for episode in tqdm(drawn("novel", count), desc=f"{shots} images", disable=None):
            novel = parts["novel"]
            made = episodes.answers(novel, episode, scored(novel, episode), rules, fitted)
            for name, answer in made:
                found.setdefault(name, []).append(100 * float((answer == episode.labels).mean()))
        for name, each in found.items():
            error = 1.96 * np.std(each) / len(each) ** 0.5
            cells_of.setdefault(name, []).append(f"{np.mean(each):.2f} ± {error:.2f}")
    for name, cells in cells_of.items():
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="mini_imagenet_cpu")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE"
    )
    parser.add_argument("--episodes", type=int, default=600)
    given = parser.parse_args()
    folder = given.folder.resolve()
    stage(folder)
    print_table(folder, load(train(folder, given.preset, given.overrides)), given.episodes)


if __name__ == "__main__":
    main()

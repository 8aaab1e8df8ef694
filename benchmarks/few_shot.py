"""Novel classes of Mini-ImageNet from a few images: 5-way episodes through the product's memory.

    python benchmarks/few_shot.py FOLDER
    python benchmarks/few_shot.py FOLDER --episodes 600 --preset mini_imagenet_cpu --set teacher.epochs=2      (a trial)

Ravi and Larochelle's split (2017): the preset is trained on the 64 base classes alone (480 images each, 20 more to
evaluate); the 16 validation classes are not used. The run is exported, and each of 600 episodes draws 5 of the 20
novel classes, 1 or 5 images each to learn from and 15 to answer. Inductive: each query by the score of new classes
(``new_classes.py``), which is what ``memory add`` answers with, restricted to the episode's classes. Transductive: an
episode's 75 queries together, by the rule's EM over the same scores with edges between alike queries; shares of the
classes are not assumed to be equal. Beside both: the nearest class mean, the same with all queries assigned by soft
k-means, and LaplacianShot's propagation (Ziko et al., ICML 2020). FOLDER keeps the data, the run and the model: run
again, it continues. Prints Markdown, mean ± 95 % over episodes. Needs $CNN2GNN_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from remembering.features import NOVEL

VALIDATION = """
n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792
n03075370 n03417042 n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
""".split()
"""Mini-ImageNet's validation classes (Ravi and Larochelle, 2017)."""


def stage(folder: Path) -> None:
    """Write base-train, base-test and novel.parquet, in the Hub's layout, unless they are there."""
    source = Path(os.environ["CNN2GNN_DATA"]) / "mini-imagenet"
    parts = {"train": sorted(source.glob("train*.parquet")), "val": sorted(source.glob("val*.parquet"))}
    names = _class_names(parts["val"][0])
    base = [n for n in names if n.split(",")[0].split()[0] not in {*NOVEL, *VALIDATION}]
    novel = [n for n in names if n.split(",")[0].split()[0] in NOVEL]
    if (len(base), len(novel)) != (64, 20):
        raise SystemExit(f"{len(base)} base and {len(novel)} novel classes among {names[:3]} …: another split")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "base-train.parquet", parts["train"], names, base)
    _write(folder / "base-test.parquet", parts["val"], names, base)
    _write(folder / "novel.parquet", [*parts["train"], *parts["val"]], names, novel)


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
    model = folder / "model"
    if not model.exists():
        subprocess.run([*program, "export", str(folder / "run"), "--to", str(model)], check=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="mini_imagenet_cpu")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--episodes", type=int, default=600)
    given = parser.parse_args()
    folder = given.folder.resolve()
    stage(folder)


if __name__ == "__main__":
    main()

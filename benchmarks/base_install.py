"""A model in an environment that has only what inference needs: installed, run, timed.

    python benchmarks/base_install.py FOLDER MODEL IMAGE [--torch "torch==2.13.0"] [--rounds 5]

Creates a virtual environment in FOLDER (kept for the next time), installs torch and then this checkout without extras,
and checks that no package for training or serving was installed with it, that the commands of ``COMMANDS`` exit with 0,
and that those that need an extra name it and exit with 2. Then it prints seconds of processor time (medians; on a busy
machine wall time says little) of ``import cnn2gnn_dist``, of ``import torch``, and of a first answer in Python and on
the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABSENT = {
    *(
        "ray",
        "deepspeed",
        "dgl",
        "pandas",
        "webdataset",
        "scikit-learn",
        "tensorboard",
        "matplotlib",
    ),
    *("fastapi", "uvicorn", "prometheus-client", "onnx", "onnxruntime", "aiohttp", "s3fs"),
}
COMMANDS = (
    "predict --help",
    "predict --model {model} {image}",
    "predict --model {model} {image} --out {out}/answers.parquet",
    "predict --model {model} {image} --out {out}/answers.html",
    "embed --model {model} {image} --out {out}/z.parquet",
    "memory ls {model}",
    "memory add {model} {image} --class new",
    "memory undo {model}",
    "audit {model} --out {out}/audit",
    "export {model} --to {out}/exported",
    "export {model} --to {out}/programs --torch-export",
    "plan --images 1000",
    "config",
)
NEED_EXTRAS = ("run --config demo", "serve {model}", "export {model} --to {out}/onnx --onnx")
FIRST = "import cnn2gnn_dist, sys; cnn2gnn_dist.load(sys.argv[1]).predict([sys.argv[2]])"


def install(folder: Path, torch: str) -> Path:
    """Create the environment if it is missing, and install this checkout into it; return its ``bin``."""
    programs = folder / "bin"
    pip = [
        str(programs / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    if not programs.is_dir():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, *torch.split()], check=True)
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, "--force-reinstall", "--no-deps", str(ROOT)], check=True)
    subprocess.run([*pip, *constraints, str(ROOT)], check=True)
    return programs


def check_absent(programs: Path) -> None:
    """Check that nothing was installed that inference does not need."""
    listed = subprocess.run(
        [programs / "python", "-m", "pip", "list", "--format", "json"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    names = {one["name"].lower() for one in json.loads(listed)}
    assert not names & ABSENT, names & ABSENT
    print(f"{len(names)} packages, none of {', '.join(sorted(ABSENT))}")


def check_commands(programs: Path, model: Path, image: Path, out: Path) -> None:
    """Run the commands; check that those that need an extra name it."""
    for commands, expected in ((COMMANDS, 0), (NEED_EXTRAS, 2)):
        for command in commands:
            words = [word.format(model=model, image=image, out=out) for word in command.split()]
            done = subprocess.run(
                [programs / "cnn2gnn", *words], capture_output=True, text=True, cwd=out
            )
            print(f"{done.returncode}  cnn2gnn {command}")
            assert done.returncode == expected, done.stderr
            assert expected == 0 or "[" in done.stderr.partition("remedy:")[2], done.stderr


def seconds(command: list[str], rounds: int) -> str:
    """Median processor time and median wall time of a command."""
    spent, taken = [], []
    for _ in range(rounds):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(time.monotonic() - began)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return (
        f"{statistics.median(spent):.2f} s of the processor ({min(spent):.2f} at least), "
        f"{statistics.median(taken):.2f} s by the clock"
    )


def main() -> None:
    """Install, check, time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument(
        "--torch", default="torch==2.13.0", help="arguments for pip, including an index"
    )
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)
    programs = install(given.folder.resolve(), given.torch)
    check_absent(programs)
    out = given.folder.resolve() / "out"
    shutil.rmtree(out, ignore_errors=True)
    model = Path(shutil.copytree(given.model, out / "model"))
    image = given.image.resolve()
    check_commands(programs, model, image, out)
    python = str(programs / "python")
    for name, command in {
        "python -c pass": [python, "-c", "pass"],
        "import cnn2gnn_dist": [python, "-c", "import cnn2gnn_dist"],
        "import torch": [python, "-c", "import torch"],
        "load and predict": [python, "-c", FIRST, str(model), str(image)],
        "cnn2gnn predict": [
            str(programs / "cnn2gnn"),
            "predict",
            "--model",
            str(model),
            str(image),
        ],
    }.items():
        print(f"{name}: {seconds(command, given.rounds)}", flush=True)


if __name__ == "__main__":
    main()

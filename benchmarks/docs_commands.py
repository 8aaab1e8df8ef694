"""Run the commands of README.md and docs/*.md as a newcomer would: in a fresh clone, one by one.

    python benchmarks/docs_commands.py                       the clone sets up its own .venv (make install)
    python benchmarks/docs_commands.py --venv PATH           with an existing one
    python benchmarks/docs_commands.py --venv PATH --long    also those that take many minutes
    python benchmarks/docs_commands.py --check               only whether they could run: files, options, fields

Commands are lines of fenced blocks and code in sentences that begin with a program of PROGRAMS. KINDS says which of
them are not run, and why; a pattern there that no longer matches any command is a failure too. PRINTS is what a command
prints according to the docs. It ends with a table; exit code 1 if something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

PROGRAMS = ("cnn2gnn", "python", "torchrun", "deepspeed", "srun", "ray", "make", "pip")
OWN = "my.yaml"  # what `cnn2gnn init` writes: its contents are not fixed
KINDS: list[tuple[str, str, str]] = [  # pattern of the command, kind, why
    (r"^cnn2gnn$|^(python|ray job stop|ray start --head|ray up)$", "name", "a program's name, not a call"),
    (r"^(torchrun -m cnn2gnn_dist.launcher|python -m cnn2gnn_dist.submit)$", "name", "named in a sentence"),
    (r"^cnn2gnn (?!doctor|config)\w+( --run)?$", "name", "named in a sentence, without its arguments"),
    (r"^cnn2gnn export( RUN| --onnx)", "name", "named in a sentence"),
    (r"cluster.address=HEAD|^(srun|torchrun --nnodes|ray up) |HOST_1|^cnn2gnn doctor --cluster", "no",
     "needs several hosts: tests/end_to_end/test_slurm.py, test_deepspeed_hosts.py, docs/cluster.md"),
    (r"^ray job submit|^python launch/submit.py|^cnn2gnn submit|^ray (start|job|symmetric-run|stop|dashboard)", "no",
     "needs a Ray cluster: test_ways_in.py"),
    (r"^cnn2gnn plan", "short", ""),
    (r"config (cifar10|mini_imagenet|mini_imagenet_cpu|imagenet)( |$)", "no", "needs a data set, and an hour or a GPU"),
    (r"^cnn2gnn serve", "no", "serves until it is stopped: tests/end_to_end/test_serve.py"),
    (r"^cnn2gnn init photos", "long", "measures for some minutes"),
    (r"^cnn2gnn run --config my\.yaml", "long", "what init wrote: up to half an hour"),
    (r"data.relabel=", "long", "a complete demo"),
    (r"^make demo-memory$", "long", "trains for some minutes"),
    (r"^make demo$", "demo", "the first: others use its run"),
    (r"^cnn2gnn run --config demo$", "demo", "again: skips complete stages"),
    (r"^cnn2gnn student --config demo$", "demo", ""),
    (r"runs/demo|--model (model/|MODEL)|^cnn2gnn export MODEL|^cnn2gnn memory ", "demo", "uses the demo's run"),
    (r"requirements-build", "long", "compiles for about 25 minutes"),
    (r"^pip install|^make partial|bin/pip install", "install", "into the clone's own .venv; not with --venv"),
    (r"make (test|quick|lint|docs|install)", "long", "all tests, or the unit tests, or an install"),
    (r"^make demo TORCH=", "no", "needs the index of a CUDA version"),
    (r"^(deepspeed|torchrun) .*launch/train.py .*--config demo", "long", "a complete demo: test_ways_in.py"),
    (r"python benchmarks/\w+\.py", "long", "minutes to an hour"),
]  # fmt: skip
PRINTS = [  # pattern of the command, pattern of what it prints
    (r"^make demo$", r"(?s)teacher.*student.*report\.html"),
    (r"^cnn2gnn run --config demo$", r"complete, skipped"),
    (r"student.epochs=20 --dry-run$", r"(?s)epochs: 20.*student +(to run|stale)"),
    (r"^cnn2gnn predict --model \S+ image\.png", r"image\.png"),
    (r"^cnn2gnn predict .* images/", r"digit-0"),
    (r"^cnn2gnn (predict|embed) .* --out", r"answers|rows|\d+"),
    (r"^cnn2gnn memory ls", r"images, version"),
    (r"^cnn2gnn memory add", r"lynx"),
    (r"^cnn2gnn audit", r"audit"),
    (r"^cnn2gnn checkpoint ls", r"(?s)teacher.*student"),
    (r"^cnn2gnn checkpoint verify", r"complete"),
    (r"^cnn2gnn config$", r"student\.epochs"),
    (r"^cnn2gnn doctor$", r"torch"),
    (r"^cnn2gnn plan", r"(?i)bytes|GiB|GB|MB"),
]
PLACEHOLDERS = {
    "FOLDER": "scratch",
    "RUN": "runs/demo",
    "MODEL": "runs/demo",
    "N": "1281167",
    "D": "128",
    "P": "8",
}


@dataclass(frozen=True)
class Command:
    """One command of the docs: its location, its text without comment, its kind and the reason."""

    place: str
    text: str
    kind: str
    why: str


def commands(root: Path = REPOSITORY) -> list[Command]:
    """All commands of README.md, CONTRIBUTING.md and docs/*.md in reading order, each text once per file."""
    found: dict[tuple[str, str], Command] = {}
    for file in [
        root / "README.md",
        root / "CONTRIBUTING.md",
        *sorted((root / "docs").glob("*.md")),
    ]:
        for number, text in _texts(file.read_text(encoding="utf-8")):
            kind, why = kind_of(text)
            name = str(file.relative_to(root))
            found.setdefault((name, text), Command(f"{name}:{number}", text, kind, why))
    return list(found.values())


def kind_of(text: str) -> tuple[str, str]:
    """Kind of a command, and the reason; "short" unless KINDS says otherwise."""
    if "…" in text:
        return "name", "left open"
    for pattern, kind, why in KINDS:
        if re.search(pattern, text):
            return kind, why
    return "short", ""


def stale_patterns(found: list[Command]) -> list[str]:
    """Patterns of KINDS and PRINTS that match no command of the docs."""
    patterns = [each[0] for each in (*KINDS, *PRINTS)]
    return [p for p in patterns if not any(re.search(p, one.text) for one in found)]


def _texts(markdown: str) -> Iterator[tuple[int, str]]:
    fenced = ""
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = "" if fenced else (line.strip("` ") or "sh")
            continue
        texts = (
            [line.strip()] if fenced == "sh" else [] if fenced else re.findall(r"`([^`]+)`", line)
        )
        for text in texts:
            plain = _without_comment(text)
            words = plain.split()
            while words and re.match(r"[A-Z_0-9]+=", words[0]):
                words.pop(0)
            if words and words[0] in PROGRAMS and (len(words) > 1 or fenced):
                yield number, plain


def _without_comment(text: str) -> str:
    return re.sub(r"\s+#\s.*$", "", text).strip()


# Could a command run?


def fault(command: Command, root: Path = REPOSITORY) -> str:
    """Why a command can't work as written; "" if no fault is found."""
    if command.kind == "name":
        return ""
    words = shlex.split(filled(command.text))
    while re.match(r"[A-Z_0-9]+=", words[0]):
        words.pop(0)
    program, rest = words[0], words[1:]
    if program == "make":
        return _make_fault(rest, root)
    if program == "pip":
        return _pip_fault(rest, root)
    if program == "cnn2gnn":
        return _cli_fault(rest)
    script = next((word for word in rest if word.endswith(".py")), None)
    if script is not None:
        if not (root / script).is_file():
            return f"no file {script}"
        after = rest[rest.index(script) + 1 :]
        if script.startswith("launch/"):
            return _config_fault(after, _ranks(rest))
        return _option_fault(after, root / script)
    if "cnn2gnn_dist.launcher" in rest:
        return _config_fault(rest[rest.index("cnn2gnn_dist.launcher") + 1 :], _ranks(rest))
    if "cnn2gnn_dist" in rest:
        return _cli_fault(rest[rest.index("cnn2gnn_dist") + 1 :])
    return ""


def filled(text: str) -> str:
    """A command with its placeholders filled in."""
    return " ".join(PLACEHOLDERS.get(word, word) for word in text.split(" "))


def _make_fault(rest: list[str], root: Path) -> str:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for word in rest:
        name = word.partition("=")[0]
        target = rf"(?m)^{re.escape(name)}( +\?=|:)" if "=" not in word else rf"(?m)^{name} +\?="
        if not re.search(target, makefile):
            return f"the Makefile has no {name}"
    return ""


def _pip_fault(rest: list[str], root: Path) -> str:
    for word in rest[1:]:
        if word.endswith(".txt") and not (root / word).is_file():
            return f"no file {word}"
        extra = re.fullmatch(r"\.\[(\w+)\]", word)
        if extra and f"\n{extra[1]} = [" not in (root / "pyproject.toml").read_text("utf-8"):
            return f"pyproject.toml has no extra {extra[1]}"
        if word.startswith("cnn2gnn"):
            return "the package is on no index: pip install . from a clone"
    return ""


def _cli_fault(rest: list[str]) -> str:
    from cnn2gnn_dist import cli, settings
    from cnn2gnn_dist.errors import UserError
    from cnn2gnn_dist.stages.shared import preflight

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            arguments = cli._parse(rest)
        of_a_model = getattr(arguments, "model", None) is not None  # evaluate --model MODEL IMAGES
        if getattr(arguments, "overrides", None) is not None and not of_a_model:
            own = None if arguments.config == OWN else arguments.config
            config = settings.load(own, arguments.overrides)
            if rest[0] in ("run", *cli.STAGES):
                preflight.check(
                    config, [rest[0]] if rest[0] in cli.STAGES else cli.STAGES, config.run.ranks
                )
    except UserError as error:
        return " ".join(str(error).split())
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    return ""


def _ranks(rest: list[str]) -> int:
    """Ranks that torchrun or deepspeed starts; a hostfile's are the user's: as many as in docs/cluster.md."""
    options = dict(itertools.pairwise(rest))
    if "--hostfile" in options:
        page = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
        return sum(int(slots) for slots in re.findall(r"(?m)^HOST_\d slots=(\d+)", page))
    hosts = int(options.get("--nnodes", 1))
    return hosts * int(options.get("--nproc_per_node") or options.get("--num_gpus") or 1)


def _config_fault(rest: list[str], ranks: int) -> str:
    from cnn2gnn_dist import cli, settings
    from cnn2gnn_dist.errors import UserError
    from cnn2gnn_dist.stages.shared import preflight

    overrides = [word for word in rest if re.match(r"[a-z_.]+=", word)]
    source = rest[rest.index("--config") + 1] if "--config" in rest else "demo"
    try:
        preflight.check(settings.load(source, overrides), cli.STAGES, ranks)
    except UserError as error:
        return " ".join(str(error).split())
    return ""


def _option_fault(rest: list[str], script: Path) -> str:
    source = script.read_text(encoding="utf-8")
    unknown = [word for word in rest if word.startswith("--") and f'"{word}"' not in source]
    return f"{script.name} has no {' '.join(unknown)}" if unknown else ""


# Running them


def clone(folder: Path, venv: Path | None) -> Path:
    """A fresh clone of the last commit, with an environment."""
    root = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(root)], check=True)
    if venv is None:
        subprocess.run(["make", "install"], cwd=root, check=True)
        return root
    (root / ".venv").symlink_to(venv.resolve())
    for name in (
        "constraints.txt",
        "pyproject.toml",
    ):  # not newer than the environment: nothing to install
        os.utime(root / name, (0, 0))
    return root


def run(command: Command, root: Path, seconds: float) -> tuple[str, str, float]:
    """Outcome ("ok" or what went wrong), output and seconds of a command."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["PATH"] = f"{root / '.venv' / 'bin'}:{environment['PATH']}"
    environment["PYTHONPATH"] = str(root)  # an existing environment may have another checkout
    environment["HOME"] = str(root / "scratch" / "home")  # the user's files are not touched
    (root / "scratch" / "home").mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            ["bash", "-c", filled(command.text)],
            cwd=root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {seconds:.0f} s", "", seconds
    took = time.monotonic() - begin
    if done.returncode:
        return f"exit code {done.returncode}", done.stdout, took
    for pattern, wanted in PRINTS:
        if re.search(pattern, command.text) and not re.search(wanted, done.stdout):
            return f"does not print {wanted!r}", done.stdout, took
    return "ok", done.stdout, took


def write_images(root: Path) -> None:
    """Write the images in the docs' commands: digits, and, for a new class, digits on white."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    zeros = np.flatnonzero(digits.target == 0)
    wanted = {"image.png": digits.images[0]}
    wanted |= {f"images/digit-{row}.png": digits.images[row] for row in range(12)}
    wanted |= {f"burst/{row}.png": digits.images[row] for row in zeros[:6]}
    wanted |= {f"photos/{row}.png": 16 - digits.images[row] for row in range(100, 120)}
    for name, pixels in wanted.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        picture = Image.fromarray((pixels * 15).astype(np.uint8))
        picture.resize((32, 32)).convert("RGB").save(path)


def copy_shards(root: Path) -> None:
    """Copy the shards and decisions in the docs' commands from the demo's run."""
    found = sorted((root / "runs" / "demo" / "shards").glob("*.tar"))
    if (root / "shards").exists() or not found:
        return
    (root / "shards").mkdir()
    for shard in found[:2]:
        shutil.copy(shard, root / "shards")
    shutil.copy(found[0], root / "shard.tar")
    train = next(shard for shard in found if shard.name.startswith("train-"))
    with tarfile.open(train) as members:
        key = members.getnames()[0].partition(".")[0]
    (root / "labels.csv").write_text(f"key,class\n{key},drop\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="run nothing")
    parser.add_argument("--short", action="store_true", help="skip the demo and what needs it")
    parser.add_argument("--long", action="store_true", help="also those that take many minutes")
    parser.add_argument("--venv", type=Path, help="environment to use; default: make install")
    parser.add_argument("--seconds", type=float, default=1200, help="time limit of a short command")
    options = parser.parse_args()
    found = commands()
    faults = {one: fault(one) for one in found}
    stale = stale_patterns(found)
    kinds = [] if options.check else ["short"]
    kinds += [] if options.check or options.short else ["demo"]
    kinds += ["long"] if options.long else []
    kinds += ["install"] if kinds and options.venv is None else []
    rows: list[tuple[Command, str, float]] = []
    known: dict[str, str] = {}  # a command that occurs in two files is run once
    with tempfile.TemporaryDirectory(prefix="docs-commands-") as folder:
        root = clone(Path(folder), options.venv) if kinds else REPOSITORY
        if kinds:
            write_images(root)
        # `make demo` comes first in README, so commands that use its run come after it.
        for one in sorted(found, key=lambda each: each.text != "make demo"):
            outcome, took = faults[one] or (f"not run: {one.why}" if one.why else "not run"), 0.0
            if one.kind in kinds and not faults[one]:
                if one.text not in known:
                    copy_shards(root)
                    seconds = 36000 if one.kind == "long" else options.seconds
                    outcome, output, took = run(one, root, seconds)
                    known[one.text] = outcome
                    if outcome != "ok":
                        print(f"\n$ {one.text}\n{output[-3000:]}", file=sys.stderr)
                outcome = known[one.text]
            rows.append((one, outcome, took))
            print(f"{one.kind:8} {took:6.1f} s  {outcome:40} {one.place:24} {one.text}", flush=True)
    failed = [row for row in rows if row[1] != "ok" and not row[1].startswith("not run")]
    print(f"\n{len(rows)} commands: {sum(row[1] == 'ok' for row in rows)} passed, "
          f"{len(failed)} failed, {sum(row[1].startswith('not run') for row in rows)} not run")  # fmt: skip
    for pattern in stale:
        print(f"no command matches {pattern!r} any more: remove it from KINDS or PRINTS")
    return 1 if failed or stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""``cnn2gnn predict --out FOLDER/``: a file of answers per shard, over ranks or Ray actors, resumable.

Under torchrun, DeepSpeed's launcher or srun the inputs are dealt to the ranks in turn; a single process
takes them all. The ranks form no process group: none waits for another, except that under torchrun, which stops
all ranks when one exits with 1, such a rank waits for the others first. With ``--actors`` the actors of a
Ray cluster take the inputs instead, each the next one when it is done. A file of answers is complete or
absent; an existing one of the input as it is now (``answered.py``) is skipped, so the same command resumes
after an interruption. An input that can't be read, such as a shard that was cut off, has none, and costs the
others nothing: it is named at the end.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnn2gnn_dist import durable
from cnn2gnn_dist.commands.answers import answered
from cnn2gnn_dist.commands.answers.answer_files import KINDS, writer_of
from cnn2gnn_dist.commands.model.opening import opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.inputs import Input, complaint, expand
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.network import device_of_rank
from cnn2gnn_dist.log import counted, output, progress, report_error, set_rank
from cnn2gnn_dist.runtime.failed_rank import wait_for_others
from cnn2gnn_dist.runtime.ranks import Ranks

NOTE = "answers.json"
"""File in the folder: the model and the options that its answers come from."""
NEIGHBOURS = 5
Task = tuple[str, Path]
"""An input and its file of answers."""
Note = dict[str, Any]
"""Content of ``NOTE``."""
Total = tuple[int, int, list[UserError]]
"""Numbers of images and of those that could not be read; why inputs could not be read."""
_SOURCES = {"model": "from another model", "memory": "from another version of its memory"}
"""Of the note's fields, what else than options answers depend on; a new model also has another memory."""
_TOKEN = "[0-9a-f]" * 8
"""What tells files of one name apart that are being written (``durable.replacing``)."""


class Counted(NamedTuple):
    """Number of images in an input, and a message for each that could not be read; or why the input has no answers."""

    images: int
    failures: list[str]
    damage: UserError | None = None


class _Damaged(Exception):
    """An input can't be read, or not to its end."""

    def __init__(self, error: UserError) -> None:
        super().__init__(error)
        self.error = error


class Asked(NamedTuple):
    """Options of the answers: classes listed for each image, coverage of their sets."""

    top: int
    coverage: float | None


def command(
    model: Path,
    images: Sequence[str],
    folder: Path,
    *,
    kind: str = ".parquet",
    top: int = 3,
    coverage: float | None = None,
    actors: int = 0,
    address: str | None = None,
) -> int:
    """Answer each input into a file of its own; returns 1 if some images or inputs could not be read, now or before.

    Args:
        model: folder of a model or of a finished run.
        images: shards, Parquet files, folders or images.
        folder: created if it is missing.
        kind: format of the files, one of ``answer_files.KINDS``.
        top: classes listed for each image.
        coverage: also give sets of classes with this coverage.
        actors: Ray actors that share the inputs; 0: this process, or the ranks of its launcher.
        address: of their cluster; None: that of RAY_ADDRESS, or a cluster started here.

    Raises:
        UserError: not a model; two inputs with the same name; the folder has another model's answers, or
            those of another input with this name; no cluster, or not enough room on it.
    """
    ranks = Ranks.from_environment()
    if ranks.world_size > 1:
        set_rank(ranks.rank)
    targets = _targets(images, folder, kind)
    # The actors answer, on GPUs of their own: here, the model is only looked at.
    device = (
        "cpu"
        if actors
        else device_of_rank(ranks.local_rank, ranks.world_size, torch.cuda.device_count())
    )
    with opened(model, device) as classifier:
        classifier.coverage.check(coverage, classifier.memory)
        durable.create_folder(folder)
        asked = Asked(top, coverage)
        note = _note(classifier, asked)
        _check_note(folder, note)
        mine = list(targets.items())[ranks.rank :: ranks.world_size]
        left = [
            (given, target) for given, target in mine if not answered.is_answered(given, target)
        ]
        made: Iterator[Counted]
        if actors:
            made = _by_actors(classifier, left, note, asked, actors, address)
        else:
            made = map(partial(_answer, classifier, asked), left)
        total = _total(made, len(left), ranks.is_first)
    unanswered = set(left)
    code = _report(folder, [task for task in mine if task not in unanswered], left, total, ranks)
    wait_for_others(ranks, failed=code != 0)
    return code


def _report(folder: Path, before: list[Task], left: list[Task], total: Total, ranks: Ranks) -> int:
    """Print what was answered, before and now, and what could not be read; returns the exit code."""
    done, failed, damage = total
    already = f", {_inputs(len(before))} already answered" if before else ""
    failed += _report_unreadable(before)
    answers = f"{counted(done, 'image')} of {counted(len(left) - len(damage), 'input')}"
    share = f" (the share of rank {ranks.rank} of {ranks.world_size})" * (ranks.world_size > 1)
    output(f"answers  {folder}: {answers}{already}{share}")
    if damage:
        report_error(
            f"{_inputs(len(damage))} not answered; the same command answers what was repaired:"
        )
        for error in damage:
            report_error(error)
    return 1 if failed or damage else 0


def _inputs(count: int) -> str:
    return f"{counted(count, 'input')} {'was' if count == 1 else 'were'}"


def _total(made: Iterator[Counted], inputs: int, shown: bool) -> Total:
    """Have the inputs answered."""
    done, failed, damage = 0, 0, list[UserError]()
    with progress(made, "predict", total=inputs, unit="shard", disable=not shown) as bar:
        for one in bar:
            for failure in one.failures:
                report_error(failure)
            done, failed = done + one.images, failed + len(one.failures)
            damage += [one.damage] if one.damage is not None else []
    return done, failed, damage


def _report_unreadable(tasks: list[Task]) -> int:
    """Say how many images of answered inputs could not be read; returns their number."""
    count = 0
    for given, target in tasks:
        if unreadable := answered.unreadable(target):
            report_error(
                f"{given}: already answered, but {counted(unreadable, 'image')} could not be read"
            )
            count += unreadable
    return count


def _answer(classifier: Classifier, asked: Asked, task: Task) -> Counted:
    """Answer an input into its file; one that can't be read to its end gets none, but keeps those from before."""
    try:
        return _answered(classifier, asked, task)
    except _Damaged as damaged:
        error = damaged.error
    if task[1].is_file():
        what = f"{error.what}; the answers in {task[1]} are from before it changed"
        error = UserError(what, where=error.where, remedy=error.remedy)
    return Counted(0, [], error)


def _images(given: str) -> Iterator[Input]:
    """The images of an input; that it can't be read is told apart from all other errors, which end the job."""
    try:
        yield from expand(given)
    except UserError as error:
        raise _Damaged(error) from None


def _answered(classifier: Classifier, asked: Asked, task: Task) -> Counted:
    given, target = task
    done, failures, look = 0, [], answered.look_at(given)
    answers = classifier.stream(
        _images(given), top=asked.top, neighbours=NEIGHBOURS, coverage=asked.coverage
    )
    # Of one that was killed; one that is not gone must not replace ours.
    for left in target.parent.glob(f".{glob.escape(target.name)}.{_TOKEN}.tmp"):
        left.unlink(missing_ok=True)
    # An actor that is cut off is given up, but may still be writing.
    with writer_of(target, shared=True) as write:
        for answer in answers:
            if answer.error is not None:
                failures.append(complaint(answer.name, answer.error))
            done += 1
            write(answer)
    answered.record(target, look, len(failures))
    return Counted(done, failures)


def _by_actors(
    classifier: Classifier,
    tasks: list[Task],
    note: Note,
    asked: Asked,
    actors: int,
    address: str | None,
) -> Iterator[Counted]:
    """Answer the inputs on Ray actors, each with the model in its memory."""
    from cnn2gnn_dist.runtime.ray import cluster as ray_cluster
    from cnn2gnn_dist.runtime.ray import pool as ray_pool

    if not tasks:
        return
    given = {"model": classifier.folder.absolute(), "note": note, "asked": asked}
    with ray_cluster.running(address, actors):
        gpus = 1.0 if ray_cluster.gpus() else 0.0
        for _, done in ray_pool.work_off(tasks, answering, given, actors=actors, gpus=gpus):
            yield done


def answering(model: Path, note: Note, asked: Asked) -> Callable[[Task], Counted]:
    """Open the model in an actor; returns the function that answers an input there.

    Raises:
        UserError: the model cannot be read there, or is no longer the one that ``note`` is of.
    """
    classifier = Classifier.open(model)
    if _note(classifier, asked) != note:
        raise UserError(
            "the model was replaced, or its memory edited, while images were being answered",
            where=str(model),
            remedy="name another folder for answers from the current one",
        )
    return partial(_answer, classifier, asked)


def _targets(images: Sequence[str], folder: Path, kind: str) -> dict[str, Path]:
    """The file of answers of each input."""
    if kind not in KINDS:
        raise UserError(
            f"answers can't be written in this format: {kind}",
            where="--format",
            remedy=f"one of {', '.join(k.lstrip('.') for k in KINDS)}",
        )
    found: dict[str, Path] = {}
    for given in images:
        target = folder / f"{_name(given)}{kind}"
        if target in found.values():
            raise UserError(
                f"two inputs are named {_name(given)}",
                where=given,
                remedy="answer them in two commands with different folders",
            )
        found[given] = target
    return found


def _name(given: str) -> str:
    """Name of an input, also of ``.`` and ``..``."""
    return Path(os.path.abspath(given)).name


def _note(model: Classifier, asked: Asked) -> Note:
    """What the answers depend on: everything in the model, its memory's version, the options.

    Raises:
        UserError: the folder holds another model by now.
    """
    files = json.loads((model.folder / artefact.CHECKSUMS).read_text(encoding="utf-8"))["files"]
    artefact.check_unchanged(model.folder, model.identity)  # afterwards: these are its files
    return {
        "model": {name: sha for name, (_, sha) in files.items() if name != artefact.CARD},
        "memory": _memory_digest(model),
        "top": asked.top,
        "coverage": asked.coverage,
    }


def _memory_digest(model: Classifier) -> str | None:
    memory = model.memory
    return None if memory is None else store.digest(memory.root, memory.version)


def _check_note(folder: Path, note: Note) -> None:
    """Write the note, or compare it with the one that is there.

    Raises:
        UserError: they differ: of two ranks that opened different versions at the same time, one gets this.
    """
    path = folder / NOTE
    if not path.exists():
        _write_if_absent(path, json.dumps(note, indent=1))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if before != note:
        raise UserError(
            f"this folder has answers {_differences(before, note)}",
            where=str(folder),
            remedy="name another folder",
        )


def _differences(before: Any, note: Note) -> str:
    """How answers that are there were made otherwise than those asked for now."""
    if not isinstance(before, dict):
        return f"of which it is not known how they were made: its {NOTE} can't be read"
    other = [name for name in note if before.get(name) != note[name]]
    said = [_option(name, before.get(name), note[name]) for name in Asked._fields if name in other]
    sources = [_SOURCES[name] for name in _SOURCES if name in other][:1]
    sources += [f"with other options: {'; '.join(said)}"] if said else []
    return " and ".join(sources) or "from another version of this package"


def _option(name: str, there: Any, now: Any) -> str:
    was = f"no --{name}" if there is None else f"--{name} {there:g}"
    return f"{was} there, {'none' if now is None else format(now, 'g')} now"


def _write_if_absent(path: Path, text: str) -> None:
    """Create a file with its whole content at once, unless another process has done so."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with durable.disk_full_reported(path, resumes=True):
            temporary.write_text(text, encoding="utf-8")
            durable.sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

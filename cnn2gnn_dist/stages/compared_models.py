"""The models that are evaluated: teacher, student, its self path, its neighbors' vote, control; and their costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.graph.version import latest_version
from cnn2gnn_dist.models.cost import count_flops, count_parameters
from cnn2gnn_dist.models.graph_head import adaptive_neighbours, squared_distances
from cnn2gnn_dist.models.precision import MixedPrecision
from cnn2gnn_dist.models.student import Student, StudentOutput
from cnn2gnn_dist.report.labels import CONTROL
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages.neighbours.neighbourhood import Neighbourhood, opened
from cnn2gnn_dist.stages.shared.context import Context
from cnn2gnn_dist.stages.shared.networks import Teacher, build_student, load_model
from cnn2gnn_dist.stages.shared.predictions import Answer


@dataclass
class Row:
    """One row of the table: only what is needed to get its answers.

    Attributes:
        parameters: number of trained values that it uses.
        run: classifies images, to be timed.
        flops: FLOPs of a batch of images.
        notes: further entries for the results.
    """

    parameters: int
    run: Callable[[Tensor], Any]
    flops: Callable[[Tensor], float]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class ComparedModel:
    """One trained model: an ``answer`` for each of its rows, from one pass over the images.

    ``shuffled``: the images of a batch influence each other. ``with_bank``: the student with its bank, if any.
    """

    answer: Answer
    rows: dict[str, Row]
    shuffled: bool = False
    with_bank: StudentWithBank | None = None

    @property
    def name(self) -> str:
        """Name of the model."""
        return next(iter(self.rows))


def compared_models(
    context: Context, num_classes: int, control: bool, teacher: bool = True
) -> list[ComparedModel]:
    """The trained models of the run: teacher, student, control, as far as it has them."""
    found = [_student(context, num_classes)]
    if teacher:
        cnn = Teacher(context.config, num_classes, initial=False)
        _load(context, cnn, "teacher")
        found.insert(0, _standalone("teacher", cnn, cnn))
    found = [mirrored(one) for one in found] if context.config.evaluate.flip else found
    return [*found, control_model(context, num_classes)] if control else found


def control_model(context: Context, num_classes: int) -> ComparedModel:
    """The control alone, which needs no student beside it."""
    mlp = build_student(context.config, num_classes, "none", initial=False)
    _load(context, mlp, "control")
    found = _standalone(CONTROL, mlp, lambda images: mlp(images).logits_BC)
    return mirrored(found) if context.config.evaluate.flip else found


def mirrored(model: ComparedModel) -> ComparedModel:
    """The same model, run on each image and its mirror image; its costs are those of both.

    Probabilities are the softmax of the two log-probabilities' mean, which is that of the logits; the vote
    has none (a class without neighbors has log 0), so that its two shares are averaged themselves.
    """

    def answer(images: Tensor) -> dict[str, Tensor]:
        one, other = model.answer(images), model.answer(images.flip(2))
        return {name: _of_both(name, one[name], other[name]) for name in one}

    def both(row: Row) -> Row:
        return Row(
            row.parameters,
            lambda images: (row.run(images), row.run(images.flip(2))),
            lambda images: row.flops(images) + row.flops(images.flip(2)),
            {**row.notes, "flip": True},
        )

    return replace(model, answer=answer, rows={name: both(row) for name, row in model.rows.items()})


def _of_both(name: str, one_BC: Tensor, other_BC: Tensor) -> Tensor:
    if name == "vote":
        return (one_BC + other_BC) / 2
    return (one_BC.log() + other_BC.log()).mul(0.5).clamp(min=-1e4).softmax(1)


def self_path(student: Student, images_BHWC: Tensor) -> Tensor:
    """Logits of the self path, without any other computation (not under ZeRO-3)."""
    with student.autocast(images_BHWC.device):
        x_BD = student.stem(student.normalise(images_BHWC))
        logits_BC: Tensor = student.gnn.self2(F.relu(student.gnn.self1(x_BD)))
    return logits_BC


def label_vote(weights_BF: Tensor, labels_BF: Tensor, num_classes: int) -> Tensor:
    """Probabilities [B, C]: the weight on neighbors of each class; uniform where no label is known."""
    known_BF = weights_BF.float() * (labels_BF >= 0)
    mass_BC = known_BF.new_zeros(len(known_BF), num_classes)
    mass_BC.scatter_add_(1, labels_BF.clamp(min=0), known_BF)
    total_B1 = mass_BC.sum(1, keepdim=True)
    return (mass_BC / total_B1).where(total_B1 > 0, 1.0 / num_classes)


class StudentWithBank:
    """A student and the bank that unseen images attach to."""

    def __init__(self, student: Student, around: Neighbourhood, num_classes: int) -> None:
        self.student, self.around, self.num_classes = student, around, num_classes

    def answer(self, images: Tensor) -> dict[str, Tensor]:
        """Student, self path and vote, from one forward pass."""
        output = self.student(images, self.around.around_unseen(len(images)))
        assert output.weights_BF is not None
        assert output.first_labels_BF is not None
        vote_BC = label_vote(output.weights_BF, output.first_labels_BF, self.num_classes)
        return {
            "student": _softmax(output.logits_BC),
            "self_path": _softmax(output.self_logits_BC),
            "vote": vote_BC,
        }

    def classify(self, images: Tensor) -> Tensor:
        """The student's logits."""
        output: StudentOutput = self.student(images, self.around.around_unseen(len(images)))
        return output.logits_BC

    def vote(self, images: Tensor) -> Tensor:
        """Compute the vote alone: features, projection, search, weights; no GNN, no second hop."""
        z_Bd = self.student.embed(images)[1]
        search, settings = self.around.search, self.around.settings
        assert search is not None
        wanted = min(settings.sampling.fanouts[0], search.nodes)
        unseen = np.full(len(images), -1, np.int64)
        first_BF = search.nearest(z_Bd.detach().float().cpu().numpy(), wanted, unseen)
        _, z_Vd, labels_V = self.around.holder.rows(first_BF.clip(min=0).reshape(-1))
        near_BFd = z_Vd.to(z_Bd).view(*first_BF.shape, -1)
        labels_BF = labels_V.to(z_Bd.device).long().view(first_BF.shape)
        k = max(1, min(self.student.k, wanted - 1))
        present_BF = labels_BF.new_tensor(first_BF) >= 0
        found = adaptive_neighbours(squared_distances(z_Bd, near_BFd), k, present_BF)
        return label_vote(found.p_BM, labels_BF, self.num_classes)

    def student_flops(self, images: Tensor) -> float:
        """Count the search by its own figure: on a GPU it is a matmul that torch counts too."""
        block = self.around.around_unseen(len(images)).block(self.student.embed(images)[1])
        return count_flops(lambda shown: self.student(shown, block), images) + self._search(images)

    def vote_flops(self, images: Tensor) -> float:
        """Features, projection and search; the vote itself has no matrix product."""
        return count_flops(self.student.embed, images) + self._search(images)

    def _search(self, images: Tensor) -> float:
        return len(images) * self.around.flops_per_query


def open_bank(context: Context) -> Neighbourhood:
    """The final graph with all of its partitions."""
    folder = collectives.alone(lambda: latest_version(context.paths.root / "graph"))
    assert folder is not None, "the pipeline runs the graph stage first"
    return Neighbourhood(context, opened(folder), None)


def _student(context: Context, num_classes: int) -> ComparedModel:
    config = context.config
    student = build_student(config, num_classes, config.graph.scope, initial=False)
    _load(context, student, "student")
    whole = count_parameters(student)
    graph_only = sum(p.numel() for p in student.graph_parameters().values())

    def alone(images: Tensor) -> Tensor:
        return self_path(student, images)

    self_row = Row(whole - graph_only, alone, lambda images: count_flops(alone, images))
    if config.graph.scope == "batch":
        rows = {"student": _row(student, student), "self_path": self_row}

        def answer(images: Tensor) -> dict[str, Tensor]:
            output = student(images)
            logits = {"student": output.logits_BC, "self_path": output.self_logits_BC}
            return {name: _softmax(found) for name, found in logits.items()}

        return ComparedModel(answer, rows, shuffled=True)
    around = open_bank(context)
    with_bank = StudentWithBank(student, around, num_classes)
    assert student.head is not None
    notes = {"graph": around.version.meta, "graph_parameters": graph_only}
    rows = {
        "student": Row(whole, with_bank.classify, with_bank.student_flops, notes),
        "self_path": self_row,
        "vote": Row(
            count_parameters(student.stem) + count_parameters(student.head),
            with_bank.vote,
            with_bank.vote_flops,
        ),
    }
    return ComparedModel(with_bank.answer, rows, with_bank=with_bank)


def _standalone(name: str, model: nn.Module, classify: Callable[[Tensor], Tensor]) -> ComparedModel:
    row = _row(model, classify)
    return ComparedModel(lambda images: {name: _softmax(classify(images))}, {name: row})


def _row(model: nn.Module, classify: Callable[[Tensor], Any]) -> Row:
    return Row(count_parameters(model), classify, lambda images: count_flops(classify, images))


def _softmax(logits_BC: Tensor) -> Tensor:
    return logits_BC.float().softmax(1)


def _load(context: Context, model: MixedPrecision, stage: str) -> None:
    load_model(model, context.paths.root, stage)
    model.compute_dtype = context.compute_dtype("teacher" if stage == "teacher" else "student")
    model.to(context.device).eval()

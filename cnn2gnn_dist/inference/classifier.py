"""The classifier: a model's folder, opened for inference."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import inputs
from cnn2gnn_dist.inference.answering import answers_of, check_counts, check_together, described
from cnn2gnn_dist.inference.answers import Answer
from cnn2gnn_dist.inference.coverage import Coverage
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.folder.artefact import ModelConfig
from cnn2gnn_dist.inference.folder.run_model import located
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.inference.network import Network, Outputs, device_of, joined
from cnn2gnn_dist.inference.scoring import Scoring
from cnn2gnn_dist.inference.sets.relations import company

BATCH = 64
DECODERS = 4
"""Threads that decode images."""


class Classifier:
    """A trained model with its memory; safe to use from several threads.

    ``load`` opens one. On CPUs the answer for an image is bit-identical regardless of the other images
    in the call (except in ``batch`` scope, where the images of a batch are each other's neighbors).

    Args:
        folder: of the model.
        config, network, memory, scoring: its contents; ``memory`` is None without a dataset graph.

    Attributes:
        classes_: names of all classes; those added to the memory follow the trained ones.
        identity: of the model that was opened (``artefact.identity``).
        coverage: gives sets of classes.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        network: Network,
        memory: Memory | None,
        scoring: Scoring,
    ) -> None:
        self.folder, self.spec, self.network, self.memory = folder, config, network, memory
        self.scoring = scoring
        self._views = config.views.spec()
        self.identity = artefact.identity(folder)
        self.coverage = Coverage(folder, network, scoring, self.identity)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def __repr__(self) -> str:
        return described(type(self).__name__, self.folder, self.classes_, self.memory)

    @classmethod
    def open(cls, folder: Path, *, device: str = "auto", verify: bool | None = None) -> Classifier:
        """Open the folder of a model.

        Args:
            folder: one that ``export`` wrote.
            device: "auto" (CUDA where there is one), "cpu", "cuda", …
            verify: also read the memory and compare its checksums, which takes about a second per
                gigabyte; None: unless it has more than ``store.VERIFIED_BYTES``.

        Raises:
            UserError: not a model, damaged, or of a newer version; no such device.
        """  # noqa: DOC501
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = artefact.read_config(folder)
        before = artefact.identity(folder)
        artefact.check_files(folder)
        memory = None
        if config.scope != "dataset":
            pass  # a memory that is there all the same is another model's (``artefact.part``)
        elif (folder / artefact.MEMORY).is_dir():
            memory = Memory.open(
                folder / artefact.MEMORY, check=partial(store.check, wanted=verify)
            )
        else:
            raise artefact.damaged(folder / artefact.MEMORY, "it is missing")
        device = device_of(device)
        try:
            weights = load_file(folder / artefact.WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise artefact.damaged(folder / artefact.WEIGHTS, str(error)) from None
        network = Network(config, weights, device)
        found = cls(folder, config, network, memory, Scoring.read(folder))
        artefact.check_unchanged(folder, before)
        return found

    @property
    def classes_(self) -> list[str]:
        """Names of all classes."""
        return list(self.memory.classes if self.memory else self.spec.label_names)

    def predict(
        self, images: Any, *, top: int = 5, neighbours: int = 5, coverage: float | None = None
    ) -> Any:
        """Answer one image with an ``Answer``, or a collection with a list of them.

        Args:
            images: path, bytes, PIL image or array uint8 [H, W, 3] (or [H, W]); a list of these;
                an array [B, H, W, 3]; a folder, a tar shard, a Parquet file.
            top: number of classes in an answer.
            neighbours: number of neighbors in an answer.
            coverage: also give the set of classes that contains the true one with this probability; an
                answer abstains if that is not exactly one class.

        Raises:
            UserError: a folder or file without images; a coverage that the model can't give. An
                image that can't be read is an answer with ``error``.
        """
        found = list(self.stream(images, top=top, neighbours=neighbours, coverage=coverage))
        return found[0] if inputs.is_single(images) else found

    def stream(
        self,
        images: Any,
        *,
        top: int = 5,
        neighbours: int = 5,
        batch: int = BATCH,
        coverage: float | None = None,
    ) -> Iterator[Answer]:
        """Answer a collection of any length one by one, in order, in bounded memory.

        Raises:
            UserError: see ``predict``.
        """
        memory = self.memory  # one version for a whole call
        check_counts(top=(top, 1), neighbours=(neighbours, 0), batch=(batch, 1))
        self.coverage.check(coverage, memory)
        for many in self.batches(images, batch):
            good = [one for one in many if one.pixels is not None]
            made = iter(
                self.answers(good, memory, top=top, neighbours=neighbours, coverage=coverage)
                if good
                else []
            )
            for one in many:
                yield Answer(one.name, error=one.error) if one.pixels is None else next(made)

    def predict_proba(self, images: Any) -> np.ndarray:
        """Probabilities float32 [B, classes]; rows of images that can't be read are NaN."""
        rows = []
        memory = self.memory
        classes = len(memory.classes if memory else self.spec.label_names)
        for many in self.batches(images, BATCH):
            part = np.full((len(many), classes), np.nan, np.float32)
            good = [row for row, one in enumerate(many) if one.pixels is not None]
            if good:
                part[good] = self.probabilities(
                    self.outputs([many[row] for row in good], memory), memory
                )
            rows.append(part)
        return np.concatenate(rows) if rows else np.empty((0, classes), np.float32)

    def kneighbors(self, images: Any, n_neighbors: int = 5) -> tuple[np.ndarray, list[list[str]]]:
        """Distances float32 [B, n] in the projection, and the keys of these training images.

        Rows of images that can't be read have NaN and no keys.

        Raises:
            UserError: the model has no memory, or fewer rows than requested.
        """
        memory = self.required_memory()
        check_counts(n_neighbors=(n_neighbors, 1))
        if n_neighbors > len(memory):
            raise UserError(
                f"{n_neighbors} neighbors are requested, but the memory has {len(memory)} images",
                remedy=f"request at most {len(memory)}",
            )
        distances: list[np.ndarray] = []
        keys: list[list[str]] = []
        for _, _, z in self.embed(images):
            if z is None:
                distances.append(np.full(n_neighbors, np.nan, np.float32))
                keys.append([])
                continue
            rows = memory.nearest(z[None], n_neighbors)[0]
            distances.append(np.sqrt(np.square(memory.z(rows) - z).sum(1)).astype(np.float32))
            keys.append(memory.keys(rows))
        return np.array(distances).reshape(-1, n_neighbors), keys

    def embed(self, images: Any) -> Iterator[tuple[str, np.ndarray | None, np.ndarray | None]]:
        """Yield (name, x float32 [D], z float32 [d]) of each image; None if it can't be read."""
        for one, x, z in self.embedded(images):
            yield one.name, x, z

    def embedded(
        self, images: Any
    ) -> Iterator[tuple[Pixels, np.ndarray | None, np.ndarray | None]]:
        """As ``embed``, with the decoded image, which has the reason why one can't be read."""
        for many in self.batches(images, BATCH):
            good = [one.pixels for one in many if one.pixels is not None]
            made = iter(zip(*self.network.embed(np.stack(good)), strict=True) if good else ())
            for one in many:
                x, z = (None, None) if one.pixels is None else next(made)
                yield one, x, z

    def batches(self, images: Any, size: int) -> Iterator[list[Pixels]]:
        """Decode the inputs in batches; this also shows which of them can't be read."""
        given = inputs.expand(images)
        if self.spec.scope == "batch":  # a last image alone would have no neighbors
            everything = list(given)
            size = inputs.even_size(len(everything), size)
            given = iter(everything)
        while many := list(islice(given, size)):
            yield list(self._decoders.map(lambda one: inputs.to_pixels(one, self._views), many))

    def predict_together(
        self, images: Any, *, same: bool = False, top: int = 5, neighbours: int = 5
    ) -> list[Answer]:
        """Answer a set of images together: a burst, the parts of one object, images from one place.

        Where the images are found to be related, each answer depends on the others
        (``inference/sets/learned.py``); otherwise the answers are those of ``predict``.

        Args:
            images: a collection, as ``predict`` takes it.
            same: they are known to show one class: their logits are averaged.
            top: as in ``predict``.
            neighbours: as in ``predict``.

        Raises:
            UserError: the model is not calibrated; its memory has new classes; there are too many images.
        """
        memory = self.memory
        check_counts(top=(top, 1), neighbours=(neighbours, 0))
        self.scoring.rule_together(memory)  # raises before images are read
        decoded, parts = list[Pixels](), list[Outputs]()
        for many in self.batches(images, BATCH):
            decoded += many
            check_together(0 if same else len(decoded))
            # The batches of ``predict``: in ``batch`` scope an answer depends on them.
            if readable := [one for one in many if one.pixels is not None]:
                parts.append(self.outputs(readable, memory))
        good = [one for one in decoded if one.pixels is not None]
        if not good:
            return [Answer(one.name, error=one.error) for one in decoded]
        made = joined(parts)
        found = self.scoring.answer_together(made, memory, same=same)
        alone_mC = self.probabilities(made, memory) if same else None
        shown = {"together": company(found, alone_mC)}
        told = iter(self._answers(good, made, found.posterior_mC, memory, top, neighbours, shown))
        return [
            Answer(one.name, error=one.error) if one.pixels is None else next(told)
            for one in decoded
        ]

    def answers(
        self,
        images: list[Pixels],
        memory: Memory | None,
        *,
        top: int,
        neighbours: int,
        coverage: float | None = None,
    ) -> list[Answer]:
        """Answer decoded images, all readable, from one version of the memory.

        Raises:
            UserError: see ``predict``.
        """
        made = self.outputs(images, memory)
        found = self._answers(
            images, made, self.probabilities(made, memory), memory, top, neighbours, {}
        )
        if coverage is None:
            return found
        sets_BC = self.coverage.sets(made, coverage, memory)
        names = self.spec.label_names
        return [
            replace(
                one,
                scores=one.scores
                | {
                    "set": [names[c] for c in np.flatnonzero(inside)],
                    "abstains": bool(inside.sum() != 1),
                },
            )
            for one, inside in zip(found, sets_BC, strict=True)
        ]

    def _answers(
        self,
        images: list[Pixels],
        made: Outputs,
        probability_BC: np.ndarray,
        memory: Memory | None,
        top: int,
        neighbours: int,
        scores: dict[str, Any],
    ) -> list[Answer]:
        unusual = self.scoring.unusual(made, memory)
        said = [scores | ({"unusual": strange} if strange else {}) for strange in unusual]
        names = [one.name for one in images]
        shown = {"top": top, "neighbours": neighbours}
        return answers_of(names, made, probability_BC, self.spec, memory, said, **shown)

    def outputs(self, images: list[Pixels], memory: Memory | None = None) -> Outputs:
        """Run the network on decoded images; ``memory``: a version, by default the opened one."""
        return self.network(
            np.stack([one.pixels for one in images]),  # type: ignore[misc]
            memory if memory is not None else self.memory,
        )

    def probabilities(self, made: Outputs, memory: Memory | None = None) -> np.ndarray:
        """Probabilities float32 [B, classes] of the network's outputs."""
        return self.scoring.probabilities(made, memory, len(self.spec.label_names))

    def reload(self) -> None:
        """Open the current version of the memory; running calls finish with their version.

        Raises:
            UserError: the memory is damaged; the folder holds another model by now.
        """
        self.use_version(None)

    def use_version(self, number: int | None) -> None:
        """Open a version of the memory; None: the current one.

        Raises:
            UserError: there is no such version, or it is damaged; the folder holds another model by now.
        """
        if self.memory is not None:
            memory = Memory.open(self.memory.root, number)
            # Afterwards, so that another model's rows are never taken.
            artefact.check_unchanged(self.folder, self.identity)
            self.memory = memory

    def required_memory(self) -> Memory:
        """Return the memory.

        Raises:
            UserError: the model has none.
        """
        if self.memory is None:
            raise UserError(
                "this model has no memory: it was trained without a graph of the data set",
                where=str(self.folder),
                remedy="export a run with graph.scope=dataset",
            )
        return self.memory

    @classmethod
    def from_pretrained(cls, model: str | Path, *, device: str = "auto", **hub: Any) -> Classifier:
        """Open a model's folder, or download a model from the Hugging Face Hub and open it.

        Args:
            model: folder, or a name on the Hub (``owner/name``).
            device: see ``open``.
            **hub: options of ``huggingface_hub.ModelHubMixin.from_pretrained``: ``revision``, …

        Raises:
            UserError: see ``open``.
        """
        from cnn2gnn_dist.inference.hub import HubFolder

        artefact.check_not_set_aside(Path(model))
        return cls.open(HubFolder.from_pretrained(model, **hub).folder, device=device)

    def save_pretrained(self, folder: str | Path, **hub: Any) -> str | None:
        """Copy the model to a folder; see ``huggingface_hub.ModelHubMixin.save_pretrained``."""
        from cnn2gnn_dist.inference.hub import HubFolder

        return HubFolder(self.folder).save_pretrained(folder, **hub)

    def push_to_hub(self, name: str, **hub: Any) -> str:
        """Upload the model; see ``huggingface_hub.ModelHubMixin.push_to_hub``."""
        from cnn2gnn_dist.inference.hub import HubFolder

        return HubFolder(self.folder).push_to_hub(name, **hub)


def load(folder: str | Path, *, device: str = "auto") -> Classifier:
    """Open a model: a folder that ``export`` wrote, or a run that contains one.

    Raises:
        UserError: neither, damaged, or of a newer version; the run's student was trained again since.
    """
    return Classifier.open(located(Path(folder).expanduser()), device=device)

"""The model card: what a model is, its measured accuracy, how to load it."""

from __future__ import annotations

from typing import Any

from cnn2gnn_dist.inference.folder.artefact import ModelConfig
from cnn2gnn_dist.report.labels import CONTROL

_SHOWN_CLASSES = 20
_ROWS = {
    "teacher": "teacher (CNN)",
    "student": "this model",
    "self_path": "this model without its neighbors",
    "vote": "the neighbors' vote alone",
    CONTROL: "control: same stem, MLP head, no graph",
}
_ROWS_OF_CONTROL = {
    "teacher": "teacher (CNN)",
    CONTROL: "this model: the control of its run",
    "student": "student: same stem, with the graph",
}


_EDITS = [
    "- Classes, numbers of images and figures are those of the export, before any edit of the memory; "
    "`cnn2gnn memory ls MODEL/` shows the current ones"
]
_FLIPPED = [
    "",
    "Measured on the mean of each image and its mirror image (`evaluate.flip`); this model answers from the "
    "image alone.",
]


def card(config: ModelConfig, results: dict[str, Any] | None, rows: int) -> str:
    """Return the text of ``README.md``.

    Args:
        config: of the model.
        results: of the run's evaluation; None: this model was not evaluated.
        rows: number of images in its memory; 0: it has none.
    """
    lines = [*_front_matter(), *_about(config, rows), *_figures(config, results), *_use(config)]
    return "\n".join(lines) + "\n"


def _front_matter() -> list[str]:
    return [
        "---",
        "library_name: cnn2gnn-dist",
        "pipeline_tag: image-classification",
        "tags: [image-classification, gnn, distillation]",
        "license: other",
        "---",
        "",
    ]


def _about(config: ModelConfig, rows: int) -> list[str]:
    source, names = config.source, config.label_names
    classes = ", ".join(names[:_SHOWN_CLASSES]) + (", …" if len(names) > _SHOWN_CLASSES else "")
    kind = {
        "dataset": f"a two-layer GNN over {rows:,} training images that it attaches an image to",
        "batch": "a two-layer GNN over the images of a batch, which influence each other's answers",
        "none": "an MLP head without a graph",
    }[config.scope]
    return [
        f"# {source.get('name', 'model')}",
        "",
        f"An image classifier: a small CNN stem and {kind}, distilled from a CNN teacher by "
        f"cnn2gnn-dist {config.version}.",
        "",
        f"- Classes ({len(names)}): {classes}",
        f"- Trained on {source.get('train_images', '?')} images, seed {source.get('seed', '?')}; "
        f"images are seen at {config.views.size} x {config.views.size} pixels",
        *(_EDITS if config.scope == "dataset" else []),
        "- License: that of the training images and of the pretrained weights, if any; fill it in",
        "",
    ]


def _figures(config: ModelConfig, results: dict[str, Any] | None) -> list[str]:
    title = ["## Figures", ""]
    if not results:
        return [*title, "The run was not evaluated when this model was exported."]
    rows = _ROWS_OF_CONTROL if config.scope == "none" else _ROWS
    own = results.get(CONTROL if config.scope == "none" else "student", {})
    images = own.get("evaluated", results.get("run", {}).get("test_images"))
    return [
        *title,
        f"Accuracy on {images} held-out images, which were not used in training:",
        "",
        "| model | accuracy | balanced | parameters | MFLOP per image |",
        "| --- | --- | --- | --- | --- |",
        *(_row(label, results[key]) for key, label in rows.items() if key in results),
        *(_FLIPPED if own.get("flip") else []),
    ]


def _row(label: str, r: dict[str, Any]) -> str:
    return (
        f"| {label} | {r['accuracy']:.2%} | {r['balanced_accuracy']:.2%} | "
        f"{r['parameters']:,} | {r['flops'] / 1e6:.2f} |"
    )


def _use(config: ModelConfig) -> list[str]:
    lines = ["", "## Use", "", "```python", "import cnn2gnn_dist", "",
             'model = cnn2gnn_dist.load("MODEL/")', 'answer = model.predict("image.jpg")',
             "print(answer.label, answer.probability, answer.neighbours)", "```", "",
             "`cnn2gnn predict --model MODEL/ images/` answers from the command line."]  # fmt: skip
    if config.scope == "dataset":
        lines += ["", "Its memory holds features, thumbnails and keys of the training images: whoever "
                  "can see the model can see them."]  # fmt: skip
    return lines

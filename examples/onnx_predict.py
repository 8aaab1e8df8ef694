"""Predict with a model's ONNX export, using onnxruntime, numpy, faiss and Pillow, but no torch.

cnn2gnn export runs/demo --to onnx/ --onnx; python examples/onnx_predict.py onnx/ image.png
"""

import json
import sys
from pathlib import Path

import faiss
import numpy as np
import onnxruntime
from PIL import Image

folder, *paths = map(Path, sys.argv[1:])
meta = json.loads((folder / "meta.json").read_text())
memory = np.load(folder / "memory.npz")
index = faiss.IndexFlatL2(memory["z"].shape[1])
index.add(memory["z"])
encoder = onnxruntime.InferenceSession(folder / "encoder.onnx")
head = onnxruntime.InferenceSession(folder / "head.onnx")


def view(path: Path) -> np.ndarray:
    """The image as in the model's evaluation: on white, its shorter side resized to size x resize, its center."""
    given, side = Image.open(path).convert("RGBA"), meta["size"]
    image = Image.new("RGB", given.size, "white")
    image.paste(given, mask=given)
    short, least = round(side * meta["resize"]), min(image.size)
    image = image.resize([short * n // least for n in image.size], Image.Resampling.BILINEAR)
    left, top = (round((n - side) / 2) for n in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


pictures = [view(path) for path in paths]
x, z, _ = encoder.run(None, {"images": np.stack(pictures)})
_, near = index.search(z, min(meta["fanout"], index.ntotal))
near_rows = {f"near_{name}": memory[name][near] for name in ("x", "z", "mean")}
logits, _ = head.run(None, {"x": x, "z": z, "near_label": memory["labels"][near], **near_rows})
scaled = np.exp((logits - logits.max(1, keepdims=True)) / meta["temperature"])
for path, probability in zip(paths, scaled / scaled.sum(1, keepdims=True), strict=True):
    best = probability.argmax()
    print(f"{path}  {meta['label_names'][best]} {probability[best]:.1%}")

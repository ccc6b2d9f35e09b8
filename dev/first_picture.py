"""Draw images-A/first.png, the README's picture: accuracy by epoch, three mistakes with Grad-CAM.

    python dev/first_picture.py [DATA]      DATA: the prepared data set (data/tiny-imagenet)

The curves are those of the records in results/, the maps those of the network in weights/.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from tinylab.data.dataset import open_dataset
from tinylab.explain.gradcam import gradcam
from tinylab.explain.mistakes import answers
from tinylab.figures.images import put_heat_map

from tinylab.figures.style import (  # isort: skip
    BLUE, DASHED, KINDS, MUTED, VERMILION, Figure, annotate, draw_line, new_canvas, put_caption,
    put_picture, put_text, save, styled,
)  # fmt: skip
from tinylab.run.folder import Run, published_history
from tinylab.run.weights import load_weights, normalised

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = {"accurate": "accurate-merged-s0", "cpu": "cpu-merged-s0-gpu"}
MISTAKES = np.array([48642, 89240, 14900])
"""Rows of the data set: the 2nd, 5th and 10th of the ten in gradcam.png, drawn at random."""


@styled
def first_picture(data: Path) -> Figure:
    figure = new_canvas(4.05)

    # ---- left: test accuracy by epoch ----
    put_text(figure, 0.08, 0.3, "Top-1 accuracy on 33,000 test images, %", size=11, weight="bold")
    ax = figure.add_axes((0.4 / 9, 0.45 / 4.05, 3.4 / 9, 3.1 / 4.05))
    ax.tick_params(color=MUTED, labelcolor=MUTED, labelsize=10)
    course = published_history()
    curves = {"course run": [(row["epoch"], row["test_accuracy_pct"]) for row in course]}
    for name, run in RUNS.items():
        epochs = Run(REPOSITORY / "results" / run).history
        curves[name] = [(row["epoch"], row.get("test_top1")) for row in epochs]
    looks = {"course run": {"color": MUTED} | DASHED, "accurate": {"color": BLUE}}
    places = {"course run": (-86, -48), "accurate": (-88, 9), "cpu": (-16, 12)}
    for name, points in curves.items():
        look = looks.get(name, {"color": VERMILION})
        draw_line(ax, *zip(*points, strict=True), name, **look)
        last = tuple(map(float, points[-1]))
        text = f"{name} {last[1]:.2f}"
        annotate(ax, text, last, places[name], color=look["color"], size=10, weight="bold")
    ax.set(ylim=(0, 74), xlim=(0, 31))
    ax.set_xlabel("epoch", size=10)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))

    # ---- right: image, Grad-CAM of the predicted class, both classes ----
    dataset = open_dataset(data)
    (weights,) = (REPOSITORY / "weights").rglob("*.safetensors")
    network, metadata = load_weights(weights)
    images = dataset.images[MISTAKES]
    inputs = normalised(metadata)(torch.from_numpy(images))
    with torch.inference_mode():
        logits = network(inputs)
    maps = gradcam(network, inputs, logits.argmax(dim=1), ("layer4",))["layer4"]
    entries = answers(MISTAKES, logits.numpy(), dataset)
    start, side, gap = 4.3, 1.45, 0.12
    title = "Mistakes of accurate: image, Grad-CAM"
    put_text(figure, start, 0.3, title, size=11, weight="bold")
    for i, (image, heat, entry) in enumerate(zip(images, maps, entries, strict=True)):
        left = start + i * (side + gap)
        put_picture(figure, left, 0.45, side, image)
        put_heat_map(figure, left, 0.5 + side, side, image, heat, hide_picture=False)
        lines = [(entry[kind]["name"], "", color) for kind, color in KINDS.items()]
        put_caption(figure, left, 0.54 + 2 * side, side, lines, size=10)
    right = start + 3 * side + 2 * gap
    for (word, color), at in zip(KINDS.items(), (right - 0.55, right), strict=True):
        look = {"size": 10, "color": color, "weight": "bold", "ha": "right"}
        put_text(figure, at, 3.99, word, **look)
    return figure


if __name__ == "__main__":
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "data" / "tiny-imagenet"
    print(save(first_picture(data), REPOSITORY / "images-A" / "first.png"))

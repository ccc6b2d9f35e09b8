"""Every figure. Functions return a matplotlib Figure; only this folder imports matplotlib."""
# ruff: noqa: F401

import contextlib
import os
import sys

if "matplotlib" not in sys.modules:
    # A backend that another program has set may not exist here; figures need none.
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend

from tinylab.figures.images import (  # isort: skip
    before_after, class_maps, confident, gradcam_stages, image_grid, label_conflicts, misclassified,
    prediction,
)  # fmt: skip
from tinylab.figures.scores import (  # isort: skip
    class_accuracy, confused_pairs, confusion, faithfulness, localisation, reliability,
)  # fmt: skip
from tinylab.figures.style import Figure, clean, message, save
from tinylab.figures.training import accuracy_and_loss, learning_rate_curve, learning_rate_test

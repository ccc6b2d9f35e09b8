"""The network as one ONNX file."""

import copy
import importlib.util
import io
import json
import logging
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from warnings import catch_warnings

import numpy as np
import torch
from torch import nn

from tinylab.exceptions import UserError
from tinylab.files import printable, write_atomically
from tinylab.recipe import SIZE
from tinylab.run.weights import normalised, recipe_of

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # difference of a logit from torch's, as a share of the largest: both are fp32
CHECKED_BATCHES = (1, 2, 7)


def export_onnx(model: nn.Module, metadata: dict, path: Path, opset: int = 18) -> dict:
    """Write the network, after its logits in onnxruntime were compared with torch's.

    Input "images": float32 (batch, 3, R, R), normalised; output "logits": float32 (batch, classes).
    The file's metadata_props hold, as JSON, what `model.safetensors` holds. Raise `UserError` if a
    package is missing or a logit differs; then no file is written.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"the export needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if path.is_dir():
        raise UserError(f"{printable(path)} is a folder: name the ONNX file to write in it")
    network = copy.deepcopy(model).cpu().float().eval()

    # ---- export: two images, as of one alone the batch size would become a constant ----
    side = recipe_of(metadata).test_resolution
    options = {
        "input_names": ["images"], "output_names": ["logits"], "opset_version": opset,
        "dynamic_shapes": ({0: torch.export.Dim("batch")},), "dynamo": True, "verbose": False,
    }  # fmt: skip
    disabled, silent = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)  # the exporter prints its progress, and warns of versions
    try:
        with redirect_stdout(silent), redirect_stderr(silent), catch_warnings(action="ignore"):
            exported = torch.onnx.export(network, (torch.zeros(2, 3, side, side),), **options)
    finally:
        logging.disable(disabled)
    program = exported.model_proto
    # Every node names its source lines, with the folders of whoever exports.
    graph = program.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    for part in (program, *graph.input, *graph.output):
        del part.metadata_props[:]
    for key in ("wnids", "names", "mean", "std", "recipe", "metrics", "content_sha256"):
        program.metadata_props.add(key=key, value=json.dumps(metadata.get(key)))
    content = program.SerializeToString()

    # ---- compare ----
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    differences, largest, same = [], [], True
    for size in CHECKED_BATCHES:
        images = torch.from_numpy(rng.integers(0, 256, (size, SIZE, SIZE, 3), dtype=np.uint8))
        inputs = normalised(metadata)(images).contiguous()
        with torch.inference_mode():
            expected = network(inputs).numpy()
        (logits,) = session.run(["logits"], {"images": inputs.numpy()})
        differences.append(float(np.abs(logits - expected).max()))
        largest.append(float(np.abs(expected).max()))
        same &= bool((logits.argmax(axis=1) == expected.argmax(axis=1)).all())
    if not max(differences) <= TOLERANCE * max(largest):
        by = f"in onnxruntime its logits differ by up to {max(differences):.2g}"
        raise UserError(f"{printable(path)} is not written: {by}")

    write_atomically(path, content)
    return {
        "file": str(path), "bytes": len(content), "opset": opset, "batches": list(CHECKED_BATCHES),
        "largest_difference": max(differences), "largest_logit": max(largest), "same_top1": same,
    }  # fmt: skip

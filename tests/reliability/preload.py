"""What the server of forked children has done before the first of them: every import, and an optimiser step.

Importing this module does it. The imports that torch leaves for its first step take seconds, in which a child would be
killed before it has anything to lose.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from reliability import harness
from tinylab.data.dataset import prepare
from tinylab.data.synthetic import write_sample
from tinylab.recipes import accurate, smoke
from tinylab.training.train import train

torch.set_num_threads(1)  # before the first step: threads do not survive a fork
with tempfile.TemporaryDirectory() as folder:
    data = prepare(
        write_sample(Path(folder) / "a.zip", classes=2, per_class=4),
        Path(folder) / "data",
        progress=False,
    )
    for number, recipe in enumerate((accurate(), replace(accurate(), optimizer="muon"), smoke())):
        recipe = replace(recipe, epochs=1, batch_size=4, width=4, resolution=16, ramp=())
        train(
            recipe,
            data,
            folder=Path(folder) / str(number),
            device="cpu",
            precision="fp32",
            quiet=True,
        )
harness.PRELOADED = True

# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ResNet-18 on Tiny ImageNet, from scratch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/tinylab/blob/main/notebooks/tiny_imagenet_resnet18.ipynb)
#
# Data, network, training, curves, and Grad-CAM on what the network gets wrong. Run it from top to bottom; nothing has to
# be filled in. Every cell calls [`tinylab`](https://github.com/OWNER/tinylab); start reading with `training/train.py`.
#
# * **With a GPU** the whole experiment runs by the recipe `published`: the course run's settings, 200 classes, 30 epochs.
#   The course run took 79 minutes of training on a Colab GPU.
# * **Without one** the notebook trains the same network by the recipe `cpu` on the first 10 classes for 6 epochs: about
#   half an hour on two slow cores.
# * **Interrupted?** Run it again: training continues where it stopped, and what is finished is only shown. But a Colab
#   machine that is taken away takes everything with it, unless `DRIVE` names a folder on Google Drive.

# %% tags=["parameters"]
# @title Settings
# @markdown Colab: a folder on Google Drive that keeps the run when the machine is lost.
DRIVE = None  # @param ["None", "'/content/drive/MyDrive/tinylab'"] {"type":"raw"}
# @markdown None: `published`, without a GPU `cpu`. `smoke` is small, for the made-up sample data.
RECIPE = None  # @param ["None", "'published'", "'accurate'", "'speedrun'", "'cpu'", "'smoke'"] {"type":"raw","allow-input":true}
# @markdown None: the recipe's own number; without a GPU 6.
EPOCHS = None  # @param {"type":"raw"}
# @markdown None: all 200; without a GPU the first 10.
CLASSES = None  # @param {"type":"raw"}
SEED = 0  # @param {"type":"integer"}
# @markdown `auto` finds or downloads Tiny ImageNet; also a URL, a zip, a folder. `sample`: made-up shapes.
SOURCE = "auto"  # @param ["auto", "sample"] {"allow-input":true}
# @markdown Where the decoded images go; None: data/tiny-imagenet or data/sample.
DATA = None  # @param {"type":"raw"}
# @markdown The run folder; None: runs/RECIPE-SPLIT-sSEED.
RUN = None  # @param {"type":"raw"}
# @markdown Another folder for the figures.
FIGURES = None  # @param {"type":"raw"}
# @markdown A picture of your own for the section "Try your own image"; UPLOAD asks for one in Colab.
IMAGE = None  # @param {"type":"raw"}
UPLOAD = False  # @param {"type":"boolean"}
# @markdown Also export the network to ONNX.
ONNX = False  # @param {"type":"boolean"}
# @markdown Colab: go on without a GPU.
ALLOW_CPU = False  # @param {"type":"boolean"}
# @markdown Continue a run with other code than it was begun with; the record says so.
CONTINUE_ANYWAY = False  # @param {"type":"boolean"}
# @markdown Where the code is fetched from if it is not here.
REPOSITORY = "https://github.com/OWNER/tinylab"  # @param {"type":"string"}

# %% [markdown]
# ## Set-up
#
# Fetches the code if it is not here and installs only what is missing, so that Colab's own torch stays in place.

# %%
import os
import shutil
import subprocess
import sys
from pathlib import Path

in_colab, has_gpu = "google.colab" in sys.modules, bool(shutil.which("nvidia-smi"))


class UserError(Exception):
    def _render_traceback_(self):  # Jupyter shows this in place of a traceback
        return [str(self)]


def call(*command, failed):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "no reason given"
        raise UserError(f"{failed}: {reason.splitlines()[-1]}")


if in_colab and not has_gpu and not ALLOW_CPU:
    raise UserError(
        "Colab gave this notebook no GPU: choose Runtime > Change runtime type > T4 GPU, "
        "or set ALLOW_CPU = True for a small run."
    )

# %% [markdown]
# With `DRIVE`, every checkpoint is copied there, too. A new machine continues from the newest one that is whole, with the
# code that the run was begun with; a finished run comes back from there.

# %%
drive, commits = Path(DRIVE) if DRIVE else None, []
if drive and in_colab:
    from google.colab import drive as google_drive

    google_drive.mount(DRIVE.partition("/MyDrive")[0])
if drive and not CONTINUE_ANYWAY:  # a run that is not finished, the one begun last
    usual = f"{RECIPE or ('published' if has_gpu else 'cpu')}-*-s{SEED}"
    names = [Path(RUN).name] if RUN else [usual, f"{usual}-*"]
    notes = [note for name in names for note in drive.glob(f"{name}/commit")]
    begun = [each for each in notes if not (each.parent / "summary.json").exists()]
    commits = [each.read_text() for each in sorted(begun, key=os.path.getmtime)]

# %%
places = [Path.cwd(), *Path.cwd().parents, Path.cwd() / "tinylab"]
home = next((each for each in places if (each / "src" / "tinylab").is_dir()), None)
if home is None:
    if "/OWNER/" in REPOSITORY:
        raise UserError("The code is not here: set REPOSITORY to the address of its repository.")
    git, home = ["git", "-C", "tinylab"], Path.cwd() / "tinylab"
    clone = ["git", "clone", "--quiet", "--filter=blob:none", REPOSITORY, "tinylab"]
    call(*clone, failed=f"cannot fetch the code from {REPOSITORY}")
    for old in filter(None, commits[-1:]):
        call(*git, "checkout", "--quiet", old, failed=f"cannot fetch the run's own code, {old}")
        print("code: commit", old, "as the run on Drive was begun with")
os.chdir(home)
sys.path.insert(0, str(home / "src"))

# %%
import importlib.metadata
import tomllib

from packaging.requirements import Requirement


def installed(package):
    try:
        return package.specifier.contains(importlib.metadata.version(package.name), True)
    except importlib.metadata.PackageNotFoundError:
        return False


project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
missing = [each for each in project["dependencies"] if not installed(Requirement(each))]
if missing:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *missing]
    print("installing", ", ".join(missing), "(a minute)")
    call(*pip, failed="pip cannot install them")

# %%
from dataclasses import replace

from IPython.display import Image

from tinylab import figures as plots
from tinylab import model
from tinylab.data.dataset import prepare
from tinylab.data.loader import make_loader
from tinylab.data.split import make_split
from tinylab.data.synthetic import write_sample
from tinylab.exceptions import UserError
from tinylab.explain.analysis import analyse_run, explain_answers
from tinylab.recipes import named
from tinylab.run import folder as record
from tinylab.run.environment import choose, commit
from tinylab.run.verify import copy_run, restore_run
from tinylab.share import card
from tinylab.share.onnx import export_onnx
from tinylab.share.picture import read_image
from tinylab.share.predict import load, predict
from tinylab.training.optim import schedule
from tinylab.training.train import train

compute = choose()
on_cpu = compute.device.type == "cpu"
print(compute)

# %% [markdown]
# ## Data
#
# Tiny ImageNet is 200 classes of ImageNet at 64 x 64 pixels, 500 training and 50 validation images each. The zip is read
# where it lies and decoded once into one array on disk. The course run's protocol, the split `merged`, pools training and
# validation images and splits them 70 : 30; here the split is the same on every machine, and its hash is kept with every
# result.

# %%
sample = SOURCE == "sample"
source = write_sample(Path("data/sample.zip")) if sample else SOURCE
dataset = prepare(str(source), Path(DATA or ("data/sample" if sample else "data/tiny-imagenet")))
if dataset.made_up:
    print("These are made-up shapes, not Tiny ImageNet: no number below is a result.")

# %%
runs = Path("runs")


def come_back(run):
    if drive and (problem := restore_run(run, drive / run.folder.name)):
        print(problem)
    return run


# All 200 classes take a CPU hours; a run that is finished can be shown anywhere.
recipe, classes, epochs = named(RECIPE or ("cpu" if on_cpu else "published")), CLASSES, EPOCHS
usual = runs / record.default_folder(recipe, SEED).name
whole = come_back(record.Run(Path(RUN or usual)))
if on_cpu and not dataset.made_up and not whole.finished:
    classes, epochs = (10 if CLASSES is None else CLASSES), (6 if EPOCHS is None else EPOCHS)
recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
split = make_split(dataset, recipe.split, classes)
names = dataset.names[: split.classes]
print(f"{len(split.train):,} training and {len(split.test):,} test images")
print(f"{split.classes} classes, split {split.sha256[:16]}")

# %% [markdown]
# ## A look at the images
#
# Sixteen training images with their names and the box that Tiny ImageNet gives for the object.

# %%
suffix = (f"-c{classes}" if classes else "") + (f"-e{epochs}" if epochs else "")
run = come_back(record.Run(Path(RUN or f"{usual}{suffix}")))
batches = make_loader(dataset, split.train, recipe, SEED, compute.device, workers=0)
rows = batches.rows_at(epoch=1, step=0)[:16]
titles = [names[label] for label in dataset.labels[rows]]


def show(name, figure):
    return Image(plots.save(figure, run.figures / f"{name}.png"), width=900)


show(
    "samples",
    plots.image_grid(dataset.images[rows], titles, dataset.boxes[rows], title="Training images"),
)

# %% [markdown]
# The same images as the network sees them in its first step: flipped, padded by reflection and cropped, each by chance;
# `published` also cuts a hole of the mean colour.

# %%
augmented = batches.batch(epoch=1, step=0).images[:16].cpu().numpy()
show("augmentation", plots.before_after(dataset.images[rows], augmented, titles))

# %% [markdown]
# ## The network
#
# ResNet-18 with a 3 x 3 stem of stride 1 and no max-pooling: at 64 x 64 pixels the last stage still sees 8 x 8.

# %%
print(model.summary(split.classes, recipe.width))

# %% [markdown]
# ## The recipe
#
# What differs from the course run, and the one-cycle schedule that follows from it.

# %%
course_run = vars(named("published"))
for name, value in vars(recipe).items():
    if value != course_run[name]:
        print(f"{name:<26}{value!s:<26}course run: {course_run[name]}")

# %%
_, learning_rates, momenta = zip(*schedule(recipe, len(split.train)))
show(
    "learning_rate",
    plots.learning_rate_curve(learning_rates, momenta, recipe.steps_per_epoch(len(split.train))),
)

# %% [markdown]
# ## Training
#
# A line per epoch, and one for each test on all test images, which a CPU makes after every fourth epoch and the last one.
# The reported result is that of the last epoch, never of the best.
# Stopping the cell saves the run first; running it again continues with the very same images. A run that is finished
# only shows its log.

# %%
on_drive = drive / run.folder.name if drive else None
if on_drive and (CONTINUE_ANYWAY or not (on_drive / "commit").exists()):
    on_drive.mkdir(parents=True, exist_ok=True)
    (on_drive / "commit").write_text((commit() or "").rstrip("+"))
run = train(
    recipe,
    dataset,
    folder=run.folder,
    seed=SEED,
    limit_classes=classes,
    mirror=on_drive / "checkpoints" if on_drive else None,
    test_every=4 if recipe.name == "cpu" else 1,
    continue_anyway=CONTINUE_ANYWAY,
)

# %% [markdown]
# ## Curves
#
# Loss and accuracy of training and test images; beside a run of all 200 classes, dashed, the course run.

# %%
show("curves", plots.accuracy_and_loss(run.history, run.course_run, run.title))

# %%
result = run.summary
print(
    f"top-1 {result['test_top1']:.2f} %, top-5 {result['test_top5']:.2f} % of {result['test_images']:,} test images"
)
print(
    f"{result['train_seconds'] / 60:.1f} minutes of training, {result['images_per_second']:.0f} images/s, {compute}"
)

# %% [markdown]
# ## What it gets wrong
#
# Everything below comes from the predictions that the run has kept and, for the maps, from its network. First the
# accuracy of each class.

# %%
network, metadata = load(run.folder)
found = analyse_run(run, dataset, split, network.to(compute.device), progress=True)
print(f"{found.explanation.wrong:,} of {found.explanation.tested:,} test images are wrong")
show("classes", found.figures["classes"])

# %% [markdown]
# Which classes are mistaken for which: the confusion matrix, in an order that puts confused classes next to each other,
# and the six pairs that are confused most often, with some of their images.

# %%
show("confusion", found.figures["confusion"])

# %%
show("confused_pairs", found.figures["confused_pairs"])

# %% [markdown]
# Ten mistakes, drawn at random from all of them, and the ten with the highest predicted probability.

# %%
show("misclassified", found.figures["misclassified"])

# %%
show("confident_mistakes", found.figures["confident_mistakes"])

# %% [markdown]
# ## Calibration
#
# Of the predictions with 80 % probability, 80 % should be right. A temperature, by which all logits are
# divided, often corrects this; each half of the test images is judged with the one that fits the other half.

# %%
show("reliability", found.figures["reliability"])

# %% [markdown]
# ## Labels that cannot both be right
#
# Tiny ImageNet holds identical images with different labels, found here by comparing all pixels. A network that learns
# one of the labels is wrong about the other; this explains a small share of all mistakes.

# %%
doubts = found.conflicts
print(
    f"{len(doubts['pairs'])} pairs; {doubts['tested']} of these images are tested here, {doubts['wrong']} of them wrong"
)
show("label_conflicts", found.figures["label_conflicts"]) if doubts["tested"] else None

# %% [markdown]
# ## Where it looked
#
# Grad-CAM on the ten mistakes: the evidence for the predicted class, and for the actual one. Each map
# is scaled to itself, so brightness cannot be compared between images or classes. The last stage has 8 x 8 values.

# %%
show("class_maps", found.figures["class_maps"])

# %% [markdown]
# The same for all four stages and the predicted class, heat map and overlay.

# %%
show("gradcam", found.figures["gradcam"])

# %% [markdown]
# ## Do the maps look at the object?
#
# Tiny ImageNet tells where the object is. Two questions to every map: does its highest point lie in the box (the
# pointing game), and how much of it does? Many boxes are large, so the numbers mean little without two baselines: the
# centre of the image as the point, and a map that is the same everywhere. Where the box covers less than half of the
# image, both are harder.

# %%
print(found.localisation.in_words())
show("localisation", found.figures["localisation"])

# %% [markdown]
# ## Try your own image
#
# Set `IMAGE` to the path of a JPEG, PNG or WebP, or, in Colab, `UPLOAD` to `True` and run the cell. It is turned
# upright, cut to its middle square and scaled to 64 x 64, as the training images were. The network knows the classes
# above and nothing else: it will name one of them whatever it sees.

# %%
if UPLOAD and in_colab:
    from google.colab import files

    IMAGE = next(iter(files.upload()), None)
mine = read_image(Path(IMAGE)) if IMAGE else dataset.images[split.test[0]]
(top,) = predict(network, metadata, mine[None])
heat = explain_answers(network, metadata, mine[None], [top])[0]
title = (
    Path(IMAGE).name if IMAGE else f"a test image: {dataset.names[dataset.labels[split.test[0]]]}"
)
plots.prediction(mine, top, heat, title=title)

# %% [markdown]
# ## Output files
#
# The run folder holds recipe, environment, log, predictions, figures, and `model.safetensors`: the weights with the class
# list, in the order of the logits, in its metadata. `export/` holds what to share: the weights, a model card with the
# numbers, the class list, and, if `ONNX` is set (it needs `pip install onnx onnxscript onnxruntime`), the network for
# other programs, compared with this one.

# %%
for _ in found.save(run, Path(FIGURES) if FIGURES else None):
    pass
card.write_hand_over(run, run.folder / "export")
if ONNX:
    print(export_onnx(network, metadata, run.folder / "export" / "model.onnx"))

# %%
if on_drive:
    try:
        copy_run(run, on_drive)
    except UserError as error:
        print("note:", error)
kept = {".csv", ".json", ".jsonl", ".md", ".npz", ".onnx", ".png", ".safetensors"}
for path in sorted(run.folder.rglob("*")):
    if path.suffix in kept:
        print(f"{path.stat().st_size:>12,} bytes  {record.relative_to_here(path)}")

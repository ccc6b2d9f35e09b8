"""Where a run computes, in which number format, and what else its numbers depend on."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tinylab.exceptions import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """device: where tensors live. precision: "fp32", or the autocast format "bf16" or "fp16"."""

    device: torch.device
    precision: str
    reason: str
    """Why this precision."""

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute convolutions and matrix products in `precision`; all else stays fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scale the loss where gradients would underflow: for fp16 only, else do nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def synchronise(self) -> None:
        """Wait for queued work, so that a clock read next counts it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def __str__(self) -> str:
        return f"{device_name(self.device)}, {self.precision}: {self.reason}"


def choose(device: str = "auto", precision: str = "auto", *, compiled: bool = False) -> Compute:
    """Return where and in which number format to compute.

    device: "auto", "cpu", "cuda", "mps". precision: "auto", "fp32", "bf16", "fp16".
    compiled: the step runs under torch.compile. Raise `UserError` for what this machine lacks.
    """
    # ---- device ----
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device '{device}'; there are: auto, cpu, cuda, mps")
    if device == "cuda" and not cuda:
        colab = "in Colab: Runtime > Change runtime type > T4 GPU"
        raise UserError(f"no CUDA device here; use --device auto or cpu ({colab})")
    if device == "mps" and not mps:
        raise UserError("no Apple GPU here; use --device auto or cpu")

    # ---- compiler ----
    if compiled and device == "mps":
        raise UserError("--compile is for CPUs and CUDA GPUs; leave it out")
    if compiled and device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs Triton, which is not installed here; leave it out")
    if compiled:  # on CUDA for Triton's launchers
        cpu = device == "cpu"
        named = os.environ.get("CXX" if cpu else "CC")
        usual = ("g++", "clang++", "cl") if cpu else ("gcc", "clang", "cc", "cl")
        names = (named,) if named else usual
        if not any(shutil.which(name.split()[0]) for name in names):
            lacking = f"and there is no {' or '.join(names)} here; leave it out"
            raise UserError(f"--compile needs a compiler, {lacking}")

    # ---- precision ----
    if precision not in ("auto", *PRECISIONS):
        known = ", ".join(PRECISIONS)
        raise UserError(f"unknown precision '{precision}'; there are: auto, {known}")
    if precision == "fp16" and device != "cuda":
        raise UserError("fp16 needs a CUDA GPU; use --precision auto, fp32 or bf16")
    reason = "as asked for"
    if precision == "auto" and device == "cuda":
        # Not torch.cuda.is_bf16_supported(): it counts emulation, slower than fp32 on a T4.
        if compiled and torch.cuda.get_device_capability() >= (8, 0):
            precision, reason = "bf16", "native bf16, compiled"
        else:  # on newer GPUs, too: there is no cuDNN path for bf16 batch norm
            precision, reason = "fp16", "16-bit with loss scaling, fastest without compilation"
    elif precision == "auto" and device == "mps":
        precision, reason = "fp32", "16-bit formats are not trusted on Apple GPUs yet"
    elif precision == "auto" and cpu_has_bf16():
        precision, reason = "bf16", "this processor computes bf16 natively"
    elif precision == "auto":
        precision, reason = "fp32", "no native 16-bit format here"
    return Compute(torch.device(device), precision, reason)


def cpu_has_bf16() -> bool:
    """Return whether the processor itself multiplies bf16 and oneDNN may use it.

    Only Linux tells. oneDNN's own answer heeds ONEDNN_MAX_CPU_ISA, but counts AVX-512 that emulates
    bf16, slowly.
    """
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_info().split())
    onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(native) and onednn


def cpu_info() -> str:
    """Return what Linux tells of the processor; elsewhere nothing."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


@contextlib.contextmanager
def fastest_convolutions(compute: Compute) -> Iterator[None]:
    """Let cuDNN measure, for each new shape, which algorithm is fastest; training has few."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or compute.device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def device_name(device: torch.device) -> str:
    """Return the GPU's or processor's name as its driver or system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    model = re.search(r"^model name\s*:(.*)", cpu_info(), re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return f"CPU ({name})"


def describe_environment(compute: Compute, processes: int = 1) -> dict:
    """Return what a number depends on besides the recipe: device, versions, threads, commit."""
    cuda = compute.device.type == "cuda"
    versions = {}
    for package in ("torchvision", "albumentations", "numpy", "opencv-python-headless", "grad-cam"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
        versions.setdefault(package, None)
    return {
        "device": device_name(compute.device),
        "power_limit_watts": power_limit() if cuda else None,
        "precision": compute.precision,
        "precision_reason": compute.reason,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own type may be in no checkpoint
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32 if cuda else None,
        **versions,
        "commit": commit(),
        "source_sha256": SOURCE_SHA256,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "processes": processes,
    }


def power_limit() -> float | None:
    """Return the first GPU's power limit in watts, as nvidia-smi says."""
    query = ("--query-gpu=power.limit", "--format=csv,noheader,nounits", "-i", "0")
    with contextlib.suppress(ValueError):
        return float(output("nvidia-smi", *query))


def compile_cache() -> str:
    """Return "filled" if torch.compile finds code of earlier runs: then no clock is cold."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folders = [Path(named)] if named else Path(tempfile.gettempdir()).glob("torchinductor_*")
    filled = any(folder.is_dir() and any(folder.iterdir()) for folder in folders)
    return "filled" if filled else "empty"


def commit() -> str | None:
    """Return the commit of the code that runs, with "+" if its files differ from it.

    For code without its history: the variable TINYLAB_COMMIT.
    """
    git = ("git", "-C", str(Path(__file__).parents[1]))
    if head := output(*git, "rev-parse", "--short=12", "HEAD"):
        return head + "+" * bool(output(*git, "status", "--porcelain", "-uno", "--", "."))
    return os.environ.get("TINYLAB_COMMIT") or None


def source_sha256(package: Path) -> str:
    """Return the hash of the code that decides results.

    Not of cli, options, explain, figures, share. Line ends count as \\n, so that a checkout on
    Windows has the same.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(("cli.py", "options.py", "explain/", "figures/", "share/")):
            digest.update(f"{name}\n".encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


SOURCE_SHA256 = source_sha256(Path(__file__).parents[1])
"""Of the code as it was imported, whatever happens to its files afterwards."""


def output(*command: str) -> str:
    """Return what a program prints; nothing if it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return ""

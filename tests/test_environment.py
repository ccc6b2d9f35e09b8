"""Where a run computes and in which number format, on machines that this one only pretends to
be."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinylab.exceptions import UserError
from tinylab.run import environment as device
from tinylab.run.environment import choose, device_name


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """A function that makes this machine look like one with that GPU and processor."""

    def call(
        capability: tuple[int, int] | None = None, mps: bool = False, cpu_bf16: bool = False
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Pretended GPU")
        # It says yes on every GPU, also where bf16 is emulated.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(device, "cpu_has_bf16", lambda: cpu_bf16)

    return call


@pytest.mark.parametrize(
    ("capability", "compiled", "precision"),
    [
        ((7, 5), False, "fp16"),  # T4
        ((7, 5), True, "fp16"),
        ((7, 0), True, "fp16"),  # V100
        ((8, 0), False, "fp16"),  # A100
        ((8, 0), True, "bf16"),
        ((8, 9), True, "bf16"),  # L4
        ((9, 0), False, "fp16"),  # H100
        ((9, 0), True, "bf16"),
        ((10, 0), True, "bf16"),
    ],
)
def test_precision_on_cuda(
    pretend, capability: tuple[int, int], compiled: bool, precision: str
) -> None:
    pretend(capability)
    compute = choose(compiled=compiled)
    assert (compute.device.type, compute.precision) == ("cuda", precision)
    assert compute.grad_scaler().is_enabled() == (precision == "fp16")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_compiling_without_a_compiler_is_refused(
    pretend, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend((9, 0))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _name: object())
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(
        device.shutil, "which", lambda command: f"bin/{command}" if "clang" in command else None
    )
    assert choose(name, compiled=True).device.type == name
    monkeypatch.setattr(device.shutil, "which", lambda _command: None)
    with pytest.raises(UserError, match="--compile needs a compiler"):
        choose(name, compiled=True)
    assert choose(name).device.type == name
    monkeypatch.setattr(device.shutil, "which", lambda command: command)
    monkeypatch.setenv("CC" if name == "cuda" else "CXX", "nowhere/cc -O2")
    assert choose(name, compiled=True).device.type == name
    monkeypatch.setattr(
        device.shutil, "which", lambda command: None if "nowhere" in command else command
    )
    with pytest.raises(UserError, match=r"no nowhere/cc"):
        choose(name, compiled=True)


def test_compiling_for_a_gpu_needs_triton(pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend((9, 0))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="Triton"):
        choose(compiled=True)
    pretend(mps=True)
    with pytest.raises(UserError, match="--compile is for CPUs and CUDA"):
        choose(compiled=True)


def test_convolutions_are_measured_only_while_training_on_a_gpu(pretend) -> None:
    before = torch.backends.cudnn.benchmark
    pretend((9, 0))
    for name, expected in (("cuda", True), ("cpu", before)):
        with device.fastest_convolutions(choose(name)):
            assert torch.backends.cudnn.benchmark is expected
        assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_precision_on_a_processor(pretend, native: bool, precision: str) -> None:
    pretend(cpu_bf16=native)
    compute = choose()
    assert (compute.device.type, compute.precision) == ("cpu", precision)
    assert not compute.grad_scaler().is_enabled()


def test_apple_gpus_compute_in_fp32(pretend) -> None:
    pretend(mps=True, cpu_bf16=True)
    compute = choose()
    assert (compute.device.type, compute.precision) == ("mps", "fp32")


def test_what_is_asked_for_is_what_is_taken(pretend) -> None:
    pretend((9, 0))
    assert choose("cpu").device.type == "cpu"
    for precision in ("fp32", "bf16", "fp16"):
        assert choose("cuda", precision).precision == precision


def test_an_absent_device_is_refused_with_what_to_do(pretend) -> None:
    pretend()
    with pytest.raises(UserError, match=r"no CUDA device.*--device auto or cpu.*Colab"):
        choose("cuda")
    with pytest.raises(UserError, match="no Apple GPU"):
        choose("mps")
    with pytest.raises(UserError, match=r"'tpu'.*auto, cpu, cuda, mps"):
        choose("tpu")


def test_an_impossible_precision_is_refused(pretend) -> None:
    pretend()
    pretend(mps=True)
    for name in ("cpu", "mps"):
        with pytest.raises(UserError, match="fp16 needs a CUDA GPU"):
            choose(name, "fp16")
    with pytest.raises(UserError, match=r"'fp8'.*auto, fp32, bf16, fp16"):
        choose("cpu", "fp8")


def test_autocast_is_on_for_16_bit_formats_only(pretend) -> None:
    pretend(cpu_bf16=True)
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with choose("cpu", "bf16").autocast():
        assert layer(x).dtype == torch.bfloat16
    with choose("cpu", "fp32").autocast():
        assert layer(x).dtype == torch.float32


def test_a_placement_explains_itself_in_one_line(pretend) -> None:
    pretend((7, 5))
    assert str(choose()).startswith("Pretended GPU, fp16: ")
    pretend()
    assert str(choose()).startswith("CPU (")
    assert "\n" not in str(choose())
    assert device_name(torch.device("cpu")).startswith("CPU (")


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags : fpu avx512f avx512_bf16 amx_tile", True),
        ("flags : fpu amx_bf16", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2 avx512f avx512bw", False),
        ("", False),
    ],
)
def test_a_processors_bf16_is_read_from_its_flags(
    monkeypatch: pytest.MonkeyPatch, flags: str, native: bool
) -> None:
    """And oneDNN may use it: by itself it says yes where bf16 is emulated, too."""
    monkeypatch.setattr(device.Path, "read_text", lambda _path: f"model name : Some CPU\n{flags}\n")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    question = "_is_mkldnn_bf16_supported"
    for answer in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, question, lambda answer=answer: answer)
        assert device.cpu_has_bf16() is (native and answer)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no such instructions")
def test_a_processor_held_to_avx2_computes_in_fp32(subprocess_environment: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-c",
        "import tinylab.run.environment as d; print(d.choose('cpu').precision)",
    ]
    environment = subprocess_environment | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fp32\n", done.stderr


def test_without_a_list_of_flags_no_bf16_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_path: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(device.Path, "read_text", missing)
    assert device.cpu_has_bf16() is False
    assert device_name(torch.device("cpu")).startswith("CPU (")


def test_the_codes_hash_is_of_what_decides_results(tmp_path: Path) -> None:
    for name in ("model.py", "training/step.py", "cli.py", "share/card.py", "figures/style.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"one\ntwo\n")
    before = device.source_sha256(tmp_path)
    for name in ("cli.py", "share/card.py", "figures/style.py"):
        (tmp_path / name).write_bytes(b"other\n")
    (tmp_path / "model.py").write_bytes(b"one\r\ntwo\r\n")
    assert device.source_sha256(tmp_path) == before
    (tmp_path / "training" / "step.py").write_bytes(b"one\nthree\n")
    assert device.source_sha256(tmp_path) != before

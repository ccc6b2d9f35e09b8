"""The benchmark of the recipe `cpu` runs, and its line of JSON hangs together."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")  # its version is among the conditions


def test_shares_follow_from_speeds_and_sizes(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", "--quick", "--precision", "fp32"])
    importlib.import_module("bench_cpu").main()
    text = capsys.readouterr().out
    result = json.loads(text.splitlines()[-1])
    peak = result["rows"].pop("plain product")["gflops"]["median"]
    parts = ("forward, backward", "whole step")
    sizes = [f"{part}, {side} px" for part in parts for side in (32, 48, 64)]
    assert list(result["rows"]) == [*sizes, "tests, 64 px"]
    per_image = {}
    for name, row in result["rows"].items():
        keys = ("images_per_second", "gflops", "share_of_product")
        rate, gflops, share = (row[key]["median"] for key in keys)
        per_image[name] = 16 * gflops / rate  # width 16 has a sixteenth of the arithmetic
        assert share == pytest.approx(gflops / peak, abs=1e-3)
        if name.startswith("whole step"):
            step = result["batch"] / rate
            assert 0 < row["optimizer_seconds"]["median"] + row["average_seconds"]["median"] < step
        else:
            assert "optimizer_seconds" not in row
    assert list(per_image.values()) == pytest.approx([3.3325, 7.498, 13.33] * 2 + [4.443], rel=1e-3)
    assert result["skipped_steps"] == 0
    assert text.count(": met") + text.count(": missed") == len(result["targets"]) == 4

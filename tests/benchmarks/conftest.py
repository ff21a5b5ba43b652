"""bench.py without a process of its own, which would import PyTorch and measure the machine anew."""

import sys
from collections.abc import Callable

import pytest

import bench
from benchmarks import setting
from benchmarks.ceilings import measure_ceilings


@pytest.fixture
def bench_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`bench_here(*arguments)` runs bench.py, whose ceilings are those of a hurried look. Returns what it prints."""

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench.py", *args])
        monkeypatch.setattr(setting, "measure_ceilings", lambda *asked: measure_ceilings(*asked[:2], shrink=64))
        bench.main()
        return capsys.readouterr().out

    return run

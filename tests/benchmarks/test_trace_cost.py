"""The benchmark of traces runs, and measures every part of a trace's way."""

import json

import pytest

from benchmarks import trace_cost


def test_each_part_of_the_way_is_measured_for_each_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace_cost, "COLD_BYTES", 1)
    options = ["--rows", "4", "--blocks", "1024", "--traces", "3", "--every", "2"]
    monkeypatch.setattr("sys.argv", ["trace_cost", *options])
    trace_cost.main()
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    for part in ("trace", "pickle", "objects", "JSON"):
        first, *rest = measured[part]
        assert len(rest) == 3 and 0 < min(rest) < first, "the first trace has the whole cache"

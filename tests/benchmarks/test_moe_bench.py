"""The benchmark of a mixture-of-experts layer runs without a GPU, checks its results and ends with its table."""

import sys

import pytest

from benchmarks import moe


def test_it_prints_a_row_for_each_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", "moe --device cpu --shapes tiny --tokens 1 8".split())
    moe.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-3:-1]] == ["tiny, 1", "tiny, 8"]
    assert not any("failed" in line or "WRONG" in line for line in lines)


def test_what_fails_is_printed_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = moe.measure

    def fail(layers, shape, num_tokens, *rest):
        if num_tokens == 1:
            raise RuntimeError("out of resources")
        return measure(layers, shape, num_tokens, *rest)

    monkeypatch.setattr(moe, "measure", fail)
    monkeypatch.setattr(sys, "argv", "moe --device cpu --shapes tiny --tokens 1 8".split())
    moe.main()
    out = capsys.readouterr().out
    assert "out of resources" in out and "tiny, 1 tokens: failed" in out and "\ntiny, 8 " in out


def test_a_layers_floor_is_what_it_reads_and_multiplies() -> None:
    shape = moe.MoEShape(hidden_size=100, intermediate_size=10, num_experts=8, k=2)
    ceilings = moe.Ceilings(read_bytes_per_s=1.0, copy_bytes_per_s=1.0, matmul_flops_per_s=1.0)
    assert shape.floor_s(5, 4, ceilings) == (4 * 6000 + 1600, 5 * (2 * 6000 + 1600))

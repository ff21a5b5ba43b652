"""Several engines share a machine's devices."""

import pytest
import torch

from nanovllm.remote.devices import devices_of_engines


def test_each_engine_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_of_engines(2, {"tensor_parallel_size": 2}) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "2,3"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-5a,3,1")
    assert [env["CUDA_VISIBLE_DEVICES"] for env in devices_of_engines(3, {})] == ["7", "GPU-5a", "3"]


def test_too_few_are_refused_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match="data_parallel_size=2 with tensor_parallel_size=2 needs 4 devices; 3 are"):
        devices_of_engines(2, {"tensor_parallel_size": 2})


@pytest.mark.parametrize("options", [{"device": "cpu"}, {}])
def test_one_engine_takes_what_is_visible_and_a_cpu_has_none(options: dict[str, str]) -> None:
    assert devices_of_engines(1, {}) == [{}] and devices_of_engines(2, {"device": "cpu"}) == [{}, {}]

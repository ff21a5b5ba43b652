"""The setting that all modes of `bench.py` share: the model, the engine's options, and how to draw the requests."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.engines import EngineOptions
from benchmarks.model_shape import ModelShape, model_shape
from benchmarks.report import ceilings_line
from benchmarks.roofline import Roofline, roofline
from benchmarks.workloads import LengthMix, Workload, draw, shrunk

SHAPES = Path(__file__).parent / "shapes"


@dataclass(slots=True, frozen=True, kw_only=True)
class Setting:
    """A mode's setting. `shrink` divides every number of requests and tokens, to try a mode out quickly."""

    options: EngineOptions
    config: dict[str, Any]  # the model's config.json
    temperature: float
    seed: int
    repeat: int
    shrink: int = 1
    experts_hit: tuple[tuple[int, float], ...] = ()  # as `count_experts_hit` gives them

    @property
    def dtype(self) -> torch.dtype:
        """The engine's dtype. "auto" means config.json's, under its new or old key, or float32 if it has none."""
        own = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        return getattr(torch, own if self.options.dtype == "auto" else self.options.dtype)

    @property
    def shape(self) -> ModelShape:
        shape = model_shape(self.options.model_dir, self.dtype.itemsize)
        return replace(shape, experts_hit=self.experts_hit) if self.experts_hit else shape

    def draw(self, name: str, mix: LengthMix, all_seqs: bool = False) -> Workload:
        """Draw the mix's requests. With `all_seqs`, `shrink` does not divide their number.

        Raises ValueError if a request is longer than the engine's max_model_len.
        """
        small = shrunk(mix, self.shrink)
        small = replace(small, num_seqs=mix.num_seqs if all_seqs else small.num_seqs)
        workload = draw(name, small, self.config["vocab_size"], self.temperature, self.seed)
        longest = max(map(sum, zip(workload.input_lens, workload.max_tokens, strict=True)))
        if longest > self.options.max_model_len:
            raise ValueError(
                f"the workload's longest request has {longest} tokens, more than max_model_len="
                f"{self.options.max_model_len}"
            )
        return workload

    def measure_ceilings(self) -> Ceilings:
        """Measure the device's limits. Prints and returns them."""
        ceilings = measure_ceilings(self.options.device, self.dtype, self.shrink)
        print(ceilings_line(ceilings, str(self.dtype).removeprefix("torch.")), flush=True)
        return ceilings

    def bound(self, workload: Workload, ceilings: Ceilings, max_num_seqs: int | None = None) -> Roofline:
        """The workload's roofline. `max_num_seqs` replaces the option's value.

        Several ranks, each on its own device, read and compute that many times as much; communication counts as free.
        On a CPU all ranks share the measured limits.
        """
        rows = max_num_seqs or self.options.max_num_seqs
        num_devices = self.options.tensor_parallel_size if self.options.device == "cuda" else 1
        return roofline(self.shape, workload.input_lens, workload.max_tokens, ceilings.times(num_devices), rows)

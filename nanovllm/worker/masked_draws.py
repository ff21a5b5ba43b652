"""Draws under the masks of grammars: how a step's masks come to the device, and what rows draw that edit nothing else.

Such rows need no copy of their logits: the sampler reads the model's own ones under their bits. All of a step draw
together, in two launches.
"""

from collections.abc import Collection

import numpy as np
import torch

from nanovllm.kernels.sampling.logit_edits import send
from nanovllm.kernels.sampling.sample import sample
from nanovllm.kernels.sampling.tensors import TokenBits
from nanovllm.worker.input_batch import InputBatch


class MaskedDraws:
    """The masks of one step after the other."""

    def __init__(self, batch: InputBatch) -> None:
        self._batch = batch
        self._device = batch.state.device
        self._buffer = np.empty((0, 0), dtype=np.int32)
        self._entries: tuple[list[int], torch.Tensor | None] = ([], None)  # that drew last, and the same on the device
        self._copies = torch.cuda.Stream(self._device) if batch.state.is_cuda else None

    def buffer(self, num_masks: int, num_words: int) -> np.ndarray:
        """`[num_masks, num_words]` int32 on the host, for a step's masks; page-locked if the device is a GPU.

        It is always the same memory: the host makes a step's masks when it has read the tokens of the step before,
        whose masks the device has therefore copied.
        """
        if num_masks and self._buffer.shape[1] != num_words:
            size = (self._batch.num_entries, num_words)
            self._buffer = torch.empty(size, dtype=torch.int32, pin_memory=self._batch.state.is_cuda).numpy()
        return self._buffer[:num_masks]

    def send(self, bits: np.ndarray) -> torch.Tensor:
        """Copy masks to the device. They are MBs: a GPU copies them while it still computes the step."""
        on_host = torch.from_numpy(bits)
        if self._copies is None:
            return on_host
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            on_device = on_host.to(self._device, non_blocking=True)
        current.wait_stream(self._copies)
        on_device.record_stream(current)
        return on_device

    def draw(
        self,
        samples: list[int],
        edited: Collection[int],
        bits: torch.Tensor,
        logits: torch.Tensor,
        seq_lens: torch.Tensor,
        sampled: torch.Tensor,
    ) -> None:
        """Draw those of `samples` that are not `edited`, each under its mask in `bits`, `[samples, words]`.

        Args:
            logits, seq_lens, sampled: as of `LogitExtras.run`.
        """
        which = [mask for mask, i in enumerate(samples) if i not in edited] if edited else None
        if which is not None:
            samples, bits = [samples[mask] for mask in which], bits[send(which, torch.int64, self._device)]
        if not samples:
            return
        if self._entries[0] != samples:  # they rarely change from step to step
            self._entries = (samples, send(samples, torch.int64, self._device))
        batch, masks = self._batch, TokenBits(self._entries[1], bits)
        sample(logits, batch.live_rows, seq_lens, batch.params, batch.token_ids, sampled, masks)

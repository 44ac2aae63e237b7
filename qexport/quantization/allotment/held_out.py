"""Samples that no solver sees, on which --max-loss is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qexport.calibrate.windows import batches
from qexport.formats.opening import open_checkpoint
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream
from qexport.modeling.skeleton import build_skeleton
from qexport.quantization.source import Source

_BATCH_TOKENS = 4096


@dataclass
class HeldOut:
    """`windows` int64 [samples, length] of the text that `source` is calibrated on.

    Models run on them in fp32 on `device`, a block at a time, with `memory` bytes for hidden states.
    """

    source: Source
    windows: torch.Tensor
    memory: int
    device: torch.device
    trust_remote_code: bool
    _full: float | None = field(default=None, init=False)

    def rise(self, quantized: Path) -> float:
        """How much higher the perplexity of the model in `quantized` is than the source's, as a share;
        negative where it is lower. Hidden states past the memory go to a file beside that."""
        directory = quantized.parent
        if self._full is None:
            self._full = self._nll(self.source, directory)
        own = Source(open_checkpoint(quantized), self.source.path, dict, [])
        return math.expm1(min(self._nll(own, directory) - self._full, 700.0))  # past which no float has it

    def _nll(self, source: Source, directory: Path) -> float:
        """Mean negative log-likelihood of all tokens but the windows' first, nats."""
        skeleton = build_skeleton(source.path, trust_remote_code=self.trust_remote_code)
        stream = BlockStream(skeleton, source.checkpoint, device=self.device)
        parts = batches(self.windows, _BATCH_TOKENS)
        with Activations(self.memory, directory, torch.float32) as hidden:
            hidden.extend(stream.embeddings(parts))
            for index in range(len(stream)):
                with stream.block(index):
                    for number, batch in enumerate(hidden):
                        hidden[number] = stream.run(index, batch)
            total = 0.0
            for tokens, logits in zip(parts, stream.logits(parts, hidden), strict=True):
                chances = logits[:, :-1].float().log_softmax(-1)
                total -= float(chances.gather(-1, tokens[:, 1:, None].to(self.device)).double().sum())
        return total / (self.windows.shape[0] * (self.windows.shape[1] - 1))

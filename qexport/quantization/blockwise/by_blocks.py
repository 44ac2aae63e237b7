"""Calibrated methods: the model block by block, read once for all outputs that are wanted of it.

What a layer's codes are fitted to depends on the effort. Those that do not follow take the inputs that the
full-precision model has there: gathered in one run a block, and shared by all such outputs. Those that follow
have hidden states of their own, and every layer makes up for what those before it became. Embeddings are the
exception: where they become codes too, the first block still sees them in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from qexport.calibrate.windows import batches
from qexport.devices import CPU
from qexport.events import OnEvent
from qexport.grids.products import fast_in_bf16
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream
from qexport.modeling.calibration import CalibrationData
from qexport.quantization.blockwise.full_block import FullBlock
from qexport.quantization.blockwise.lanes import Lane
from qexport.quantization.blockwise.one_block import OneBlock
from qexport.quantization.blockwise.output_curvature import OutputCurvatures
from qexport.quantization.blockwise.quantized_block import QuantizedBlock
from qexport.quantization.blockwise.remarks import Remarks

_BATCH_TOKENS = 2048  # tokens that go through a block at once
_STORES_A_BLOCK = 4  # of a dense block's layers, by their inputs


@dataclass
class BlockQuantizer:
    """Runs plans of one model over its calibration windows, the model on `device`.

    Holds one block and a copy of it (with that of the block before where two are tuned together), its
    statistics, and `memory` bytes of hidden states; the rest of these lies in a temporary file in
    `directory`. On the device lie blocks, statistics and one batch; hidden states and codes are the CPU's.
    """

    lanes: Sequence[Lane]
    data: CalibrationData
    memory: int
    directory: Path
    on_event: OnEvent
    device: torch.device = CPU

    def run(self) -> None:
        """Solves every layer of every block for each lane, and writes it.

        Raises NonFiniteError that names the layer whose inputs are not finite.
        """
        remarks = Remarks(self.data.tokens, self.on_event)
        remarks.few_tokens(self.lanes)
        # what a lane writes does not depend on those that go with it
        quick = fast_in_bf16() and self.device.type == "cpu"
        for rounded in (True, False):
            if lanes := [lane for lane in self.lanes if (quick and lane.rounded) is rounded]:
                self._pass(lanes, remarks, rounded=rounded)
        remarks.tell()

    def _pass(self, lanes: Sequence[Lane], remarks: Remarks, *, rounded: bool) -> None:
        """Once through the model."""
        plan = lanes[0].plan
        stream = BlockStream(plan.skeleton, plan.checkpoint, rounded=rounded, device=self.device)
        tokens = batches(self.data.windows, _BATCH_TOKENS)
        following = [lane for lane in lanes if lane.method.follows]
        # the full model's before a block and, if it is followed, after it and within it; and the lanes' own
        weighing = [lane for lane in lanes if lane.method.weighs_outputs]
        share = self.memory // (len(following) + len(weighing) + (3 if following else 1))
        with ExitStack() as stack:

            def store(budget: int = share, stack: ExitStack = stack) -> Activations:
                return stack.enter_context(Activations(budget, self.directory))

            curvatures = None
            if weighing:
                curvatures = stack.enter_context(OutputCurvatures(self.directory))
                curvatures.gather(stream, tokens, memory=self.memory, on_event=self.on_event)
            before = store()
            before.extend(stream.embeddings(tokens))
            after = store() if following else before
            for lane in following:
                lane.hidden = store()
            for lane in weighing:
                lane.earlier = store()
            waiting: dict[int, QuantizedBlock] = {}  # to be tuned once more, with the next
            for index in range(len(stream)):
                with stream.block(index) as module, ExitStack() as within:
                    curvature = curvatures.of_block(index) if curvatures else None
                    full = FullBlock(stream, index, module, before, after, curvature)
                    for inner in full.compared(lanes):
                        full.inputs[inner] = store(share // _STORES_A_BLOCK, within)
                    full.run(lanes)
                    for number, lane in enumerate(lanes):
                        one = OneBlock(lane, full, tokens, remarks, waiting.pop(number, None)).solve()
                        if lane.earlier is not None and index + 1 < len(stream):
                            waiting[number] = one
                        else:
                            one.write()
                        del one
                    del full, curvature  # before the memory goes back
                before, after = after, before

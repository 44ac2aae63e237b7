"""The maker of the embedded default model and of the calibration data.

``python -m calibration.make --seed 7`` writes the texts from a small bilingual grammar and trains
the tokenizer, the base model and the adapter on them; nothing is taken from outside.
"""

import os

# Without this, threads that wait for each other spin, and one busy neighbour on a small machine
# slows a step tenfold. It has to be set before torch loads its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""The model behind a checkpoint: its skeleton without weights, one block at a time, or the whole of it."""

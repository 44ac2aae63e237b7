"""GGUF files out of a checkpoint: which types, read once, encoded for all of them."""

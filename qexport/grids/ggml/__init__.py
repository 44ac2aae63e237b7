"""ggml's block types: the grids of GGUF files, each with its encoder beside its decoder."""

"""A tokenizer as GGUF settings, and back."""

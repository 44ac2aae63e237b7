"""Adapter files -> deltas -> a streamed merge."""

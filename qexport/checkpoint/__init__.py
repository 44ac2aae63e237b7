"""Bytes in and bytes out: open a checkpoint, read a tensor, plan shards, write, carry the small files."""

"""Figures for the README, each by the command in its module: `python -m benchmarks.NAME`."""

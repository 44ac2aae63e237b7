"""The embedded default: a small model of our own, its adapter, and the demo recipe."""

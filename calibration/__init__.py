"""Calibration text, held-out text and translation pairs that ship with the package."""

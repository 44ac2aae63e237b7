"""Calibrated methods, a block at a time: lanes of outputs, the full model there, one block of a lane."""

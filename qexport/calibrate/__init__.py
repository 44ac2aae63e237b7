"""Text -> token windows -> the statistics that calibrated solvers need."""

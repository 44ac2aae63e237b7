"""Scripts that run inside a runtime's own Python, where qexport may not be installed."""

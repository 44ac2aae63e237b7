"""Modelfiles for Ollama: a chat template read off what it writes, and written in Go's template language."""

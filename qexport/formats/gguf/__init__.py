"""GGUF: one file with weights, settings and vocabulary, as llama.cpp and Ollama read it."""

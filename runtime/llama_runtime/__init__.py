"""Run a bundle: many sequences of different lengths in one compiled Llama graph, without torch."""

__version__ = "0.1.0"

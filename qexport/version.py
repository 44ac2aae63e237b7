"""The package's version: read by packaging, printed by the command line, part of every task's key."""

__version__ = "0.1.0"

"""Ratoon: the whole life of a GPT on one's own machine."""

__version__ = "0.1.0"

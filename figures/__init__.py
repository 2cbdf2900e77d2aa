"""Figures drawn from stored results; nothing here computes. See :mod:`figures.style`."""

"""Experiments that compute and store; nothing here draws. See :mod:`analysis.runner`."""

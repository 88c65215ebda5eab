"""Jacobian-regularised training of classifiers and honest attacks on the result."""

__version__ = "0.1.0"

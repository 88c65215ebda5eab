"""Jacobian-regularised training of classifiers and honest attacks on the result."""

"""Figures, tables, HTML, W&B."""

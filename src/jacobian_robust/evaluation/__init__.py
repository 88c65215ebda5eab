"""Evaluation: from checkpoints to results."""

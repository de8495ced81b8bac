"""Ablations: a base and at most ten changed lines each."""

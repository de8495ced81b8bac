"""Experiments: one file a run, each with `get_config(arg)`."""

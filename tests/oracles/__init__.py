"""Slow, obvious float64 NumPy versions of the paper's equations.

Written from the report alone and importing nothing of the package, so that
agreement with it means something. Settings are passed one by one, or as any
object with the attribute names of the experiment configuration.
"""

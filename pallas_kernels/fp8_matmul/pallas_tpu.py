"""Kernel to come."""

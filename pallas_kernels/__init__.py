"""Kernels of DeepSeek-V3: each op with its reference, its api and its cases."""

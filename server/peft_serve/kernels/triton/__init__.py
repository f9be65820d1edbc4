"""Kernels for GPUs, in Triton. Nothing outside this package imports the library."""

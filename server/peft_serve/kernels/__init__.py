"""Grouped adapter operations: the reference in torch, which is also the CPU backend."""

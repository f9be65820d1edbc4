"""Checkpoints that AdapterHub's `adapters` saves, read from their own files without that library."""

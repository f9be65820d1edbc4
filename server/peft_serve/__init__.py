"""peft-serve: one resident base model, every PEFT adapter, one forward pass."""

__version__ = "0.1.0"

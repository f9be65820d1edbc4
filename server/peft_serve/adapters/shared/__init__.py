"""A store of adapters that many processes write to."""

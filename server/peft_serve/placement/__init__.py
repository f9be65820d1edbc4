"""Placement: which of many replicas a request goes to. Whoever routes asks these decisions, and does as they say."""

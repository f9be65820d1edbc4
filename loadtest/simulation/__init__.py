"""A simulation of many replicas: the shipped placements and eviction over measured times, without a server."""

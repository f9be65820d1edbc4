"""Load tests: what the server's speed claims are measured with.

Run as ``python -m loadtest COMMAND`` from the repository root. A *trace* (who asks for what, when) is made from
a seed, a *client* plays it against a server over HTTP, `measure` turns what came back into figures, `report`
prints them. The package talks to the server only through its public HTTP contract and imports none of it,
but for the parts that two commands run by themselves: `terms` (a decode step) and `cache-replay` (eviction).
"""

"""``gpu-check``: is this GPU served correctly, and how fast? One command, under ten minutes, JSON and a table.

`command` reads the options, `supervisor` runs the parts of `parts` in a process beside it and survives its death, and
`child` is that process. `results` is what they write. Everything else is a part, or what parts share: `ground`,
`timing`, `shapes`, `rows`, `random_adapters`, `traffic`.
"""

"""The engine: the one place where scheduling and model meet.

`loop.Engine` owns a thread that plans, runs and commits; `client.EngineClient` is how asyncio code talks to it;
`assembly.build` makes the whole server's inside from `Settings`.
"""

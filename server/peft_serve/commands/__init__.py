"""The subcommands of `peft-serve`. They talk HTTP to a server; only `serving` and `doctor` know the floors below."""

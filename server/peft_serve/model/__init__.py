"""The resident base: loader, families, sites, runner, attention, KV pools, sampler."""

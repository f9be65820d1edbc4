"""The workloads, one file each: `run` plays it on a `Stage` and answers with a `Report`."""

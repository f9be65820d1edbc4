"""Chat templates of strangers, run in a process of their own."""

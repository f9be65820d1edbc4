"""Where checkpoints come from besides uploads: folders, the hub, object stores, and folders that are watched."""

"""peft configs by family of methods."""

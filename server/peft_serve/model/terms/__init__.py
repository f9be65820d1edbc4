"""What adapters do at a site, one kind of term a file."""

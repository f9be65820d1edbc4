"""What an adapter is: primitives, the checkpoint gate, one compile function a method, store, catalog, host cache."""

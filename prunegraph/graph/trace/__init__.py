"""One run of the forward, recorded."""

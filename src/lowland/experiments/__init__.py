"""One module per study."""

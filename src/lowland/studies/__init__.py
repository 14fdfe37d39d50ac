"""Studies of trained networks: what serves them all, and a folder for each."""

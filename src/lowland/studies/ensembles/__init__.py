"""Ensembles of fully connected networks: how they are trained, and how sharp they end."""

"""Are flat minima an illusion? (arXiv:2605.05209), from scratch; asks of ``hsr``'s networks too."""

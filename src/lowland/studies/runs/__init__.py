"""Long runs: what they are told, who computes them, and where results are kept."""

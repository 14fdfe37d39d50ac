"""How little a network commits itself to: what its last layer still leaves open."""

from lowland.weakness.pairs import Certificate, PairProxy, Witness, pair_proxy

__all__ = ["Certificate", "PairProxy", "Witness", "pair_proxy"]

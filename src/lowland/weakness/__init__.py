"""How little a network commits itself to: what its last layer still leaves open."""

from lowland.weakness.agreement import ensemble_agreement
from lowland.weakness.joint import JointWeakness, joint_weakness
from lowland.weakness.pairs import Certificate, PairProxy, Witness, pair_proxy
from lowland.weakness.patterns import (
    activation_patterns,
    count_patterns,
    free_parameters,
    free_regions,
)
from lowland.weakness.simplicity import weight_norm

__all__ = [
    "Certificate",
    "JointWeakness",
    "PairProxy",
    "Witness",
    "activation_patterns",
    "count_patterns",
    "ensemble_agreement",
    "free_parameters",
    "free_regions",
    "joint_weakness",
    "pair_proxy",
    "weight_norm",
]

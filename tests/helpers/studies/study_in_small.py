"""Settings for a study of seconds, which leave every stage something to do."""

from dataclasses import replace

from lowland.studies.hsr import theory
from lowland.studies.hsr.preset import load_preset

PRESET = replace(
    load_preset("quick"),
    seeds=24,
    train_size=40,
    test_size=100,
    steps=120,
    tolerance=0.3,
    checkpoints=4,
    share=0.4,
    chunk=12,
    draws=8,
    sweep_train_sizes=(9, 20),
    sweep_datasets=(6, 4),
    sweep_hidden=(2, 3),
    sweep_seeds=5,
    sweep_hsr_weights=(0.1, 2.0),
    sweep_sam_radii=(0.3,),
)


def shorten(patch):
    """Theory in a fraction of a second."""
    patch.setattr(theory, "TIMED_SAMPLES", (10, 20, 40, 80))
    patch.setattr(theory, "MOST_NUMERICAL", 40)
    patch.setattr(theory, "TIMED_HIDDEN", (1, 2, 4))
    patch.setattr(theory, "REPEATS", 1)
    patch.setattr(theory, "DESCENT_STEPS", 50)

"""The losses' helpers against every ordering, written out."""

from itertools import permutations

import torch

from lightning_plugins.capsnet.losses import align_labels


def test_right_classes_take_their_places_and_wrong_ones_the_rest():
    """All ordered choices of three of five classes as predictions, for all as labels."""
    choices = list(permutations(range(5), 3))
    pairs = [(predicted, true) for predicted in choices for true in choices]
    predictions, labels = (torch.tensor(side) for side in zip(*pairs, strict=True))
    for aligned, (predicted, true) in zip(align_labels(predictions, labels).tolist(), pairs, strict=True):
        wrong = iter(c for c in predicted if c not in true)  # in the order in which they were predicted
        assert aligned == [c if c in predicted else next(wrong) for c in true]

"""CapsNet: routing between capsules is soft k-means clustering of votes.

Read in this order: ``routing.py`` (the paper on a page: squash, votes, couplings, the loop), ``losses.py`` (its margin
loss), ``layers.py`` (the same as modules with their start), ``module.py`` (the network and how it trains).
``streamed_routing.py`` holds the operator that routes without storing votes; results are the same.
"""

from lightning_plugins.capsnet.layers import (
    CapsuleDecoder,
    PrimaryCapsules,
    RoutingCapsules,
    SelfAttentionRouting,
    exponential_squash,
)
from lightning_plugins.capsnet.losses import margin_loss, multi_hot
from lightning_plugins.capsnet.module import CapsNet
from lightning_plugins.capsnet.networks import PRESETS, Preset
from lightning_plugins.capsnet.routing import compute_votes, route_votes, squash
from lightning_plugins.capsnet.streamed_routing import route
from lightning_plugins.capsnet.trace import RoutingTrace, kmeans_objective, routing_trace

__all__ = [
    "PRESETS",
    "CapsNet",
    "CapsuleDecoder",
    "Preset",
    "PrimaryCapsules",
    "RoutingCapsules",
    "RoutingTrace",
    "SelfAttentionRouting",
    "compute_votes",
    "exponential_squash",
    "kmeans_objective",
    "margin_loss",
    "multi_hot",
    "route",
    "route_votes",
    "routing_trace",
    "squash",
]

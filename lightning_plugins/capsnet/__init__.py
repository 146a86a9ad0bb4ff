"""CapsNet: routing between capsules is soft k-means clustering of votes."""

from lightning_plugins.capsnet.layers import (
    CapsuleDecoder,
    PrimaryCapsules,
    RoutingCapsules,
    SelfAttentionRouting,
    exponential_squash,
    margin_loss,
    multi_hot,
)
from lightning_plugins.capsnet.module import CapsNet
from lightning_plugins.capsnet.networks import PRESETS, Preset
from lightning_plugins.capsnet.routing import (
    RoutingTrace,
    compute_votes,
    kmeans_objective,
    route,
    route_votes,
    routing_trace,
    squash,
)

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

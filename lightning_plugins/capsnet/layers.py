"""Capsule layers as plain modules, usable in any torch network.

Shapes: B images, C channels, H and W image size, T capsule types, N input capsules of D dimensions,
J output capsules (classes) of K dimensions.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plugins.capsnet.routing import GradientKind, RoutingKind, check_options, squash, without_autocast
from lightning_plugins.capsnet.streamed_routing import route
from lightning_plugins.capsnet.trace import RoutingTrace, kmeans_objective, routing_trace
from lightning_plugins.core import arguments as must


class PrimaryCapsules(nn.Module):
    r"""A convolution whose output channels are grouped into capsules, squashed.

    A capsule's dimensions come from *one* place of the feature map: capsule ``(t, y, x)`` holds channels
    ``t * dim`` to ``t * dim + dim - 1`` at ``(y, x)``, and has index ``(t * H' + y) * W' + x`` in the output.

    Args:
        in_channels: number of channels of the feature map.
        num_types: number of capsule types T; 32 in Sabour et al. 2017.
        dim: dimensions D of a capsule; 8 in Sabour et al. 2017.
        kernel_size: side in pixels of the convolution's kernel; 9 in Sabour et al. 2017.
        stride: pixels from one place of the convolution to the next; 2 in Sabour et al. 2017.
        padding: pixels of zeros around the feature map; none in Sabour et al. 2017.
        squash_scale: constant c, above 0, in the squash's factor n^2 / (c + n^2) for length n; 1 in Sabour et al. 2017.
        divide_by_types: whether the convolution is divided by T before bias and squash, as the authors' released code
            does (there the primary layer is a routing over T outputs with uniform couplings).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> primary = PrimaryCapsules(256, num_types=32, dim=8)
        >>> primary(torch.zeros(2, 256, 20, 20)).shape  # 32 types on a 6 x 6 grid
        torch.Size([2, 1152, 8])
    """

    def __init__(
        self,
        in_channels: int,
        num_types: int = 32,
        dim: int = 8,
        kernel_size: int = 9,
        stride: int = 2,
        padding: int = 0,
        squash_scale: float = 1.0,
        divide_by_types: bool = False,
    ) -> None:
        super().__init__()
        sizes = dict.fromkeys(("in_channels", "num_types", "dim", "kernel_size", "stride"), must.count)
        must.check(locals(), **sizes, padding=must.whole(0), squash_scale=must.positive, divide_by_types=must.flag)
        self.num_types, self.dim = num_types, dim
        self.squash_scale = squash_scale
        self.divisor = num_types if divide_by_types else 1
        self.conv = nn.Conv2d(in_channels, num_types * dim, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """Turn a feature map ``(B, C, H, W)`` into capsules ``(B, T * H' * W', D)`` of length below one."""
        if self.divisor == 1:
            x = self.conv(x)
        else:  # the bias is added after the division
            x = F.conv2d(x, self.conv.weight / self.divisor, self.conv.bias, self.conv.stride, self.conv.padding)
        return squash(group_channels(x, self.num_types), self.squash_scale)


def group_channels(x: Tensor, num_types: int) -> Tensor:
    """Read a feature map as capsules, each from one place of it.

    Args:
        x: ``(B, T * D, H, W)`` feature map.
        num_types: number of capsule types T.

    Returns:
        ``(B, T * H * W, D)`` capsules, by type, row and column.

    Raises:
        ValueError: the channels cannot be shared equally.

    Example:
        >>> x = torch.arange(8.0).view(1, 4, 1, 2)  # 2 types of 2 dimensions on a 1 x 2 grid
        >>> group_channels(x, num_types=2)
        tensor([[[0., 2.],
                 [1., 3.],
                 [4., 6.],
                 [5., 7.]]])
    """
    B, C, H, W = x.shape
    if C % num_types:
        raise ValueError(f"group_channels cannot split {C} channels into num_types={num_types} equal capsules.")
    return x.reshape(B, num_types, C // num_types, H, W).permute(0, 1, 3, 4, 2).flatten(1, 3)


class RoutingCapsules(nn.Module):
    r"""Output capsules by routing: soft clustering of the votes :math:`\hat u_{j|i} = W_{ij} u_i`.

    The votes are streamed, never tiled and never stored at full size. See
    :func:`~lightning_plugins.capsnet.streamed_routing.route` for the kinds of routing and their formulas.

    Args:
        in_dim: dimensions D of an input capsule.
        num_capsules: number of output capsules J, one for each class.
        dim: dimensions K of an output capsule; 16 in Sabour et al. 2017.
        num_inputs: number N of input capsules for a transform W[i, j] of each pair (Sabour et al. 2017), or None for
            transforms W[j] shared by any number of inputs (kexue.fm/archives/4819, 5112).
        routing: kind of routing, "dynamic" (Sabour et al. 2017), "kmeans" (kexue.fm/archives/5112), "kmeans_squash"
            (kexue.fm/archives/4819) or "uniform".
        iterations: how often couplings are computed, the uniform first time included; 3 in Sabour et al. 2017.
        gradient: whether gradients pass through all iterations ("full", as in the papers' code) or the last sum alone,
            with its couplings held constant ("last").
        squash_scale: constant c, above 0, in the squash's factor n^2 / (c + n^2) for length n; 1 in Sabour et al. 2017.
        bias: whether a learned bias is added to each output before the squash, as the authors' released code does.
        leaky: whether an input may vote for none of the outputs (orphan category; CIFAR-10 in Sabour et al. 2017).

    ``W`` starts normal with standard deviation :math:`J / \sqrt{N K}`, which gives the uniform sum of unit capsules
    about unit length, so that the first poses are neither dead nor saturated; shared transforms start with Glorot's
    :math:`\sqrt{2 / (D + J K)}`, as in the code of kexue.fm/archives/5112, since N is not known.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> capsules = RoutingCapsules(in_dim=8, num_capsules=10, dim=16, routing="kmeans")
        >>> capsules(torch.randn(2, 50, 8)).shape
        torch.Size([2, 10, 16])
    """

    routing: RoutingKind
    gradient: GradientKind

    def __init__(
        self,
        in_dim: int,
        num_capsules: int,
        dim: int = 16,
        num_inputs: int | None = None,
        routing: RoutingKind = "dynamic",
        iterations: int = 3,
        gradient: GradientKind = "full",
        squash_scale: float = 1.0,
        bias: bool = False,
        leaky: bool = False,
    ) -> None:
        super().__init__()
        check_options(routing, iterations, gradient, squash_scale, leaky)
        sizes = dict.fromkeys(("in_dim", "num_capsules", "dim"), must.count)
        must.check(locals(), **sizes, num_inputs=must.optional(must.count), bias=must.flag)
        self.num_inputs = num_inputs
        self.routing, self.iterations, self.gradient = routing, iterations, gradient
        self.squash_scale, self.leaky = squash_scale, leaky
        shape = (in_dim, num_capsules, dim) if num_inputs is None else (num_inputs, in_dim, num_capsules, dim)
        glorot = math.sqrt(2 / (in_dim + num_capsules * dim))
        std = glorot if num_inputs is None else num_capsules / math.sqrt(num_inputs * dim)
        self.weight = nn.Parameter(torch.randn(shape) * std)
        self.bias = nn.Parameter(torch.zeros(num_capsules, dim)) if bias else None

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """Route input capsules.

        Args:
            u: ``(B, N, D)`` input capsules.
            mask: ``(B, N)`` bool, True where an input capsule is present; all are by default.

        Returns:
            ``(B, J, K)`` poses.
        """
        return route(
            u,
            self.weight,
            self.routing,
            self.iterations,
            gradient=self.gradient,
            squash_scale=self.squash_scale,
            leaky=self.leaky,
            bias=self.bias,
            mask=mask,
        )

    def trace(self, u: Tensor, mask: Tensor | None = None) -> RoutingTrace:
        """Every iteration's couplings ``(R, B, N, J)``, poses, objective and entropy; stores the votes."""
        return routing_trace(
            u,
            self.weight,
            self.routing,
            self.iterations,
            squash_scale=self.squash_scale,
            leaky=self.leaky,
            bias=self.bias,
            mask=mask,
        )

    def extra_repr(self) -> str:
        """Name the shapes and the routing in ``print(module)``."""
        *inputs, D, J, K = self.weight.shape
        return f"{inputs[0] if inputs else 'any'} x {D} -> {J} x {K}, {self.routing}, iterations={self.iterations}"


class SelfAttentionRouting(nn.Module):
    r"""Output capsules by one pass of self-attention between the votes (Efficient-CapsNet).

    .. math:: s_j = \sum_i \hat u_{ij} (c_{ij} + \beta_{ij}), \quad
              c_{ij} = \mathrm{softmax}_j\Big(\tfrac{1}{\sqrt K} \sum_k \langle \hat u_{ij}, \hat u_{kj} \rangle\Big)

    Args:
        in_dim: dimensions D of an input capsule; 8 in the paper.
        num_capsules: number of output capsules J, one for each class.
        dim: dimensions K of an output capsule; 16 in the paper.
        num_inputs: number N of input capsules; 16 in the paper.

    ``W`` starts as the authors' code has it, by Keras' He normal for a kernel (J, N, D, K): its variance is
    :math:`2 / (J N D)`, so that poses are short at first, about 0.02 on images.

    Raises:
        ValueError: an argument is out of range.

    Source: Mazzia, Salvetti, Chiaberge 2021, doi:10.1038/s41598-021-93977-0, eqs. 4 to 7.
    """

    def __init__(self, in_dim: int, num_capsules: int, dim: int = 16, num_inputs: int = 16) -> None:
        super().__init__()
        must.check(locals(), **dict.fromkeys(("in_dim", "num_capsules", "dim", "num_inputs"), must.count))
        self.weight = nn.Parameter(torch.empty(num_inputs, in_dim, num_capsules, dim))
        keras_normal_(self.weight, 2 / (num_inputs * num_capsules * in_dim))
        self.prior = nn.Parameter(torch.zeros(num_inputs, num_capsules))

    def _couple(self, u: Tensor) -> tuple[Tensor, Tensor]:
        votes = torch.einsum("bnd,ndjk->bnjk", u, self.weight)
        agreement = torch.einsum("bnjk,bjk->bnj", votes, votes.sum(1)) / math.sqrt(votes.shape[-1])
        return votes, agreement.softmax(dim=2)

    def forward(self, u: Tensor) -> Tensor:
        """Route capsules ``(B, N, D)`` to poses ``(B, J, K)``."""
        with without_autocast(u):
            votes, couplings = self._couple(u.to(self.weight.dtype))
            return exponential_squash(torch.einsum("bnjk,bnj->bjk", votes, couplings + self.prior))

    @torch.no_grad()
    def trace(self, u: Tensor) -> RoutingTrace:
        """The couplings of the single pass, with poses, objective and entropy, as one iteration."""
        poses = self(u)
        with without_autocast(u):
            votes, couplings = self._couple(u.to(self.weight.dtype))
            entropy = torch.special.entr(couplings).sum(-1).mean(-1) / math.log(poses.shape[1])
        return RoutingTrace(couplings[None], poses[None], kmeans_objective(votes, poses)[None], entropy[None])


def keras_normal_(weight: Tensor, variance: float) -> None:
    """Fill with Keras' normal numbers: cut at two deviations, and widened so that the variance is as asked.

    Args:
        weight: any shape; filled in place.
        variance: of what is drawn.
    """
    std = math.sqrt(variance) / _CUT_DEVIATION
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


# of a standard normal variable cut at two: var = 1 - 4 pdf(2) / (cdf(2) - cdf(-2))
_CUT_DEVIATION = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def exponential_squash(s: Tensor) -> Tensor:
    r"""Efficient-CapsNet's squash, steeper near zero: :math:`(1 - e^{-\|s\|}) \, s / \|s\|`.

    The zero vector stays zero with a finite gradient.

    Args:
        s: ``(..., D)`` capsule inputs; half precision is widened for the norm.

    Returns:
        ``(..., D)`` vectors with length in [0, 1), in the type of ``s``.

    Raises:
        ValueError: ``s`` is no floating tensor ``(..., D)``.
    """
    must.tensor("(..., D)")("s", s)
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    zero = (wide == 0).all(-1, keepdim=True)
    norm = torch.linalg.vector_norm(wide.masked_fill(zero, 1), dim=-1, keepdim=True)  # no derivative is NaN at ones
    return (wide * (-torch.expm1(-norm) / norm).masked_fill(zero, 1)).to(s.dtype)


class CapsuleDecoder(nn.Module):
    """Rebuild an image from the pose of one chosen capsule; all others are masked to zero.

    Args:
        num_capsules: number of capsules J, one for each class.
        dim: dimensions K of a capsule; 16 in Sabour et al. 2017.
        image_shape: shape (C, H, W) of the image to rebuild.
        hidden: widths of the hidden layers with ReLU; 512 and 1024 in Sabour et al. 2017, figure 2.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> decoder = CapsuleDecoder(10, 16, (1, 28, 28))
        >>> decoder(torch.randn(2, 10, 16), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 28, 28])
        >>> decoder(torch.randn(2, 10, 16), torch.tensor([[3, 7], [1, 2]])).shape  # one image per label
        torch.Size([2, 2, 1, 28, 28])
    """

    def __init__(
        self, num_capsules: int, dim: int, image_shape: Sequence[int], hidden: Sequence[int] = (512, 1024)
    ) -> None:
        super().__init__()
        widths = must.each(must.count, of="the layers' widths", empty=True)
        must.check(locals(), num_capsules=must.count, dim=must.count, image_shape=must.image_shape, hidden=widths)
        self.num_capsules, self.image_shape = num_capsules, tuple(image_shape)
        widths = [num_capsules * dim, *hidden]
        hidden_layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*hidden_layers, nn.Linear(widths[-1], math.prod(image_shape)))

    def forward(self, poses: Tensor, labels: Tensor) -> Tensor:
        """Rebuild an image for each label.

        Args:
            poses: ``(B, J, K)`` poses of all classes.
            labels: ``(B,)`` or ``(B, L)`` classes whose capsules are decoded.

        Returns:
            ``(B, C, H, W)`` or ``(B, L, C, H, W)`` in [0, 1].
        """
        chosen = F.one_hot(labels, self.num_capsules).to(poses.dtype).unsqueeze(-1)  # (B, [L,] J, 1)
        if labels.ndim == 2:
            poses = poses.unsqueeze(1)
        return self.layers((poses * chosen).flatten(-2)).unflatten(-1, self.image_shape).sigmoid()

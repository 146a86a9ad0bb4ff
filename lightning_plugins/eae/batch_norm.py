"""Batch norm of the codes: statistics of all processes' rows on any backend, no scale, no shift."""

import torch
from torch import Tensor, nn

from lightning_plugins.core import arguments as must
from lightning_plugins.core.distributed import gather_rows


class LatentBatchNorm(nn.Module):
    r"""Give every dimension of the codes mean 0 and variance 1 in the batch of all processes.

    .. math:: z = \frac{h - \mathrm{mean}(h)}{\sqrt{\mathrm{var}(h) + \epsilon}}

    Training takes mean and (biased) variance of all processes' rows, gathered *before* they are normalised and with
    gradient, so that several processes train as one with the joined batch would. Evaluation takes the running
    statistics and communicates nothing: a row's code does not depend on the rows beside it. On one process this is
    ``nn.BatchNorm1d(dim, eps, momentum, affine=False)``. It works on gloo and is none of torch's batch norms, so that
    ``sync_batchnorm=True`` leaves it alone. Half precision is widened to float32, also the output; float64 stays.

    Args:
        dim: dimensions d of a code.
        momentum: weight in (0, 1] of the newest batch in the running statistics; 0.1 is torch's default.
        eps: added to the variance; 1e-5 is torch's default.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Ghose, Rashwan, Poupart, "Batch norm with entropic regularization turns deterministic autoencoders into
        generative models" (UAI 2020).

    Example:
        >>> norm = LatentBatchNorm(2)
        >>> norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).round(decimals=3)
        tensor([[-1., -1.],
                [ 1.,  1.]])
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        must.check(
            locals(),
            dim=must.count,
            momentum=must.number(above=0, most=1, why="0.1 is usual"),
            eps=must.number(above=0, why="1e-5 is usual"),
        )
        self.dim, self.momentum, self.eps = dim, momentum, eps
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, h: Tensor) -> Tensor:
        """This process's rows ``(n, d)``, normalised."""
        z, own = self.all_rows(h)
        return z[own]

    def all_rows(self, h: Tensor) -> tuple[Tensor, slice]:
        """In training the normalised rows of all processes; a loss of them is to be computed by every process.

        Args:
            h: ``(n, d)``, the encoder's output; processes may differ in n.

        Returns:
            ``(N, d)`` with N the sum of all n, and where this process's rows stand in it. At evaluation this
            process's n rows alone.

        Raises:
            ValueError: h has another shape, or training has fewer than two rows in all.
        """
        must.tensor()("h", h)
        if h.dim() != 2 or h.shape[1] != self.dim:
            raise ValueError(f"h must have shape (rows, {self.dim}), got {tuple(h.shape)}.")
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        if self.training:
            h, own = gather_rows(h)
            if len(h) < 2:
                raise ValueError(f"h has {len(h)} row, and a variance needs two or more: enlarge the batch.")
            var, mean = torch.var_mean(h, dim=0, correction=0)
            unbiased = var.detach() * len(h) / (len(h) - 1)
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        else:
            own, mean, var = slice(0, len(h)), self.running_mean, self.running_var
        return ((h - mean) / (var + self.eps).sqrt()).to(h.dtype), own

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.dim}, momentum={self.momentum}, eps={self.eps}"

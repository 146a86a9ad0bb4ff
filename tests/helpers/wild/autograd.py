"""Graphs that hide something: checkpoints, functions of one's own, steps, complex and sparse and quantised weights."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from wild.zoo import Wild

ROWS, WIDTH, OUT = 4, 6, 3
DYNAMO = ("The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",)  # to itself, as it compiles


class Curve(Wild):
    """Squared error of a head on ``bent`` features of a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, OUT)

    @classmethod
    def batch(cls):
        return torch.randn(ROWS, WIDTH), torch.randn(ROWS, OUT)

    def bent(self, x):
        """What comes after the linear layer."""
        return torch.tanh(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.last(self.bent(self.first(batch[0]))), batch[1])


class Reentrant(Curve, family="autograd", title="reentrant checkpoint"):
    """torch.utils.checkpoint's old form: autograd.grad raises, or passes it by."""

    twice = "checkpoint"

    def training_step(self, batch, batch_idx):
        hidden = checkpoint(self.first, batch[0].requires_grad_(), use_reentrant=True)
        return F.mse_loss(self.last(torch.tanh(hidden)), batch[1])


class Checkpoint(Curve, family="autograd", title="checkpoint"):
    """Activations computed once more in the backward pass, with the dropout they had."""

    def training_step(self, batch, batch_idx):
        hidden = checkpoint(lambda x: F.dropout(torch.tanh(self.first(x)), 0.2), batch[0], use_reentrant=False)
        return F.mse_loss(self.last(hidden), batch[1])


class FrozenCheckpoint(Curve, family="autograd", title="checkpoint of a frozen part"):
    """A frozen layer is computed again by reentering autograd; what comes before it is trained."""

    twice = "checkpoint"

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(8, 8).requires_grad_(False)

    def bent(self, x):
        return torch.tanh(checkpoint(self.middle, x, use_reentrant=True))


class Bend(torch.autograd.Function):
    """``sin`` with a backward that can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class OwnFunction(Curve, family="autograd", title="own Function"):
    """A backward of one's own that builds a graph."""

    doubted = "Bend"

    def bent(self, x):
        return Bend.apply(x)


class BendOnce(Bend):
    """``sin`` with a backward that says that it cannot be differentiated."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Bend.backward))


class OnceDifferentiable(Curve, family="autograd", title="Function marked once_differentiable"):
    """A backward of one's own that torch knows not to differentiate."""

    twice = "once_differentiable"

    def bent(self, x):
        return BendOnce.apply(x)


class BendDetached(Bend):
    """``sin`` with a backward that leaves the graph without saying so, as most that call NumPy or CUDA do."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(grad.detach().double().numpy() * x.detach().double().cos().numpy()).to(grad)


class DetachedFunction(Curve, family="autograd", title="Function that detaches"):
    """A backward of one's own that builds no graph, and does not say so."""

    twice, doubted = "detach|Function", "BendDetached"

    def bent(self, x):
        return BendDetached.apply(x)


class Where(Curve, family="autograd", title="ReLU by torch.where"):
    """A kink that no name in the graph tells."""

    seen = "kinks"

    def bent(self, x):
        return torch.where(x > 0, x, 0.0)


class Rounding(Curve, family="autograd", title="rounding, straight through"):
    """Weights and activations are rounded in the forward pass, the gradient passes by."""

    seen = "kinks"

    def bent(self, x):
        x = torch.tanh(x)
        return x + ((8 * x).round() / 8 - x).detach()


class Complex(Wild, family="autograd", title="complex weights"):
    """A Fourier layer with complex weights."""

    unlogged = True
    warned = dict.fromkeys(("diagnostics",), ("nothing is logged: a parameter has a sparse or complex gradient",))

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.complex(torch.randn(WIDTH // 2 + 1, 4), torch.randn(WIDTH // 2 + 1, 4)))
        self.last = nn.Linear(4, OUT)

    @classmethod
    def batch(cls):
        return torch.randn(ROWS, WIDTH), torch.randn(ROWS, OUT)

    def training_step(self, batch, batch_idx):
        spectrum = torch.fft.rfft(batch[0]) @ self.weight / WIDTH
        return F.mse_loss(self.last(torch.tanh(spectrum.abs())), batch[1])


class Sparse(Wild, family="autograd", title="sparse embedding"):
    """Gradients without the rows that a batch does not use."""

    refused = dict.fromkeys(("difference", "exact", "auto", "all"), "an embedding has sparse gradients: give sparse=F")
    refused |= dict.fromkeys(
        (f"{name}, clipping" for name in ("none", "diagnostics", "flooding")), "linalg_vector_norm"
    )
    unlogged = True
    warned = dict.fromkeys(("diagnostics",), ("nothing is logged: a parameter has a sparse or complex gradient",))

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(9, OUT, sparse=True)

    @classmethod
    def batch(cls):
        return torch.randint(9, (ROWS,)), torch.randn(ROWS, OUT)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(torch.tanh(self.rows(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Quantised(Curve, family="autograd", title="quantised frozen weights"):
    """Eight-bit integers with a scale, beside trained low-rank ones."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (8, 8), dtype=torch.int8))
        self.scale = nn.Parameter(torch.full((8, 1), 0.01), requires_grad=False)
        self.frozen = nn.Parameter(torch.randint(-127, 128, (8,), dtype=torch.int8), requires_grad=False)

    def bent(self, x):
        return torch.tanh(x @ (self.codes * self.scale).T + 0.01 * self.frozen * self.scale[0])


class Spectral(Curve, family="autograd", title="spectral norm"):
    """Power iterations move buffers in every forward pass."""

    seen = "the power iteration"

    def __init__(self):
        super().__init__()
        self.first = spectral_norm(self.first)


class WeightNorm(Curve, family="autograd", title="weight norm"):
    """Weights that are computed from others, by a kernel of torch whose second derivative is wrong."""

    twice = "weight_norm"

    def __init__(self):
        super().__init__()
        self.first, self.last = weight_norm(self.first), weight_norm(self.last)


class ZeroHead(Curve, family="autograd", title="head that begins at zero"):
    """All trained weights are zero at first, and tiny after."""

    lr = 1e-2

    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)


class Compiled(Curve, family="autograd", title="compiled part"):
    """A region that autograd differentiates once."""

    twice, slow, unheard = "compile", True, DYNAMO

    def __init__(self):
        super().__init__()
        self.middle = torch.compile(nn.Linear(8, 8), backend="aot_eager")

    def bent(self, x):
        return torch.tanh(self.middle(x))


class CompiledFunction(Curve, family="autograd", title="compiled function"):
    """A compiled function that is no part of the module."""

    twice, slow, unheard = "compile", True, DYNAMO

    def bent(self, x):
        return _compiled(x)


@torch.compile(backend="aot_eager")
def _compiled(x):
    return torch.tanh(x) * x


class DoubleBackward(Curve, family="autograd", title="gradient in the loss"):
    """The loss has a gradient in it already, with respect to the inputs."""

    def training_step(self, batch, batch_idx):
        x = batch[0].detach().requires_grad_()
        answer = self.last(self.bent(self.first(x)))
        (slope,) = torch.autograd.grad(answer.sum(), x, create_graph=True)
        return F.mse_loss(answer, batch[1]) + 0.1 * slope.square().sum(-1).mean()


class OwnBackward(Curve, family="autograd", title="backward of the loss's logarithm"):
    """Overrides LightningModule.backward: what is trained is another function than what training_step returns."""

    twice = "backward"

    def backward(self, loss):
        (3 * loss / loss.detach()).backward()


class HandWritten(Curve, family="autograd", title="gradients written by hand"):
    """Overrides LightningModule.backward: asks autograd for gradients and writes them, detached, into .grad."""

    def backward(self, loss):
        params = list(self.parameters())
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.grad = grad if param.grad is None else param.grad + grad

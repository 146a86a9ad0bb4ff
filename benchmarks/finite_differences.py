"""How near finite differences come to the penalty's gradient on real architectures, by difference and displacement.

    python benchmarks/finite_differences.py --json finite_differences.json

``H g`` by finite differences against differentiating twice (in fp32, and in float64 where that is the precision):
cosine and relative error, medians over four batches, before any training and after 300 steps of Adam. A displacement
is given relative to the norm of the parameters (``.01 |theta|``), as a length (``.05``), or as the smaller of both.
float64 shows what rounding has no part in; bf16 and fp16 are autocast. Networks of transformers have small
configurations and random weights, with attention written out; images are the digits that ship with the package, texts
are drawn from a random Markov chain of 64 words.
"""

import argparse
import functools
import json
import logging
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plugins import CapsNet, Digits
from lightning_plugins.core.vectors import dot, norm
from lightning_plugins.replay.differences import best_displacement
from lightning_plugins.replay.window import displaced

RELATIVE = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
LENGTHS = (0.003, 0.01, 0.03, 0.05, 0.1)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BATCHES = 4
WORDS, LENGTH = 64, 24

Batch = tuple[Tensor, Tensor]


class Vision(nn.Module):
    """A classifier of transformers, on grey images enlarged to 32 x 32."""

    def __init__(self, network: nn.Module, channels: int = 3) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, batch: Batch) -> Tensor:
        """The cross-entropy."""
        images = F.interpolate(batch[0], size=(32, 32), mode="bilinear").expand(-1, self.channels, -1, -1)
        return F.cross_entropy(self.network(images).logits, batch[1])


class Plain(nn.Module):
    """A network from 8 x 8 images to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """The cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])


class Words(nn.Module):
    """A language model of transformers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """Its own loss: the next word, or for T5 the second half of a row from the first."""
        words = batch[0]
        if self.network.config.is_encoder_decoder:
            return self.network(input_ids=words[:, : LENGTH // 2], labels=words[:, LENGTH // 2 :].contiguous()).loss
        return self.network(input_ids=words, labels=words).loss


class Capsules(nn.Module):
    """CapsNet with its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = CapsNet(image_shape=(1, 20, 20), channels=16, num_types=2)

    def forward(self, batch: Batch) -> Tensor:
        """Margin loss and reconstruction."""
        larger = F.interpolate(batch[0], size=(20, 20), mode="bilinear")
        return torch.stack(list(self.network.loss({"image": larger, "label": batch[1]}).values())).sum()


class Quantised(nn.Module):
    """An autoencoder whose codes are replaced by the nearest of 32 vectors, straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))
        self.decoder = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.book = nn.Parameter(torch.randn(32, 8) * 0.5)

    def forward(self, batch: Batch) -> Tensor:
        """Reconstruction, codebook and commitment (van den Oord et al. 2017)."""
        codes = self.encoder(batch[0]).unflatten(1, (4, 8))
        nearest = self.book[torch.cdist(codes.detach(), self.book.detach()).argmin(-1)]
        through = codes + (nearest - codes).detach()
        rebuilt = self.decoder(through.flatten(1))
        commitment = (nearest - codes.detach()).square().mean() + 0.25 * (nearest.detach() - codes).square().mean()
        return F.mse_loss(rebuilt, batch[0].flatten(1)) + commitment


def mlp(activation: type[nn.Module]) -> nn.Module:
    """The network of the recipe label_noise, 64-64-10 units."""
    return Plain(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), activation(), nn.Linear(64, 10)))


def resnet() -> nn.Module:
    """Basic blocks with batch norm, ReLU and a max-pooling."""
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic", num_labels=10
    )
    return Vision(transformers.ResNetForImageClassification(config))


def mobilenet() -> nn.Module:
    """Inverted residuals with ReLU6 and batch norm."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, num_labels=10, classifier_dropout_prob=0.0)
    return Vision(transformers.MobileNetV2ForImageClassification(config))


def convnext() -> nn.Module:
    """Depthwise convolutions, layer norm and GELU."""
    config = transformers.ConvNextConfig(
        patch_size=4, hidden_sizes=[16, 32, 64], depths=[1, 1, 2], num_stages=3, num_labels=10
    )
    return Vision(transformers.ConvNextForImageClassification(config))


def vit() -> nn.Module:
    """Attention over 64 patches, GELU."""
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=4,
        num_labels=10,
        attn_implementation="eager",
    )
    return Vision(transformers.ViTForImageClassification(config))


def t5(feed_forward: str) -> nn.Module:
    """Encoder and decoder of two layers each, as published with ReLU or later with a gated GELU."""
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
        attn_implementation="eager",
    )
    return Words(transformers.T5ForConditionalGeneration(config))


def gpt2() -> nn.Module:
    """Four layers, GELU."""
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    return Words(transformers.GPT2LMHeadModel(config))


def opt() -> nn.Module:
    """Four layers, ReLU."""
    config = transformers.OPTConfig(
        vocab_size=WORDS,
        hidden_size=64,
        word_embed_proj_dim=64,
        num_hidden_layers=4,
        ffn_dim=128,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        dropout=0.0,
        attn_implementation="eager",
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Words(transformers.OPTForCausalLM(config))


def llama() -> nn.Module:
    """Four layers, gated SiLU."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    return Words(transformers.LlamaForCausalLM(config))


class Subject(NamedTuple):
    """An architecture: how it is made, whether it has kinks or jumps, and whether it reads texts."""

    make: Callable[[], nn.Module]
    kinked: bool
    texts: bool = False


SUBJECTS = {
    "MLP, ReLU": Subject(lambda: mlp(nn.ReLU), True),
    "ResNet": Subject(resnet, True),
    "MobileNetV2": Subject(mobilenet, True),
    "CapsNet": Subject(Capsules, True),
    "T5, ReLU": Subject(lambda: t5("relu"), True, texts=True),
    "OPT, ReLU": Subject(opt, True, texts=True),
    "VQ autoencoder": Subject(Quantised, True),
    "MLP, GELU": Subject(lambda: mlp(nn.GELU), False),
    "ConvNeXt": Subject(convnext, False),
    "ViT": Subject(vit, False),
    "T5, gated GELU": Subject(lambda: t5("gated-gelu"), False, texts=True),
    "GPT-2": Subject(gpt2, False, texts=True),
    "Llama": Subject(llama, False, texts=True),
}


class Rule(NamedTuple):
    """A displacement: the smaller of ``relative * |theta|`` and ``length``."""

    difference: str
    relative: float = math.inf
    length: float = math.inf

    @property
    def name(self) -> str:
        """As in the tables."""
        parts = [f"{self.relative:g} θ"] if self.relative < math.inf else []
        parts += [f"{self.length:g}"] if self.length < math.inf else []
        return f"{self.difference} {' or '.join(parts)}"


def default(precision: str, kinked: bool) -> Rule:
    """What ``GradientPenalty`` takes."""
    dtypes: dict[str, torch.dtype] = {"float64": torch.float64}
    module = nn.Linear(1, 1, dtype=dtypes.get(precision, torch.float32))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    best = best_displacement(trainer, module, kinked=kinked, half=HALVES.get(precision))
    return Rule(best.difference, best.relative, best.longest)


@functools.cache
def rules(precision: str) -> list[Rule]:
    """All that are compared."""
    sizes = [{"relative": r} for r in RELATIVE] + [{"length": length} for length in LENGTHS]
    compared = [Rule(difference, **size) for difference in ("forward", "central") for size in sizes]
    taken = [rule(precision, kinked) for rule in (default, before) for kinked in (True, False)]
    return list(dict.fromkeys([*compared, *taken]))


def before(precision: str, kinked: bool) -> Rule:
    """What ``GradientPenalty`` took before this was measured."""
    relative = {"float64": 1e-7, "fp32": 1e-4, "fp16": 1e-2, "bf16": 3e-2}[precision]
    return Rule("forward", max(relative, 3e-2 if kinked else 0.0))


class Errors(NamedTuple):
    """Of a product: cosine with the exact one, and relative error."""

    cosine: float
    relative: float


def errors(module: nn.Module, batch: Batch, precision: str) -> dict[str, Errors]:
    """Of every rule on one batch."""
    params = [param for param in module.parameters() if param.requires_grad]
    half = HALVES.get(precision)

    def gradient(create_graph: bool = False, narrow: bool = True) -> list[Tensor]:
        with torch.autocast("cpu", half, enabled=half is not None and narrow):
            loss = module(batch)
        grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]

    first = gradient(create_graph=True, narrow=False)
    pairs = [(f, f.detach()) for f in first if f.requires_grad]
    exact = torch.autograd.grad([f for f, _ in pairs], params, [g for _, g in pairs], allow_unused=True)
    exact = [torch.zeros_like(p) if e is None else e for e, p in zip(exact, params, strict=True)]
    here = gradient()
    theta, length = norm(params).item(), norm(here).item()
    sides: dict[float, list[Tensor]] = {0.0: here}
    found = {}
    for rule in rules(precision):
        h = min(rule.relative * theta, rule.length) / length
        back = -h if rule.difference == "central" else 0.0
        for side in (h, back):
            if side not in sides:
                with displaced(params, here) as move:
                    move(side)
                    sides[side] = gradient()
        product = [(a - b) / (h - back) for a, b in zip(sides[h], sides[back], strict=True)]
        cosine = dot(product, exact) / (norm(product) * norm(exact)).clamp(min=1e-300)
        wrong = norm([p - e for p, e in zip(product, exact, strict=True)]) / norm(exact)
        found[rule.name] = Errors(cosine.item(), wrong.item())
    return found


def medians(module: nn.Module, batches: Sequence[Batch], precision: str) -> dict[str, Errors]:
    """Over batches."""
    kind = torch.float64 if precision == "float64" else torch.float32
    module.to(kind)
    found = [errors(module, (x.to(kind) if x.is_floating_point() else x, y), precision) for x, y in batches]
    module.float()
    return {
        name: Errors(*(statistics.median(values) for values in zip(*(one[name] for one in found), strict=True)))
        for name in found[0]
    }


def images() -> Callable[[], Batch]:
    """Random batches of 50 digits."""
    data = Digits(image_size=8, batch_size=50)
    data.setup("fit")
    split = data.images("train")

    def draw() -> Batch:
        chosen = torch.randint(len(split.labels), (50,))
        return split.pixels[chosen] / 255, split.labels[chosen]

    return draw


def texts() -> Callable[[], Batch]:
    """Random batches of 16 rows; each word is followed by one of four, chosen once."""
    followers = torch.randint(2, WORDS, (WORDS, 4))

    def draw() -> Batch:
        words = [torch.randint(2, WORDS, (16,))]
        for _ in range(LENGTH - 1):
            words.append(followers[words[-1], torch.randint(4, (16,))])
        rows = torch.stack(words, 1)
        return rows, rows

    return draw


def train(module: nn.Module, draw: Callable[[], Batch], steps: int) -> None:
    """By Adam."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        module(draw()).backward()
        optimizer.step()


def measure(subject: Subject, precisions: Sequence[str], steps: int) -> dict[str, dict[str, dict[str, Errors]]]:
    """Of one architecture in each precision, at first and after training."""
    torch.manual_seed(0)
    draw = texts() if subject.texts else images()
    module = subject.make().train()
    batches = [draw() for _ in range(BATCHES)]
    found = {precision: {"at first": medians(module, batches, precision)} for precision in precisions}
    train(module, draw, steps)
    for precision in precisions:
        found[precision]["trained"] = medians(module, batches, precision)
    return found


def row(found: dict[str, Any], state: str, precision: str, kinked: bool, others: Sequence[str] = ()) -> str:
    """Cells of one architecture in one state and precision: the default, what it was before, and other rules."""
    names = [default(precision, kinked).name, before(precision, kinked).name, *others]
    return " | ".join("{:.2f}, {:.2g}".format(*found[precision][state][name]) for name in names)


def tables(results: dict[str, Any]) -> None:
    """Print fp32 by itself, and what is taken by default in the other precisions."""
    precisions = list(next(iter(results.values())))
    for precision in precisions:
        named = [f"{kind} {default(precision, kinked).name}" for kind, kinked in (("kinks", True), ("smooth", False))]
        print(f"- default in {precision}: {'; '.join(named)}")
    others = [Rule("forward", 1e-4).name, Rule("forward", length=0.05).name]
    others += [Rule("central", length=length).name for length in LENGTHS]
    groups = [(precisions[:1], others), (precisions[1:], [])]
    for group, more in groups:
        heads = [f"{precision}, {name}" for precision in group for name in ("default", "before")] + more
        if heads:
            print(f"\n| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
        for name, found in results.items() if heads else ():
            for state in ("at first", "trained"):
                cells = [row(found, state, precision, SUBJECTS[name].kinked, more) for precision in group]
                print(f"| {name}, {state} | {' | '.join(cells)} |")


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--precisions", nargs="*", default=["fp32", "float64", "bf16", "fp16"])
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), help="these architectures")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--tables", type=Path, nargs="*", help="measure nothing: print the tables of such files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    if args.tables:
        read = {name: found for path in args.tables for name, found in json.loads(path.read_text()).items()}
        results = {name: read[name] for name in SUBJECTS if name in read}
    else:
        results = {name: measure(SUBJECTS[name], args.precisions, args.steps) for name in args.only}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, one thread"
    print(f"{versions}; each cell: cosine with the exact product, relative error\n")
    tables(results)


if __name__ == "__main__":
    main()

"""What a training step of UniLM costs in time and memory, and what padding costs.

    python benchmarks/unilm_train.py --json unilm_train.json

Steps: random weights in the shapes of MiniLM and BERT-base, batch 8, 96 source and 32 target tokens, dropout on, one
thread. ``target logits`` is this package; ``all logits`` the same network with the head run on every token, as in code
that masks the loss afterwards; ``EncoderDecoderModel`` two stacks of the same shape with cross-attention and
transformers' own loss. All take turns in one process, and the fastest call counts, in CPU seconds.

Memory: in a process of its own for each, the most bytes of tensors alive at once, by PyTorch's allocator (what
``torch.cuda.max_memory_allocated`` tells of a GPU): weights, gradients, activations and temporaries of forward and
backward, and of a whole step with AdamW, whose moments exist by then. Beside it the peak resident set (``ru_maxrss``)
of these steps above what the process had before the network was built: it adds what the system's allocator could not
give back, and the buffers of the libraries.

Padding: PythonDocstrings with a tokenizer learnt from it and a small network, whole steps with AdamW. Real tokens per
second of random batches of 32 pairs, of batches grouped by length, and of packed rows, as many of them as hold about 32
pairs. The limit of a row decides how much random batches waste: 256 tokens keep nine sources in ten whole, the 128 of
the data module's defaults three in four.
"""

import argparse
import json
import logging
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

from lightning_plugins import PythonDocstrings
from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.masks import segments_from_lengths
from lightning_plugins.unilm.objectives import InputBuilder, Vocabulary

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {},
}
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
PAD, CLS, SEP, MASK = 0, 101, 102, 103
B, SOURCE, TARGET = 8, 96, 32
OURS, ALL, PAIR = "target logits", "all logits", "EncoderDecoderModel"
LIMITS = {256: 224, 128: 96}  # tokens of a row: of its source
RANDOM, GROUPED, PACKED = "random, padded", "grouped by length", "packed"


def build_unilm(shape: dict[str, int], **ids: int) -> nn.Module:
    """One stack under the sequence-to-sequence mask, in training."""
    ids = {"pad_token_id": PAD, "sep_token_id": SEP, "mask_token_id": MASK} | ids
    return load_unilm(config={"model_type": "bert", **shape}, **ids).train()


def builder(network: nn.Module, vocabulary: Vocabulary) -> InputBuilder:
    """What the LightningModule makes its inputs with."""
    return InputBuilder("lm", {"seq2seq": 1.0}, 0.0, 0.0, vocabulary, network.token_types)


def target_loss(network: nn.Module, build: InputBuilder, batch: dict[str, Tensor], every: bool = False) -> Tensor:
    """Next-token loss of the target; ``every``: with logits of all tokens."""
    inputs = build(batch, noisy=False)
    logits = network(
        inputs.input_ids,
        attention_mask=inputs.allow,
        position_ids=inputs.position_ids,
        token_type_ids=inputs.token_type_ids,
        use_cache=False,
        logits_to_keep=0 if every else inputs.predict,
    ).logits
    if not every:
        return F.cross_entropy(logits, inputs.labels)
    labels = torch.full_like(inputs.input_ids, -100)
    labels[inputs.predict] = inputs.labels
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def build_losses(shape: dict[str, int], names: list[str]) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """A network and the function that computes its loss on a random batch, for each name."""
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (B, SOURCE + TARGET))
    found: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    if PAIR in names:
        both = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**shape), BertConfig(**shape))
        pair = EncoderDecoderModel(both).train()
        pair.config.decoder_start_token_id, pair.config.pad_token_id = CLS, PAD
        source, target = ids[:, :SOURCE].clone(), ids[:, SOURCE:].clone()
        found[PAIR] = pair, lambda: pair(source, labels=target, use_cache=False).loss
    if OURS in names or ALL in names:
        network = build_unilm(shape)
        build = builder(network, Vocabulary(network.config.vocab_size, PAD, MASK, (PAD, CLS, SEP, MASK)))
        batch = {"input_ids": ids, "segment_ids": segments_from_lengths([SOURCE] * B, [TARGET] * B)}
        found[OURS] = network, lambda: target_loss(network, build, batch)
        found[ALL] = network, lambda: target_loss(network, build, batch, every=True)
    return {name: found[name] for name in names}


def measure_steps(shape: str, rounds: int) -> dict[str, dict[str, float]]:
    """Parameters, fastest forward and backward, memory and optimiser step of each variant."""
    memory = {name: in_own_process(shape, name) for name in (OURS, ALL, PAIR)}
    losses = build_losses(SHAPES[shape], [OURS, ALL, PAIR])
    fastest = dict.fromkeys(losses, float("inf"))
    for _ in range(1 + rounds * (1 if shape == "BERT-base" else 3)):  # the small ones take little time
        for name, (network, loss) in losses.items():
            start = time.process_time()
            loss().backward()
            fastest[name] = min(fastest[name], time.process_time() - start)
            network.zero_grad()
    size = {name: sum(p.numel() for p in network.parameters()) for name, (network, _) in losses.items()}
    for name, own in memory.items():
        own |= {"parameters": size[name], "seconds": fastest[name]}
        own["seconds with AdamW"] = own["seconds"] + own["seconds of AdamW"]
    return memory


def in_own_process(shape: str, name: str) -> dict[str, float]:
    """What :func:`measure_memory` finds in a fresh process."""
    command = [sys.executable, __file__, "--memory_of", shape, name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_memory(shape: str, name: str) -> dict[str, float]:
    """Peak bytes without and with AdamW, and the seconds of AdamW."""
    build_losses(SHAPES["tiny"], [name])  # imports
    before = resident_bytes()
    network, loss = build_losses(SHAPES[shape], [name])[name]
    optimizer = torch.optim.AdamW(network.parameters())
    weights = sum(p.nbytes for p in network.parameters())
    peak = allocated(lambda: loss().backward())
    optimizer.step()  # makes its moments
    optimizer.zero_grad()
    loss().backward()
    start = time.process_time()
    optimizer.step()
    seconds = time.process_time() - start
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    return {
        "bytes": weights + peak,
        "bytes with AdamW": weights + moments + max(peak, gradients + allocated(optimizer.step)),
        "resident with AdamW": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "seconds of AdamW": seconds,
    }


def allocated(call: Callable[[], None]) -> int:
    """The most bytes that a call has allocated and not freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_padding(limit: int, num_batches: int) -> dict[str, dict[str, float]]:
    """Real tokens per second of each way to fill batches, and computed tokens per real one in the whole epoch."""
    ways: dict[str, dict[str, Any]] = {
        RANDOM: {"length_grouping": False, "batch_size": 32},
        GROUPED: {"batch_size": 32},
        PACKED: {"packing": True, "batch_size": 32},
    }
    found, batches = {}, {}
    for name, options in ways.items():
        data = PythonDocstrings(max_source_length=LIMITS[limit], max_target_length=limit - LIMITS[limit], **options)
        if name == PACKED:  # rows with about as many tokens as 32 pairs
            data.batch_size = max(1, round(32 * data.dataset("train").lengths.double().mean().item() / limit))
        start, loader = time.process_time(), data.train_dataloader()
        every = list(loader)
        collating = (time.process_time() - start) / len(every)
        real, places = (sum(int(f(batch["segment_ids"])) for batch in every) for f in (count_real, Tensor.numel))
        batches[name] = list(islice(every, num_batches))
        found[name] = {"computed / real": places / real, "collating": collating * len(batches[name])}
    tokenizer = data.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "sep", "mask")}
    network = build_unilm(SMALL | {"vocab_size": len(tokenizer)}, **ids)
    vocabulary = Vocabulary(len(tokenizer), ids["pad_token_id"], ids["mask_token_id"], ())
    build, optimizer = builder(network, vocabulary), torch.optim.AdamW(network.parameters())

    def step(batch: dict[str, Tensor]) -> float:
        start = time.process_time()
        target_loss(network, build, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    fastest = {name: [float("inf")] * len(mine) for name, mine in batches.items()}
    for _ in range(2):
        for i in range(num_batches):
            for name, mine in batches.items():
                if i < len(mine):
                    fastest[name][i] = min(fastest[name][i], step(mine[i]))
    for name, mine in batches.items():
        real = sum(int(count_real(batch["segment_ids"])) for batch in mine)
        found[name]["tokens/s"] = real / (sum(fastest[name]) + found[name].pop("collating"))
        found[name]["rows, tokens of a batch"] = [len(mine[0]["input_ids"]), real / len(mine)]
    return found


def count_real(segment_ids: Tensor) -> Tensor:
    """Tokens that are not padding."""
    return (segment_ids > 0).sum()


def compare(steps: dict[str, Any], padding: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """What is promised: name, value, target, whether it holds; and what is not."""
    rows: list[tuple[str, float, str, bool]] = []

    def add(name: str, value: float, target: float | None, most: bool = True) -> None:
        held = target is None or (value <= target if most else value >= target)
        rows.append((name, value, "" if target is None else f"{'<=' if most else '>='} {target:g}", held))

    kinds = {"seconds": "forward and backward", "seconds with AdamW": "step with AdamW"}
    kinds |= {"bytes": "memory", "bytes with AdamW": "memory with AdamW"}
    for shape, found in steps.items():
        for key, what in kinds.items():
            mine = found[OURS][key]
            add(f"{shape}, {what}: {OURS} / {PAIR}", mine / found[PAIR][key], 0.9)
            promised = shape == "MiniLM" and key in ("seconds", "bytes")
            add(f"{shape}, {what}: {OURS} / {ALL}", mine / found[ALL][key], 0.75 if promised else None)
    for limit, found in padding.items():
        for way in (GROUPED, PACKED):
            ratio = found[way]["tokens/s"] / found[RANDOM]["tokens/s"]
            add(f"rows up to {limit} tokens: {way} / {RANDOM}, tokens/s", ratio, 2.0, most=False)
    return rows


def print_tables(steps: dict[str, Any], padding: dict[str, Any], rows: list[tuple[str, float, str, bool]]) -> None:
    """Markdown."""
    print("| training step | parameters | forward, backward ms | AdamW ms ", end="")
    print("| tensors MB | with AdamW MB | resident with AdamW MB |\n" + "|---" * 7 + "|")
    for shape, found in steps.items():
        for name, own in found.items():
            times = f"{1e3 * own['seconds']:.0f} | {1e3 * own['seconds of AdamW']:.0f}"
            memory = (f"{own[key] / 1e6:.0f}" for key in ("bytes", "bytes with AdamW", "resident with AdamW"))
            print(f"| {shape}, {name} | {own['parameters']:,} | {times} | {' | '.join(memory)} |")
    print("\n| docstrings | rows a batch | real tokens a batch | computed / real tokens | real tokens/s |")
    print("|---" * 5 + "|")
    for limit, found in padding.items():
        for name, own in found.items():
            height, real = own["rows, tokens of a batch"]
            speed = f"{own['computed / real']:.2f} | {own['tokens/s']:.0f}"
            print(f"| up to {limit}, {name} | {height} | {real:.0f} | {speed} |")
    print("\n| ratio | measured | target | held |\n|---|---|---|---|")
    for name, value, target, held in rows:
        print(f"| {name} | {value:.3g} | {target} | {('yes' if held else 'NO') if target else ''} |")


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["MiniLM", "BERT-base"])
    parser.add_argument("--limits", nargs="*", type=int, choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--rounds", type=int, default=2, help="runs of each step after the first; the fastest counts")
    parser.add_argument("--batches", type=int, default=5, help="of the docstrings, of each kind, run twice")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)  # shape and variant, in a process of its own
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # EncoderDecoderModel's loss is another since 2021
    if args.memory_of:
        return print(json.dumps(measure_memory(*args.memory_of)))
    steps = {name: measure_steps(name, args.rounds) for name in args.shapes}
    padding = {limit: measure_padding(limit, args.batches) for limit in args.limits}
    rows = compare(steps, padding)
    print(
        f"torch {torch.__version__}, {platform.machine()}, one thread; steps of batch {B}, {SOURCE} + {TARGET} tokens\n"
    )
    print_tables(steps, padding, rows)
    if args.json:
        ratios = {name: {"measured": value, "target": target} for name, value, target, _ in rows}
        args.json.write_text(json.dumps({"ratios": ratios, "steps": steps, "padding": padding}, indent=1))


if __name__ == "__main__":
    main()

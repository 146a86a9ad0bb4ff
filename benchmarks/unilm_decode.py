"""What a KV cache gives UniLM, and what one stack costs against two: sources of 128 tokens, targets of 64, batch 8.

    python benchmarks/unilm_decode.py --json unilm_decode.json

Random weights in the shapes of MiniLM and BERT-base, one thread; greedy and with four beams. Compared are

- ``cached``: the source is encoded once, then one token a step;
- ``re-encoded``: the whole row at every step (``use_cache=False``), with logits of the last place only, and of all
  places, as bert4keras computes them;
- ``EncoderDecoderModel``: two stacks of the same shape with cross-attention, and their cache.

The first table is built of single forward calls: the fastest of each kind, times how often decoding needs it (steps at
their mean length). The second is ``generate()`` as it is, under the same options with [SEP] forbidden, so that all make
64 tokens: the steps are timed one by one, the fastest run of each step is taken, and these are added up. All take
turns in one process. Seconds are CPU time, or wall time with ``--clock wall``.
"""

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, Cache, DynamicCache, EncoderDecoderCache, EncoderDecoderConfig, EncoderDecoderModel

from lightning_plugins.unilm.cached_attention import roomy_cache
from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.masks import segments_from_lengths, seq2seq_mask

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {},
}
PAD, CLS, SEP, MASK = 0, 101, 102, 103
BEAMS = 4
CACHED, LAST, ALL, PAIR = "cached", "re-encoded, last logits", "re-encoded, all logits", "EncoderDecoderModel"
Times = dict[str, float]


def build_unilm(shape: dict[str, int]) -> nn.Module:
    """One stack under the sequence-to-sequence mask."""
    config = {"model_type": "bert", **shape}
    return load_unilm(config=config, pad_token_id=PAD, sep_token_id=SEP, mask_token_id=MASK).eval()


def build_pair(shape: dict[str, int]) -> nn.Module:
    """BERT2BERT."""
    both = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**shape), BertConfig(**shape))
    model = EncoderDecoderModel(both).eval()
    settings = model.generation_config
    settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id = CLS, SEP, PAD
    return model


class Fastest:
    """The least time of each named call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.times = clock, {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """Run it, and remember the time if it is the least."""
        start = self.clock()
        result = call()
        self.times[name] = min(self.times.get(name, float("inf")), self.clock() - start)
        return result


def forward_round(unilm: nn.Module, pair: nn.Module, sizes: argparse.Namespace, fastest: Fastest) -> None:
    """Each kind of forward call, greedy and with beams; the short ones five times."""
    B, S, middle = sizes.batch, sizes.source, sizes.source + sizes.target // 2
    source = torch.randint(1000, 30000, (B, S))
    cache, places = roomy_cache(), seq2seq_mask(segments_from_lengths([S] * B, [0] * B))
    fastest("prefill", lambda: unilm(source, attention_mask=places, past_key_values=cache, logits_to_keep=1))
    encoded = fastest("encoder", lambda: pair.encoder(source)).last_hidden_state
    for beams in (1, BEAMS):
        rows = B * beams
        states, both = encoded.repeat_interleave(beams, 0), EncoderDecoderCache(DynamicCache(), DynamicCache())
        fastest(f"first {beams}", partial(decoder_step, pair, torch.full((rows, 1), CLS), states, both))
        both.self_attention_cache = fill(DynamicCache(), pair.config.decoder, rows, sizes.target // 2)
        own, token = fill(roomy_cache(), unilm.config, rows, middle), torch.full((rows, 1), 7)
        for _ in range(5):  # in a row, as in decoding, where each step finds what the last one left in the CPU's cache
            fastest(f"step {beams}", partial(step, unilm, token, own))
            own.crop(-1)
        for _ in range(5):
            fastest(f"decoder {beams}", partial(decoder_step, pair, token, states, both))
            both.self_attention_cache.crop(-1)
        row = torch.randint(1000, 30000, (rows, middle))
        places = seq2seq_mask(segments_from_lengths([S] * rows, [middle - S] * rows))
        for name, kept in ((LAST, 1), (ALL, 0)):
            again = partial(unilm, row, attention_mask=places, use_cache=False, logits_to_keep=kept)
            fastest(f"{name} {beams}", again)


def step(unilm: nn.Module, token: Tensor, cache: Cache) -> Any:
    """One cached step."""
    rows, past = len(token), cache.get_seq_length()
    return unilm(
        token,
        attention_mask=torch.ones(rows, 1, past + 1, dtype=torch.bool),
        position_ids=torch.full((rows, 1), past),
        past_key_values=cache,
        logits_to_keep=1,
    )


def fill(cache: Cache, config: BertConfig, rows: int, length: int) -> Cache:
    """A cache that holds ``length`` tokens, the last of them by a call of its own."""
    heads = config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        for tokens in (length - 1, 1):
            keys = torch.randn(rows, heads, tokens, config.hidden_size // heads)
            cache.update(keys, keys.clone(), layer)
    return cache


def decoder_step(pair: nn.Module, token: Tensor, states: Tensor, cache: EncoderDecoderCache) -> Any:
    """One step of the decoder alone."""
    return pair.decoder(token, encoder_hidden_states=states, past_key_values=cache, use_cache=True)


def tokens_per_second(times: Times, sizes: argparse.Namespace, beams: int) -> Times:
    """What decoding a batch comes to, from the fastest calls."""
    new = sizes.target
    seconds = {
        CACHED: times["prefill"] + (new - 1) * times[f"step {beams}"],
        LAST: new * times[f"{LAST} {beams}"],
        ALL: new * times[f"{ALL} {beams}"],
        PAIR: times["encoder"] + times[f"first {beams}"] + (new - 1) * times[f"decoder {beams}"],
    }
    return {name: sizes.batch * new / value for name, value in seconds.items()}


class Generation:
    """The least time of each step of ``generate()``, by CPU and wall clock, over several runs."""

    def __init__(self, model: nn.Module, sizes: argparse.Namespace, beams: int, **options: Any) -> None:
        self.model, self.sizes, self.marks = model, sizes, []
        self.options = {"num_beams": beams, "do_sample": False, "suppress_tokens": [SEP]}
        self.options |= {"max_new_tokens": sizes.target, **options}
        self.steps: list[Times] = []

    def mark(self, *ignored: Any) -> None:
        """A forward call begins."""
        self.marks.append({"cpu": time.process_time(), "wall": time.perf_counter()})

    def run(self, source: Tensor) -> None:
        """Decode once."""
        handle = self.model.register_forward_pre_hook(self.mark)
        self.marks.clear()
        self.mark()
        output = self.model.generate(source, attention_mask=torch.ones_like(source), **self.options)
        self.mark()
        handle.remove()
        prompt = 1 if isinstance(self.model, EncoderDecoderModel) else source.shape[1]
        assert output.shape == (len(source), prompt + self.sizes.target), output.shape
        steps = [{clock: b[clock] - a[clock] for clock in a} for a, b in pairwise(self.marks)]
        best = self.steps or steps
        self.steps = [{clock: min(a[clock], b[clock]) for clock in a} for a, b in zip(best, steps, strict=True)]

    def seconds(self, clock: str) -> float:
        """Of the whole."""
        return sum(step[clock] for step in self.steps)


def measure(name: str, sizes: argparse.Namespace) -> dict[str, Any]:
    """All figures of one shape."""
    torch.manual_seed(0)
    unilm, pair = build_unilm(SHAPES[name]), build_pair(SHAPES[name])
    fastest = Fastest(time.process_time if sizes.clock == "cpu" else time.perf_counter)
    with torch.inference_mode():
        for _ in range(sizes.rounds):
            forward_round(unilm, pair, sizes, fastest)
    source = torch.randint(1000, 30000, (sizes.batch, sizes.source))
    runs = {f"{CACHED} {b}": Generation(unilm, sizes, b) for b in (1, BEAMS)}
    runs |= {f"{PAIR} {b}": Generation(pair, sizes, b) for b in (1, BEAMS)}
    for _ in range(sizes.rounds):
        for run in runs.values():
            run.run(source)
    if name in sizes.reencode:
        runs[f"{LAST} 1"] = Generation(unilm, sizes, 1, use_cache=False)
        runs[f"{LAST} 1"].run(source)
    return {
        "parameters": {CACHED: num_parameters(unilm), PAIR: num_parameters(pair)},
        "calls": fastest.times,
        "forward": {str(b): tokens_per_second(fastest.times, sizes, b) for b in (1, BEAMS)},
        "generate": {key: {clock: run.seconds(clock) for clock in ("cpu", "wall")} for key, run in runs.items()},
    }


def num_parameters(model: nn.Module) -> int:
    """Shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def compare(results: dict[str, Any], clock: str) -> list[tuple[str, float, str, bool]]:
    """What is promised: name, value, target, whether it holds."""
    rows = []
    for shape, found in results.items():
        for beams, target in ((1, 10.0), (BEAMS, 20.0)):
            how = f"{shape}, {'greedy' if beams == 1 else f'beam {beams}'}"
            speed, seconds = found["forward"][str(beams)], found["generate"]
            for base in (LAST, ALL):
                rows.append((f"{how}: cached / {base}", speed[CACHED] / speed[base], target, True))
            rows.append((f"{how}: cached / {PAIR}, forward calls", speed[CACHED] / speed[PAIR], 0.95, True))
            ratio = seconds[f"{PAIR} {beams}"][clock] / seconds[f"{CACHED} {beams}"][clock]
            rows.append((f"{how}: cached / {PAIR}, generate()", ratio, 0.95, True))
            if f"{LAST} {beams}" in seconds:
                ratio = seconds[f"{LAST} {beams}"][clock] / seconds[f"{CACHED} {beams}"][clock]
                rows.append((f"{how}: cached / {LAST}, generate()", ratio, target, True))
        parameters = found["parameters"]
        rows.append((f"{shape}: parameters / {PAIR}'s", parameters[CACHED] / parameters[PAIR], 0.5, False))
    return [
        (name, value, f"{'>=' if least else '<'} {target:g}", value >= target if least else value < target)
        for name, value, target, least in rows
    ]


def print_tables(results: dict[str, Any], rows: list[tuple[str, float, str, bool]], clock: str) -> None:
    """Markdown."""
    print(f"| tokens/s from forward calls ({clock}) | {CACHED} | {LAST} | {ALL} | {PAIR} |\n|---|---|---|---|---|")
    for shape, found in results.items():
        for beams, speed in found["forward"].items():
            cells = " | ".join(f"{speed[name]:.3g}" for name in (CACHED, LAST, ALL, PAIR))
            print(f"| {shape}, {'greedy' if beams == '1' else f'beam {beams}'} | {cells} |")
    print("\n| generate() | CPU s | wall s |\n|---|---|---|")
    for shape, found in results.items():
        for key, seconds in found["generate"].items():
            name, beams = key.rsplit(" ", 1)
            how = "greedy" if beams == "1" else f"beam {beams}"
            print(f"| {shape}, {how}: {name} | {seconds['cpu']:.2f} | {seconds['wall']:.2f} |")
    print("\n| ratio of speeds | measured | target | held |\n|---|---|---|---|")
    for name, value, target, held in rows:
        print(f"| {name} | {value:.3g} | {target} | {'yes' if held else 'NO'} |")


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["MiniLM", "BERT-base"])
    parser.add_argument("--rounds", type=int, default=2, help="runs of everything; the fastest counts")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--source", type=int, default=128, help="tokens of a source")
    parser.add_argument("--target", type=int, default=64, help="new tokens")
    parser.add_argument(
        "--reencode", nargs="*", default=["MiniLM"], help="shapes whose generate() is run uncached, too"
    )
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="what the ratios are taken of")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results = {name: measure(name, args) for name in args.shapes}
    rows = compare(results, args.clock)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread; batch {args.batch}, ", end="")
    print(f"{args.source} + {args.target} tokens\n")
    print_tables(results, rows, args.clock)
    if args.json:
        ratios = {name: {"measured": value, "target": target} for name, value, target, _ in rows}
        args.json.write_text(json.dumps({"ratios": ratios, **results}, indent=1))


if __name__ == "__main__":
    main()

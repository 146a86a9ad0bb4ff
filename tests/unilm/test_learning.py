"""What a network learns tells of leaks: unrelated targets keep their entropy; copy, reverse and sort are learnt."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.masks import positions, segments_from_lengths, seq2seq_mask

PAD, CLS, SEP, MASK, DIGIT = 0, 1, 2, 3, 4  # digit d is the token DIGIT + d
TASKS = ("copy", "reverse", "sort")
TASK = DIGIT + 10
N = 6  # digits of a target
BERT = dict(
    model_type="bert", vocab_size=TASK + len(TASKS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=128, max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def digits(rows, generator):
    return torch.randint(DIGIT, DIGIT + 10, (rows, N), generator=generator)


def solve(task, source):
    return {"copy": source, "reverse": source.flip(1), "sort": source.sort(1).values}[task]


def sources(tasks, numbers):
    """Rows ``[CLS] task digits [SEP]``."""
    column = torch.ones(len(numbers), 1, dtype=torch.long)
    return torch.cat([column * CLS, tasks[:, None] + TASK, numbers, column * SEP], 1)


def train(model, draw, steps, mask=seq2seq_mask, lr=3e-3, rows=64):
    """Adam on the target tokens' next-token loss; ``draw(generator)`` gives sources and targets. The losses."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses = []
    for _ in range(steps):
        source, target = draw(rows, generator)
        target = torch.cat([target, torch.full((rows, 1), SEP)], 1)
        ids = torch.cat([source, target], 1)
        segments = segments_from_lengths([source.shape[1]] * rows, [N + 1] * rows)
        predict = torch.zeros_like(segments, dtype=torch.bool)
        predict[:, source.shape[1] - 1 : -1] = True
        logits = model(
            ids,
            attention_mask=mask(segments),
            position_ids=positions(segments),
            token_type_ids=model.token_types(segments),
            logits_to_keep=predict,
        ).logits
        loss = cross_entropy(logits, target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def fresh():
    torch.manual_seed(0)
    return load_unilm(config=BERT, pad_token_id=PAD, sep_token_id=SEP, mask_token_id=MASK)


def unrelated(rows, generator):
    none = torch.zeros(rows, dtype=torch.long)
    return sources(none, digits(rows, generator)), digits(rows, generator)


def all_tasks(rows, generator):
    tasks, numbers = torch.arange(rows) % len(TASKS), digits(rows, generator)
    targets = torch.stack([solve(TASKS[task], row[None])[0] for task, row in zip(tasks.tolist(), numbers, strict=True)])
    return sources(tasks, numbers), targets


def one_too_far(segments):
    """The smallest leak: every target token also sees the next one, which it is to predict."""
    allow = seq2seq_mask(segments)
    allow[:, :-1] |= seq2seq_mask(segments)[:, 1:]
    return allow


def test_targets_unrelated_to_the_source_keep_their_entropy_unless_the_mask_leaks():
    """Six random digits and a certain [SEP]: 6/7 ln 10 = 1.974 nats a token, whatever is learnt."""
    entropy = N / (N + 1) * math.log(10)
    honest = train(fresh(), unrelated, 150, rows=32)
    assert sum(honest[-40:]) / 40 == pytest.approx(entropy, abs=0.03)
    leaking = train(fresh(), unrelated, 150, mask=one_too_far, rows=32)
    assert sum(leaking[-40:]) / 40 < 0.25 * entropy


def test_copy_reverse_and_sort_are_learnt_and_generated_without_a_mistake():
    model = fresh()
    losses = train(model, all_tasks, 400)
    assert losses[-1] < 0.1
    source, target = all_tasks(300, torch.Generator().manual_seed(2))
    out = model.eval().generate(source, max_new_tokens=N + 1)[:, source.shape[1] :]
    assert torch.equal(out[:, :N], target)
    assert (out[:, N] == SEP).all()

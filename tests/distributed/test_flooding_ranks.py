"""Flooding on two processes equals a loop of plain torch, on one process, on the written objective."""

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("train_flooding")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of all cases, run by two processes under torchrun."""
    folder = tmp_path_factory.mktemp("flooding")
    with torchrun("train_flooding", folder, cwd=folder):
        pass
    return folder


def expected(name):
    """Weights, and for each optimizer step the losses by micro-batch and rank."""
    scope, _, options = script.CASES[name]
    accumulate = options.get("accumulate_grad_batches", 1)
    model = script.Net()
    optimizer = torch.optim.SGD(model.parameters(), script.LR)
    x, y = script.data().tensors
    halves = [range(start, start + script.BATCH // 2) for start in range(0, script.SAMPLES, script.BATCH // 2)]
    steps = []
    for _ in range(script.EPOCHS):
        for start in range(0, len(halves), 2 * accumulate):
            window = halves[start : start + 2 * accumulate]
            losses = torch.stack([(model.net(x[half]) - y[half]).square().mean() for half in window])
            terms = losses.mean() if scope == "step" else losses
            optimizer.zero_grad()
            objective = ((terms - script.LEVEL).abs() + script.LEVEL).mean()
            (objective * len(window) / (2 * accumulate)).backward()
            if "gradient_clip_val" in options:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options["gradient_clip_val"])
            optimizer.step()
            steps.append(losses.detach().reshape(-1, 2))
    return dict(model.named_parameters()), steps


@pytest.mark.parametrize("name", script.CASES)
def test_two_processes_train_on_the_written_objective(runs, name):
    ranks = [torch.load(runs / name / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    weights, steps = expected(name)
    for rank in ranks:
        for key, value in weights.items():
            torch.testing.assert_close(rank["weights"][key], value.detach(), rtol=1e-11, atol=1e-14)
    for key, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][key]), f"the ranks differ in {key}"
    for index, rank in enumerate(ranks):
        losses = torch.cat([step[:, index] for step in steps])
        assert rank["losses"] == pytest.approx(losses.tolist(), rel=1e-9)  # raw
    straddle = [(step < script.LEVEL).any() and (step >= script.LEVEL).any() for step in steps]
    assert sum(straddle) >= 3, "the ranks would decide alike"
    signs = [-1.0 if step.mean() < script.LEVEL else 1.0 for step in steps]
    if name.startswith("step"):
        assert set(signs) == {1, -1}
        assert ranks[0]["signs"] == ranks[1]["signs"] == signs


@pytest.mark.parametrize("name", ["step", "microbatch", "step-sharded", "microbatch-accumulate"])
def test_logs_are_of_all_ranks(runs, name):
    accumulate = script.CASES[name][2].get("accumulate_grad_batches", 1)
    _, steps = expected(name)
    number = -(-script.SAMPLES // (script.BATCH * accumulate))  # optimizer steps in an epoch
    batches = script.SAMPLES // script.BATCH
    last = [epoch * batches + min((i + 1) * accumulate, batches) - 1 for epoch in range(3) for i in range(number)]
    for rank in (0, 1):
        logs = torch.load(runs / name / f"rank{rank}.pt", weights_only=True)["logs"]
        for step, index in zip(steps, last, strict=True):
            share = (step < script.LEVEL).double().mean() if name.startswith("micro") else step.mean() < script.LEVEL
            assert logs[index]["flood/raw_loss"] == pytest.approx(step.mean().item(), rel=1e-6)
            assert logs[index]["flood/active"] == pytest.approx(float(share))
            assert logs[index]["flood/level"] == pytest.approx(script.LEVEL)

"""FSDP2 block by block: what the units are, and two processes train what one does, with adapters and recomputation."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import load_script, torchrun
from tiny import sd_unet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_plugins import DiffusionTeacher
from lightning_plugins.core.activation_checkpointing import checkpoint_activations
from lightning_plugins.core.sharding import blocks
from lightning_plugins.unilm.backbones import FAMILIES
from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.masks import segments_from_lengths, seq2seq_mask

pytestmark = pytest.mark.ddp

for name in ("train_sid", "train_unilm"):  # what the script imports
    load_script(name)
script = load_script("train_blocks")
TOLERANCES = {"single": 2e-7, "true": 2e-2, "bf16": 2e-3}  # by the end of a case's name; else float64's
UNET = ["network.down_blocks.0", "network.down_blocks.1", "network.mid_block"]
UNET += ["network.up_blocks.0", "network.up_blocks.1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of all cases: run by one process, this one, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("blocks")
    one, two, teacher = folder / "one", folder / "two", folder / "teacher"
    torch.manual_seed(0)
    DiffusionTeacher((1, 8, 8), block_out_channels=(8, 16)).export(teacher)
    two.mkdir()
    with torchrun("train_blocks", two, teacher, cwd=folder) as log:
        for case in script.CASES:
            script.run(case, one / case, teacher)
    return SimpleNamespace(one=one, two=two, log=log.read_text())


def load(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", script.CASES)
def test_two_processes_equal_one(runs, name):
    one, *two = load(runs.one / name), load(runs.two / name), load(runs.two / name, rank=1)
    tolerance = TOLERANCES.get(name.rpartition("-")[2], 1e-10)
    assert [result["strategy"] for result in two] == ["ModelParallelStrategy"] * 2
    assert one["weights"].keys() == two[0]["weights"].keys() and one["dtypes"] == two[0]["dtypes"]
    for key, value in one["weights"].items():
        assert torch.equal(two[0]["weights"][key], two[1]["weights"][key]), key
        torch.testing.assert_close(two[0]["weights"][key], value, rtol=tolerance, atol=tolerance, msg=key)
    if "sample" in one:
        # each pixel is a sum over many weights, and autocast rounds it by 2^-8 on the way
        times = 50 if "bf16" in name else 10
        torch.testing.assert_close(two[0]["sample"], one["sample"], rtol=0, atol=times * tolerance)
    elif "bf16" not in name and "texts" in one:
        assert one["texts"] == two[0]["texts"] == two[1]["texts"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unilm", "sid", "sid-lora", "teacher"])
def test_recomputed_activations_change_nothing(runs, name):
    plain, again = load(runs.two / name), load(runs.two / f"{name}-recomputed")
    for key, value in plain["weights"].items():
        torch.testing.assert_close(again["weights"][key], value, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unilm", "sid", "sid-lora", "teacher"])
def test_every_trained_network_has_moved(runs, name):
    """So that a gradient that is lost would show."""
    start = script.build(name, runs.one.parent / "teacher", 1)[0]
    if name.startswith("sid"):
        start.networks.build(start.build_network)
        parts = ["networks.generator.", "networks.fake_score.", "networks.student."]
    else:
        parts = ["denoiser.", "average."] if name == "teacher" else []
    before = dict(start.named_parameters())
    for part in parts:
        now = {key: value for key, value in load(runs.two / name)["weights"].items() if key.startswith(part)}
        if name == "sid-lora":  # of each pair of adapters the second starts at zero
            moved = [value.abs().max() for key, value in now.items() if ".lora_B." in key]
        elif name == "teacher":  # the network is drawn anew
            continue
        else:
            moved = [(value - before[key]).abs().max() for key, value in now.items()]
        assert max(moved) > 1e-4, part


@pytest.mark.slow
def test_the_units_are_blocks(runs):
    """Each layer and each level gathers its weights by itself, and the rest of each network together."""
    layers = [f":net.bert.encoder.layer.{k}" for k in range(2)]
    assert load(runs.two / "unilm")["units"] == [":", *layers]
    trained = [f":networks.{part}" for part in ("fake_score", "generator", "student")]
    for name in ("sid", "sid-lora", "sid-lora-recomputed"):
        expected = [f"{root}.{unit}" for root in trained for unit in UNET] + trained
        expected += ["teacher:", *(f"teacher:{unit}" for unit in UNET)]
        assert load(runs.two / name)["units"] == sorted(expected)
    expected = [f"{root}.{unit}" for root in (":average", ":denoiser") for unit in UNET] + [":average", ":denoiser"]
    assert load(runs.two / "teacher")["units"] == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unilm", "sid"])
def test_weights_are_freed_after_a_call_without_a_backward_pass(runs, name):
    """Else ``module.zero_grad()`` would clear the gradients of gathered weights, which are not the trained ones."""
    assert load(runs.two / name)["whole"] == []


@pytest.mark.slow
def test_adapters_share_the_shards_of_the_weights_they_sit_on(runs):
    """Half a copy of the teacher in each process, not half of four; what cannot be halved evenly is padded by each."""
    one, two = (load(folder / "sid-lora")["frozen_bytes"] for folder in (runs.one, runs.two))
    assert 0.5 * one <= two < 0.6 * one


@pytest.mark.slow
def test_adapters_go_on_from_a_sharded_checkpoint(runs):
    whole, resumed = load(runs.two / "sid-lora"), load(runs.two / "resumed")
    for key, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][key], value), key


@pytest.mark.slow
def test_the_teacher_stays(runs):
    for name in ("sid", "sid-lora", "sid-lora-recomputed"):
        one, two = load(runs.one / name)["teacher"], load(runs.two / name)["teacher"]
        assert all(torch.equal(two[key], value) for key, value in one.items())


@pytest.fixture
def mesh():
    """Of this process alone: weights are sharded and gathered all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def assert_shards_alike(network, loss, mesh, recomputed):
    """Gradients of a network before and after it is sharded; returns the blocks."""
    before = {key: gradient.clone() for key, gradient in gradients(network, loss).items()}
    if recomputed:
        checkpoint_activations(network)
    units = blocks(network)
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for _ in range(2):  # again, after a call without a backward pass
        with torch.no_grad():
            loss(network)
        after = gradients(network, loss)
        assert before.keys() == after.keys()
        for key, value in before.items():
            torch.testing.assert_close(script.full(after[key]), value, rtol=1e-12, atol=1e-12)
    return units


def gradients(network, loss):
    network.zero_grad()
    loss(network).backward()
    return {key: value.grad for key, value in network.named_parameters() if value.grad is not None}


alone = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # to nobody else here
KEPT_WHOLE = {"squeezebert"}
NOT_RECOMPUTED = {"albert", "mpnet", "squeezebert", "ibert"}
SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 1}
OWN_SIZES = {
    "albert": {"embedding_size": 16},
    "esmc": {"num_key_value_heads": 2, "head_dim": 16},
    "eurobert": {"num_key_value_heads": 1, "head_dim": 16},
    "luke": {"entity_vocab_size": 5, "entity_emb_size": 16},
    "modernbert": {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "nomic_bert": {"head_dim": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "squeezebert": {"embedding_size": 32},
}


@alone
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sharded_by_layers(family, recomputed, mesh):
    if recomputed and family in NOT_RECOMPUTED:
        return
    torch.manual_seed(0)
    config = {"model_type": family, **SIZES, **OWN_SIZES.get(family, {})}
    model = load_unilm(config=config, pad_token_id=1, sep_token_id=3, mask_token_id=4).double().train()
    segments = segments_from_lengths([9, 7], [6, 8])
    ids = torch.randint(5, 48, segments.shape)

    def loss(network):
        torch.manual_seed(5)
        inputs = dict(attention_mask=seq2seq_mask(segments), use_cache=False, logits_to_keep=segments == 2)
        return network(ids, **inputs).logits.square().sum()

    units = assert_shards_alike(model, loss, mesh, recomputed)
    assert len(units) == (0 if family in KEPT_WHOLE else 1 if family == "albert" else 2)


def dit():
    import diffusers

    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "num_layers": 3, "norm_num_groups": 4}
    return diffusers.DiTTransformer2DModel(**sizes, out_channels=8, sample_size=8, num_embeds_ada_norm=10)


def sd3():
    import diffusers

    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 4}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 8}
    return diffusers.SD3Transformer2DModel(
        **sizes, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm"
    )


# name: network, conditions, blocks
NETWORKS = {
    "dit": (dit, lambda: {"class_labels": torch.tensor([1, 7])}, 2),  # the first stays with the rest
    "sd3": (
        sd3,
        lambda: {
            "encoder_hidden_states": torch.randn(2, 8, 16).double(),
            "pooled_projections": torch.randn(2, 16).double(),
        },
        3,
    ),
    "sd": (sd_unet, lambda: {"encoder_hidden_states": torch.randn(2, 8, 16).double()}, 5),
}


@alone
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_diffusers_are_sharded_by_blocks(name, recomputed, mesh):
    make, conditions, count = NETWORKS[name]
    torch.manual_seed(0)
    network, given = make().double().train(), conditions()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def loss(network):
        torch.manual_seed(1)
        return network(x, timestep=torch.tensor([5, 400]), **given)[0].square().sum()

    assert len(assert_shards_alike(network, loss, mesh, recomputed)) == count


def test_nothing_is_guessed_of_other_networks():
    assert blocks(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))) == []

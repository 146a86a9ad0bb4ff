"""CapsNet as a LightningModule: loss, masks, metrics, methods, precision, checkpoints, pictures."""

import functools

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_plugins.capsnet import PRESETS, CapsNet, squash
from lightning_plugins.data import MultiMNIST

TWO_LABELS = {"image": torch.rand(2, 1, 14, 14), "label": torch.tensor([[0, 1], [2, 3]])}
WRONG_LABEL = {"image": torch.rand(2, 1, 14, 14), "label": torch.tensor([0, 12])}
SMALL = {"image_shape": (1, 14, 14), "channels": 8, "kernel_size": 3, "num_types": 2, "decoder_hidden": (16,)}


class Images(torch.utils.data.Dataset):
    """Blurred squares whose place is the class, with two parts on request."""

    def __init__(self, length=32, num_labels=1, size=14):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.stack([torch.randperm(4, generator=generator)[:num_labels] for _ in range(length)])
        self.parts = torch.rand(length, num_labels, 1, size, size, generator=generator) * 0.2
        for i, labels in enumerate(self.labels.tolist()):
            for part, label in zip(self.parts[i], labels, strict=True):
                part[0, 3 * label : 3 * label + 3, 4:9] += 0.8

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        item = {"image": self.parts[i].sum(0).clamp(max=1), "label": self.labels[i]}
        if len(item["label"]) == 1:
            return item | {"label": item["label"][0]}
        return item | {"parts": self.parts[i]}


def loader(num_labels=1, batch_size=16):
    return DataLoader(Images(num_labels=num_labels), batch_size=batch_size)


def small(**arguments):
    torch.manual_seed(0)
    return CapsNet(**(SMALL | {"num_classes": 4} | arguments))


def trainer(tmp_path, **options):
    return quiet_trainer(default_root_dir=tmp_path, **({"max_epochs": 1, "log_every_n_steps": 1} | options))


def test_training_masks_by_label_and_evaluation_by_prediction():
    model, batch = small(), next(iter(loader()))
    poses = model(batch["image"])
    wrong = (model.predict_labels(poses) + 1) % 4
    batch["label"] = wrong

    def sse(labels):
        return (model.decoder(poses, labels) - batch["image"]).square().flatten(1).sum(1).mean() * 0.0005

    torch.testing.assert_close(model.train().loss(batch)["reconstruction"], sse(wrong))
    torch.testing.assert_close(model.eval().loss(batch)["reconstruction"], sse(model.predict_labels(poses)))


def test_reconstruction_weight_is_on_the_sum_of_an_image():
    model = CapsNet(channels=8, num_types=2)
    image, label = torch.rand(1, 1, 28, 28), torch.tensor([3])
    one = model.loss({"image": image, "label": label})
    many = model.loss({"image": image.expand(64, -1, -1, -1), "label": label.expand(64)})
    torch.testing.assert_close(one, many)
    mse = torch.nn.functional.mse_loss(model.reconstruct(image, label), image)
    torch.testing.assert_close(one["reconstruction"], 0.392 * mse)


def test_two_labels_reconstruct_both_parts():
    model, batch = small(num_labels=2), next(iter(loader(num_labels=2)))
    poses = 10 * torch.randn_like(model(batch["image"]))  # of which each decodes to a picture of its own

    def errors(labels):
        decoded = [model.decoder(poses, labels[:, i]) for i in (0, 1)]
        return sum((decoded[i] - batch["parts"][:, i]).square().sum() for i in (0, 1)) / len(poses)

    torch.testing.assert_close(model.loss(batch, poses)["reconstruction"], 0.0005 * errors(batch["label"]))

    read = model.predict_labels(poses)  # evaluation decodes what was read, each beside its own part
    batch["label"] = read.flip(1)
    assert abs(errors(read.flip(1)) / errors(read) - 1) > 1e-3
    torch.testing.assert_close(model.eval().loss(batch, poses)["reconstruction"], 0.0005 * errors(read.flip(1)))


def test_exact_set_accuracy():
    """Only an image with both digits right counts: 1 of 3 here, where 4 of 6 labels are right."""
    model = small(num_labels=2)
    poses = torch.zeros(3, 4, 16)
    for image, classes in enumerate([(0, 1), (2, 1), (3, 0)]):
        poses[image, list(classes), 0] = 0.9
    metric = model.metrics["val_metrics"]
    metric.update(*model._scores(poses, torch.tensor([[1, 0], [2, 3], [3, 2]])))
    assert metric.compute()["val/accuracy"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sample_does_not_depend_on_its_neighbours(preset):
    torch.manual_seed(0)
    model = CapsNet(preset, channels=8).eval()
    images = torch.rand(3, 1, 28, 28)
    together = model(images)
    for i in range(3):
        torch.testing.assert_close(model(images[i : i + 1])[0], together[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("weight", [0.0, 0.0005])
def test_no_parameter_is_unused(preset, weight):
    """An unused parameter would stop plain DDP."""
    model = CapsNet(preset, channels=8, reconstruction_weight=weight)
    sum(model.loss({"image": torch.rand(2, 1, 28, 28), "label": torch.tensor([0, 1])}).values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_perturb_moves_one_dimension_of_one_capsule():
    model = small().eval()
    images = torch.rand(2, 1, 14, 14)
    values = torch.tensor([-0.2, 0.0, 0.3])
    labels = torch.tensor([1, 3])
    sweep = model.perturb(images, values, labels)
    assert sweep.shape == (2, 16, 3, 1, 14, 14)
    assert model.perturb(images).shape == (2, 16, 11, 1, 14, 14)
    torch.testing.assert_close(sweep[:, 5, 1], model.reconstruct(images, labels))
    poses = model(images)
    poses[1, 3, 7] += 0.3
    torch.testing.assert_close(sweep[1, 7, 2], model.decoder(poses, labels)[1])


def test_routing_trace_ends_at_the_output():
    model = small(routing="kmeans", iterations=4)
    images = torch.rand(2, 1, 14, 14)
    trace = model.routing_trace(images)
    torch.testing.assert_close(trace.poses[-1], model(images))
    assert trace.couplings.shape[0] == 4


def test_predict_step_of_one_and_two_labels():
    for num_labels in (1, 2):
        model, batch = small(num_labels=num_labels).eval(), next(iter(loader(num_labels)))
        output = model.predict_step({"image": batch["image"]}, 0)
        assert set(output) == {"prediction", "score", "lengths", "poses", "reconstruction"}
        top = output["lengths"].topk(num_labels).indices.sort(-1).values
        assert torch.equal(output["prediction"], top[:, 0] if num_labels == 1 else top)
        score = output["lengths"].gather(1, top)
        assert torch.equal(output["score"], score[:, 0] if num_labels == 1 else score)
    assert "reconstruction" not in small(reconstruction_weight=0.0).predict_step(batch, 0)


def test_two_overlapping_digits_of_36_px():
    data = MultiMNIST("digits", batch_size=8)
    model = CapsNet(image_shape=data.image_shape, num_labels=data.num_labels, channels=8, num_types=2)
    batch = next(iter(data.train_dataloader()))
    sum(model.loss(batch).values()).backward()
    assert model.reconstruct(batch["image"], batch["label"]).shape == (8, 2, 1, 36, 36)


class PlainHead(torch.nn.Module):
    """A user's own head, without a trace."""

    def forward(self, u):
        return u.mean(1, keepdim=True).expand(-1, 4, -1)


class OwnHead(CapsNet):
    """A user's subclass without reconstruction, with a head and a validation of its own."""

    def build_capsules(self, num_inputs, in_dim):
        return PlainHead()

    def validation_step(self, batch, batch_idx):
        self.log("val/longest", self(batch["image"]).norm(dim=-1).max())


def test_own_head_and_own_validation_draw_what_they_can(tmp_path):
    torch.manual_seed(0)
    model = OwnHead(**SMALL, num_classes=4, reconstruction_weight=0.0)
    run = trainer(tmp_path)
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    assert list(tmp_path.rglob("*.png")) == []


def test_official_start_leaves_own_features_alone():
    features = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Flatten(2))
    before = features[0].weight.clone()
    model = small(preset="sabour2017_official", features=features)
    assert torch.equal(model.features[0].weight, before)
    assert (model.decoder.layers[0].bias == 0.1).all()


def test_pictures_in_half_precision():
    model = small().bfloat16()
    assert model.perturb(torch.rand(1, 1, 14, 14).bfloat16()).dtype == torch.bfloat16


def test_scheduler_that_watches_a_metric(tmp_path):
    reduce = functools.partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=10.0)
    model = small(lr=1e-3, scheduler=reduce, pictures_every_n_epochs=0)
    run = trainer(tmp_path, max_epochs=3)
    run.fit(model, loader(), loader())
    assert run.optimizers[0].param_groups[0]["lr"] < 1e-3


class TwiceTheMargin(CapsNet):
    """A user's subclass: one hook each for the network and the loss, an argument more."""

    def __init__(self, factor: float = 2.0, **arguments):
        super().__init__(**arguments)
        self.factor = factor

    def build_decoder(self):
        return torch.nn.Sequential()

    def loss(self, batch, poses=None):
        poses = self(batch["image"]) if poses is None else poses
        return {"margin": self.factor * self._margin_loss(poses, batch["label"])}


def test_subclass_hooks(tmp_path):
    torch.manual_seed(0)
    model = TwiceTheMargin(3.0, **SMALL, num_classes=4)
    assert isinstance(model.decoder, torch.nn.Sequential)
    model.decoder = None  # this subclass trains none
    run = trainer(tmp_path)
    run.fit(model, loader(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = TwiceTheMargin.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.factor == 3.0 and again.image_shape == (1, 14, 14)


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": "32-true"},
        {"precision": "bf16-mixed"},
        {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ],
    ids=["fp32", "bf16", "fp16-scaler", "accumulate-clip", "clip-value"],
)
def test_learns_in_every_mode(tmp_path, arguments):
    model = small(lr=1e-2, pictures_every_n_epochs=0)
    run = trainer(tmp_path, max_epochs=25, **arguments)
    run.fit(model, loader(), loader())
    assert run.callback_metrics["val/accuracy"] > 0.9
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_learns_two_labels(tmp_path):
    model = small(num_labels=2, lr=1e-2, pictures_every_n_epochs=0)
    run = trainer(tmp_path, max_epochs=25)
    run.fit(model, loader(num_labels=2), loader(num_labels=2))
    assert run.callback_metrics["val/accuracy"] > 0.8


def test_accumulation_equals_the_joined_batch(tmp_path):
    """Two halves accumulated are one batch, because every term is a mean over images."""
    weights = []
    for batch_size, accumulate in ((32, 1), (16, 2)):
        model = small(optimizer=functools.partial(torch.optim.SGD, lr=0.5), pictures_every_n_epochs=0)
        trainer(tmp_path, max_epochs=3, accumulate_grad_batches=accumulate).fit(
            model, loader(batch_size=batch_size), loader()
        )
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-6)


def test_compiled_step_equals_eager():
    model, batch = small(), next(iter(loader()))
    grads = []
    for loss in (model.loss, torch.compile(model.loss, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        sum(loss(batch).values()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1])


class TiledVotes(torch.nn.Module):
    """Routing as the popular implementations have it: transforms copied for every image, all votes kept."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, u):
        W = self.weight.permute(0, 2, 3, 1).unsqueeze(0).expand(len(u), -1, -1, -1, -1).contiguous()
        votes = (W @ u[:, :, None, :, None]).squeeze(-1)
        logits = torch.zeros_like(votes[..., :1])
        for _ in range(3):
            v = squash((logits.softmax(2) * votes).sum(1, keepdim=True))
            logits = logits + (votes * v).sum(-1, keepdim=True)
        return v.squeeze(1)


def test_a_step_saves_a_tenth_of_what_tiled_votes_save():
    torch.manual_seed(0)
    model = CapsNet()
    batch = {"image": torch.rand(16, 1, 28, 28), "label": torch.arange(16) % 10}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved_bytes():
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = sum(model.loss(batch).values())
        return sum(size for size, _ in storages.values()), loss.item()

    streamed, loss = saved_bytes()
    model.capsules = TiledVotes(model.capsules.weight)
    tiled, same_loss = saved_bytes()
    assert loss == pytest.approx(same_loss, rel=1e-5)
    assert streamed <= 0.1 * tiled


def test_checkpoint_of_a_module_with_network_and_factories(tmp_path):
    """Networks and callables are not in the file, which loads safely and asks for what it lacks."""
    features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(196, 96), torch.nn.Unflatten(1, (12, 8)))
    torch.manual_seed(0)
    model = CapsNet(
        image_shape=(1, 14, 14),
        num_classes=4,
        decoder_hidden=(16,),
        features=features,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    )
    run = trainer(tmp_path)
    run.fit(model, loader(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)  # the given scheduler stepped per epoch
    with pytest.raises(ValueError, match="does not hold CapsNet's argument 'features'"):
        CapsNet.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    again = CapsNet.load_from_checkpoint(
        tmp_path / "x.ckpt", weights_only=True, features=features, optimizer=None, scheduler=None
    )
    image = torch.rand(2, 1, 14, 14)
    assert torch.equal(again(image), model(image))


def test_plain_checkpoint_describes_itself(tmp_path):
    model = small(routing="kmeans_squash", share_weights=True)
    run = trainer(tmp_path)
    run.fit(model, loader(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = CapsNet.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.preset == model.preset
    image = torch.rand(2, 1, 14, 14)
    assert torch.equal(again(image), model(image))
    assert {p.dtype for p in again.parameters()} == {torch.float32}  # no float64 crept in


def test_pictures_are_drawn_on_their_cadence(tmp_path):
    model = small(pictures_every_n_epochs=2)
    run = trainer(tmp_path, max_epochs=3, logger=CSVLogger(tmp_path))
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    images = {path.relative_to(run.log_dir).as_posix() for path in (tmp_path / "lightning_logs").rglob("*.png")}
    names = ("couplings", "pose_dimensions", "reconstructions", "routing")
    expected = {f"images/val/{name}/{4:06d}.png" for name in names} | {f"images/test/{n}/{6:06d}.png" for n in names}
    assert images == expected


def test_validation_by_itself_draws(tmp_path):
    trainer(tmp_path).validate(small(pictures_every_n_epochs=3), loader(), verbose=False)
    assert len(list((tmp_path / "images/val").rglob("*.png"))) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(pictures_every_n_epochs=-1), "pictures_every_n_epochs=-1 must be 0 or more: 0 is for none."),
        (
            lambda: small(image_shape=(14, 14)),
            "image_shape=(14, 14) must be (C, H, W), each a whole number of 1 or more.",
        ),
        (lambda: small().training_step(WRONG_LABEL, 0), "num_classes=4 but a batch has labels from 0 to 12"),
        (lambda: small(num_labels=4), "num_labels=4 must lie in [1, 3]: at most num_classes - 1 = 3"),
        (lambda: small(features=torch.nn.Flatten()), "features must give capsules of shape (B, N, D), got (1, 196)"),
        (lambda: small()(torch.rand(2, 1, 28, 28)), "built for image_shape=(1, 14, 14), got images (1, 28, 28)."),
        (lambda: small(reconstruction_weight=0.0).reconstruct(torch.rand(2, 1, 14, 14)), "has no decoder"),
        (lambda: small(num_labels=2).loss(TWO_LABELS), "needs batches with 'parts'"),
        (lambda: small().loss(next(iter(loader(num_labels=2)))), "num_labels=1 but the batch has labels of shape"),
    ],
)
def test_mistakes_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        make()
    assert message in str(error.value)


def test_a_part_in_evaluation_mode_stays_there():
    """A user's frozen features: finding out how many capsules they give wakes none of them."""
    frozen = torch.nn.Sequential(torch.nn.BatchNorm2d(1).eval(), torch.nn.Flatten(), torch.nn.Unflatten(1, (12, 8)))
    model = CapsNet(image_shape=(1, 8, 12), num_classes=4, features=frozen)
    assert [part.training for part in model.features] == [False, True, True] and model.features.training
    assert not model.features[0].running_mean.any()  # nor does the blank image count

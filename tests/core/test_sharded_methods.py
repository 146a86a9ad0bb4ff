"""Methods of a sharded module: inspect tells their arguments as before."""

import inspect

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_plugins.core.sampling import takes_generator
from lightning_plugins.core.sharding import gather_for


class Painter(nn.Linear):
    """Draws by a matrix."""

    def sample(self, num_samples, *, scale=1.0, generator=None):
        return scale * self(torch.randn(num_samples, self.in_features, generator=generator))


@pytest.fixture
def sharded():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    painter = Painter(2, 3)
    whole = painter.weight.detach().clone()
    yield fully_shard(painter, mesh=init_device_mesh("cpu", (1,))), whole
    dist.destroy_process_group()


def test_the_signature_stays(sharded):
    painter, whole = sharded
    gather_for(painter, "sample")
    assert inspect.signature(painter.sample) == inspect.signature(Painter(2, 3).sample)
    assert takes_generator(painter.sample, {"scale": 2.0})
    with pytest.raises(TypeError, match="prior"):
        takes_generator(painter.sample, {"prior": "mixture"})
    drawn = painter.sample(4, scale=2.0, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, 2 * (noise @ whole.T + painter.bias.full_tensor()))

import torch
import torch.distributed as dist

from lightning_plugins.core.distributed import gather_rows, sum_over_ranks


def test_one_process_gets_its_own_back(tmp_path):
    """Without a process group, and as the only one of a group: nothing is sent, and nothing is copied."""
    for initialised in (False, True):
        if initialised:
            dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        gathered, own = gather_rows(rows)
        assert gathered is rows
        assert own == slice(0, 3)
        assert sum_over_ranks(rows) is rows
        assert torch.autograd.gradgradcheck(lambda rows: sum_over_ranks(gather_rows(rows)[0].exp()).sin(), rows)
        empty, own = gather_rows(torch.empty(0, 2))
        assert empty.shape == (0, 2) and own == slice(0, 0)

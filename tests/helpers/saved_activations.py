"""How many bytes autograd keeps between a forward pass and its backward pass."""

import torch


def kept_bytes(forward, parameters):
    """What ``forward()`` returns, and the bytes of the storages kept for its backward pass, each counted once.

    The storages of ``parameters`` are left out: they are there anyway.
    """
    theirs = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}  # with the tensor, so that no storage's address is given away again

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return output, sum(size for size, _ in kept.values())

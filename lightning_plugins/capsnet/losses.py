"""The margin loss, its targets, and predictions aligned with labels."""

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must


def margin_loss(
    lengths: Tensor, targets: Tensor, m_plus: float = 0.9, m_minus: float = 0.1, downweight: float = 0.5
) -> Tensor:
    r"""Margin loss on capsule lengths, summed over classes, averaged over the batch.

    .. math:: L = \sum_j T_j \max(0, m^+ - \|v_j\|)^2 + \lambda (1 - T_j) \max(0, \|v_j\| - m^-)^2

    Args:
        lengths: ``(B, J)`` in [0, 1).
        targets: ``(B,)`` class indices or ``(B, L)`` indices of several present classes.
        m_plus: length that a present class should reach; 0.9 in the paper.
        m_minus: length that an absent class may have; 0.1 in the paper.
        downweight: weight :math:`\lambda` of the absent classes; 0.5 in the paper, 0.25 in kexue.fm/archives/4819.

    Returns:
        ``()`` loss in float32 or wider.

    Raises:
        ValueError: an argument is out of range or a tensor of another shape.

    Source: Sabour, Frosst, Hinton 2017 (arXiv 1710.09829), eq. 4.

    Example:
        >>> margin_loss(torch.tensor([[0.9, 0.3]]), torch.tensor([0]))  # 0.5 * (0.3 - 0.1) ** 2
        tensor(0.0200)
    """
    margins = {"m_plus": m_plus, "m_minus": m_minus, "downweight": downweight}
    must.check(margins, m_plus=must.finite, m_minus=must.finite, downweight=must.non_negative)
    must.tensor("(B, J)")("lengths", lengths)
    must.tensor("(B, ...)", dtype="integer")("targets", targets)
    lengths = lengths.to(torch.promote_types(lengths.dtype, torch.float32))
    present = multi_hot(targets, lengths.shape[-1]).to(lengths.dtype)
    hit = (m_plus - lengths).clamp_min(0).square()
    miss = (lengths - m_minus).clamp_min(0).square()
    return (present * hit + downweight * (1 - present) * miss).sum(-1).mean()


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels as a matrix of 0 and 1, with a 1 for each class that is present.

    Args:
        labels: ``(B,)`` or ``(B, L)`` int64 classes.
        num_classes: number of classes J.

    Returns:
        ``(B, J)`` int64.

    Raises:
        ValueError: ``labels`` is no int64 tensor, or ``num_classes`` below 1.
    """
    must.tensor("(B, ...)", dtype="integer")("labels", labels)
    must.count("num_classes", num_classes)
    seen = labels.device.type == "cpu" and not torch.compiler.is_compiling()  # an accelerator would be waited for
    if seen and labels.numel():
        must.whole(int(labels.max()) + 1, why="labels are 0 to num_classes - 1")("num_classes", num_classes)
    rows = labels.reshape(len(labels), -1)
    return torch.zeros(len(rows), num_classes, dtype=torch.int64, device=labels.device).scatter_(1, rows, 1)


def align_labels(predictions: Tensor, labels: Tensor) -> Tensor:
    """Reorder predicted classes so that each right one stands where it stands in ``labels``.

    Args:
        predictions: ``(B, L)`` different classes.
        labels: ``(B, L)`` different classes.

    Returns:
        ``(B, L)`` predictions; wrong ones fill the places that are left.

    Example:
        >>> align_labels(torch.tensor([[1, 5], [3, 5]]), torch.tensor([[5, 3], [3, 5]]))
        tensor([[5, 1],
                [3, 5]])
    """
    same = predictions.unsqueeze(2) == labels.unsqueeze(1)  # (B, predicted, true)
    L = labels.shape[1]
    place = torch.where(same.any(2), same.int().argmax(2), L)  # of each prediction among the labels; L: wrong
    free = torch.where(same.any(1), torch.arange(L, device=labels.device), L)  # of each label; L: was not read
    return torch.empty_like(predictions).scatter_(
        1, free.argsort(dim=1, stable=True), predictions.gather(1, place.argsort(dim=1, stable=True))
    )

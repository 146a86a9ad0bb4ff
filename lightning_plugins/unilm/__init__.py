"""UniLM: a masked BERT becomes a sequence-to-sequence model by its attention mask alone.

Read in this order: ``masks.py`` (who may attend to whom: the idea), ``objectives.py`` (what is hidden and what is
predicted under it), ``module.py`` (training, evaluation and texts, from top to bottom), ``generation.py`` (the same
mask while decoding, a token at a time).

``forward.py`` gives a family's class that mask, ``loading.py`` builds it; ``backbones.py`` knows the families.
"""

from lightning_plugins.unilm.module import UniLMSeq2Seq
from lightning_plugins.unilm.plots import plot_masks

__all__ = ["UniLMSeq2Seq", "plot_masks"]

"""Every cell of the modules in ``wild/training.py``."""

import pytest
from wild.cells import cells, check


@pytest.mark.parametrize(("title", "callback", "setting"), list(cells("training")))
def test_cell(title, callback, setting, tmp_path):
    check(title, callback, setting, tmp_path)

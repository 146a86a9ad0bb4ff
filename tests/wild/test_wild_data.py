"""Every cell of the modules in ``wild/data.py``."""

import pytest
from wild.cells import cells, check


@pytest.mark.parametrize(("title", "callback", "setting"), list(cells("data")))
def test_cell(title, callback, setting, tmp_path):
    check(title, callback, setting, tmp_path)

"""What a capsule network learns from single digits, held by numbers: the recipe itself is the test."""

import runpy
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "capsnet_one_to_two_digits.py"


def test_capsules_read_two_digits_where_a_cnn_cannot(capsys):
    table = runpy.run_path(str(RECIPE))["main"](["--heads", "cnn", "kmeans"])
    one, two, both = zip(*table["kmeans"], strict=True)
    assert min(one) >= 0.95
    assert sum(two) / 3 >= 0.80 and min(two) >= 0.72 and min(both) >= 0.70
    one, two, both = zip(*table["cnn"], strict=True)
    assert min(one) >= 0.90
    assert max(two) <= 0.55 and max(both) <= 0.25
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[-1].startswith("| kmeans | ")

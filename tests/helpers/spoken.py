"""What a command has said."""

import re


def errors(capsys):
    """Standard error so far, but for the line that names the checkpoint of ``--ckpt_path last``."""
    return re.sub(r"^--ckpt_path last takes .*\n", "", capsys.readouterr().err, flags=re.MULTILINE)

"""Files and folders that a stranger might send, made where a test wants them: each says by which command it is opened.

They write below the current folder only, and need ``evil_module`` of :data:`MODULE` beside them.
"""

from hostile import checkpoints, files, folders
from hostile.parts import BY_COMMAND_LINE, CPU, DIGITS, EAE_ARGUMENTS, MODULE, eae, save, shards

__all__ = ["BY_COMMAND_LINE", "CPU", "DIGITS", "EAE_ARGUMENTS", "HOSTILE", "MODULE", "eae", "save", "shards"]

HOSTILE = {**checkpoints.CASES, **files.CASES, **folders.CASES}

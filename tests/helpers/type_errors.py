"""Check the types (``make types``): no error but those of the folders below, and there no more than this many.

``python tests/helpers/type_errors.py`` prints every error of a folder that has more than it may, and ends with status 1
if there is one. A number may only fall: lower it here when it has.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASELINE = {
    "lightning_plugins/callbacks": 94,
    "lightning_plugins/cli": 24,
    "lightning_plugins/sid": 144,
    "lightning_plugins/unilm": 118,
    "recipes": 24,
}


def folder_of(path):
    """The folder of the package, or the file or folder beside it, that an error is counted for."""
    parts = Path(path).relative_to(ROOT).parts
    return "/".join(parts[: 2 if len(parts) > 2 else 1])


def errors():
    """Lines ``file:line: rule: message`` of each folder."""
    command = [
        sys.executable,
        "-m",
        "basedpyright",
        "--project",
        str(ROOT),
        "--pythonpath",
        sys.executable,
        "--outputjson",
    ]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    report = json.loads(answer.stdout)
    if not report["summary"]["filesAnalyzed"]:
        sys.exit("no file was checked")
    found = defaultdict(list)
    for error in report["generalDiagnostics"]:
        if error["severity"] == "error":
            path, line = Path(error["file"]), error["range"]["start"]["line"] + 1
            where = f"{path.relative_to(ROOT)}:{line}"
            found[folder_of(path)].append(f"{where}: {error.get('rule', 'syntax')}: {error['message']}")
    return found


def main():
    found = errors()
    grown = {folder for folder in found if len(found[folder]) > BASELINE.get(folder, 0)}
    for folder in sorted(grown):
        print(*found[folder], sep="\n")
    for folder in sorted({*BASELINE, *found}):
        number, allowed = len(found[folder]), BASELINE.get(folder, 0)
        advice = ": lower it here, so that it stays so" if number < allowed else ""
        print(f"{folder}: {number} errors, {allowed} allowed{advice}")
    sys.exit(bool(grown))


if __name__ == "__main__":
    main()

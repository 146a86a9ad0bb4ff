"""Blocks of the README and the pages under docs."""

import re


def blocks(text):
    """Fenced blocks as ``(language, first line's number, content)``."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(match[1], text.count("\n", 0, match.start()) + 2, match[2]) for match in found]


def commands(content):
    """The commands of a shell block: continued lines joined, comments and prompts dropped, ``&&`` split."""
    joined = content.replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in joined.splitlines()]
    return [" ".join(part.split()) for line in lines if line for part in line.split("&&")]

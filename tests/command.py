"""Runs ``python -m proxyattn`` inside the test."""

import re

from proxyattn import __main__ as command


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of the command."""
    capsys.readouterr()
    try:
        status = command.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def number(text, pattern):
    """What the group of the pattern matches in some line of the text."""
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1])


def part(text, title):
    """The part of a report that begins with this line, up to the next blank line."""
    parts = [part for part in text.split("\n\n") if part.startswith(title)]
    assert len(parts) == 1, f"{title!r} heads {len(parts)} parts of:\n{text}"
    return parts[0]

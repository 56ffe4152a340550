"""Why the compiled extension could not be loaded, in words that tell what to do."""

import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# Stands in module.cpp for this.
_MADE_FOR = re.compile(rb"proxyattn made for torch ([^\x00]+)\x00")


def find_extension(folder: str) -> Path | None:
    """The file that ``import _C`` would take from the folder."""
    files = (Path(folder, f"_C{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def torch_made_for(file: Path) -> str:
    """The version of torch that an extension was built for, from the file alone."""
    found = _MADE_FOR.search(file.read_bytes())
    return found[1].decode() if found else "unknown"


def explain(error: ImportError, folder: str, torch_version: str) -> str:
    """A sentence for the ImportError that loading the folder's extension ended in."""
    file = find_extension(folder)
    if file is None:
        return (
            f"proxyattn: there is no compiled extension for this Python in {folder}; build it "
            "with: pip install --no-build-isolation ."
        )
    made_for = torch_made_for(file)
    advice = (
        "the libraries that this Python loads are not those of the compiler that built it"
        if made_for == torch_version
        else f"install proxyattn again, or torch {made_for}"
    )
    return (
        f"proxyattn: the compiled extension was built for torch {made_for} and could not be loaded "
        f"with torch {torch_version}, which is installed; {advice} ({error})"
    )

"""What an import says when the compiled extension can't be loaded."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import proxyattn
import pytest
import torch
from proxyattn import _C
from proxyattn._extension import explain, find_extension, torch_made_for

PACKAGE = Path(proxyattn.__file__).parent


def import_error(folder):
    """The last line that a Python prints which imports the package from the folder."""
    command = [sys.executable, "-c", "import proxyattn"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.splitlines()[-1]


@pytest.fixture
def copied(tmp_path):
    """A copy of the package, without its extension: (folder to import from, the package's)."""
    package = tmp_path / "proxyattn"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path, package


def spoil(package, made_for):
    """Puts an extension there that can't be loaded, built for a torch of this version."""
    file = find_extension(str(PACKAGE))
    data = file.read_bytes().replace(
        b"made for torch %s\0" % _C.torch_version.encode(),
        b"made for torch %s\0" % made_for.encode(),
    )
    (package / file.name).write_bytes(b"spoiled" + data)


def test_the_file_tells_what_torch_it_was_made_for():
    assert torch_made_for(find_extension(str(PACKAGE))) == _C.torch_version


def test_no_extension(copied):
    folder, package = copied
    assert import_error(folder) == (
        "ImportError: proxyattn: there is no compiled extension for this Python in "
        f"{package}; build it with: pip install --no-build-isolation ."
    )


def test_extension_of_another_torch(copied):
    folder, package = copied
    spoil(package, "1.2.3+old")
    line = import_error(folder)
    assert line.startswith(
        "ImportError: proxyattn: the compiled extension was built for torch 1.2.3+old and could "
        f"not be loaded with torch {torch.__version__}, which is installed; install proxyattn "
        "again, or torch 1.2.3+old ("
    )
    assert re.search(r"\(.*invalid ELF header\)$", line)


def test_extension_of_this_torch(copied):
    folder, package = copied
    spoil(package, torch.__version__)
    assert (
        f"was built for torch {torch.__version__} and could not be loaded with torch "
        f"{torch.__version__}, which is installed; the libraries that this Python loads are not "
        "those of the compiler that built it ("
    ) in import_error(folder)


def test_a_file_that_does_not_tell(tmp_path):
    name = find_extension(str(PACKAGE)).name
    (tmp_path / name).write_bytes(b"nothing of the kind")
    text = explain(ImportError("why"), str(tmp_path), "2.0")
    assert "was built for torch unknown and could not be loaded with torch 2.0" in text
    assert text.endswith("(why)")


@pytest.mark.skipif(
    not torch.__config__.show().startswith("PyTorch built with:\n  - GCC"),
    reason="torch was not built with the C++ library of GCC",
)
def test_the_extension_shares_the_cpp_library_with_torch():
    """One of its own would end the process where an error crosses into torch."""
    assert b"\0libstdc++.so.6\0" in find_extension(str(PACKAGE)).read_bytes()

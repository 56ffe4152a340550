"""Builds the extension with CMake, which describes the build, and puts it into the package.

Options reach CMake from the environment: PROXYATTN_CUDA, PROXYATTN_ARCHS, PROXYATTN_SANITIZE,
PROXYATTN_JITTER, PROXYATTN_WATCHDOG. CMAKE_BUILD_PARALLEL_LEVEL sets the number of jobs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OPTIONS = (
    "PROXYATTN_CUDA",
    "PROXYATTN_ARCHS",
    "PROXYATTN_SANITIZE",
    "PROXYATTN_JITTER",
    "PROXYATTN_WATCHDOG",
)


def require_torch():
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            "proxyattn: torch must be installed before proxyattn is built against it; install "
            "torch, then run: pip install --no-build-isolation ."
        ) from error


class CMakeBuild(build_ext):
    """One configure, one build, one install of the module."""

    def build_extension(self, ext):
        require_torch()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={target.parent}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += [f"-D{name}={os.environ[name]}" for name in OPTIONS if name in os.environ]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(
            ["cmake", "--build", str(build_dir), "--target", "_C", "-j", jobs], check=True
        )
        subprocess.run(["cmake", "--install", str(build_dir)], check=True)


setup(ext_modules=[Extension("proxyattn._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

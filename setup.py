"""Builds the extension with CMake, which describes the build, and puts it into the package.

Options reach CMake from the environment: see OPTIONS. PROXYATTN_BUILD_DIR is the folder to build
in, CMAKE_BUILD_PARALLEL_LEVEL the number of jobs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
# With their defaults, which are always passed: CMake remembers options of an earlier build.
OPTIONS = {
    "PROXYATTN_CUDA": "AUTO",
    "PROXYATTN_ARCHS": "80;86;89;90",
    "PROXYATTN_TESTS": "OFF",
    "PROXYATTN_BENCH": "OFF",
    "PROXYATTN_SANITIZE": "OFF",
    "PROXYATTN_JITTER": "OFF",
    "PROXYATTN_WATCHDOG": "OFF",
}


def require_torch():
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            "proxyattn: torch must be installed before proxyattn is built against it; install "
            "torch, then run: pip install --no-build-isolation ."
        ) from error


def build_tools():
    """(environment, path of cmake); tools installed beside this Python come first."""
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    cmake = shutil.which("cmake", path=environment["PATH"])
    if cmake is None:
        raise SystemExit(
            "proxyattn: cmake was not found; run: pip install cmake ninja pybind11 setuptools"
        )
    return environment, cmake


class FreshPython(build_py):
    """Starts from an empty folder, so that no file of an earlier build gets into the package."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One configure, one build, one install of the module."""

    def build_extension(self, ext):
        require_torch()
        environment, cmake = build_tools()
        build_dir = Path(os.environ.get("PROXYATTN_BUILD_DIR", self.build_temp)).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={target.parent.parent}",
            *(f"-D{name}={os.environ.get(name, default)}" for name, default in OPTIONS.items()),
        ]
        if shutil.which("ninja", path=environment["PATH"]):
            configure += ["-G", "Ninja"]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        build = [cmake, "--build", str(build_dir), "--target", "_C", "-j", jobs]
        for command in (configure, build, [cmake, "--install", str(build_dir)]):
            subprocess.run(command, check=True, env=environment)
        if not target.is_file():
            raise SystemExit(f"proxyattn: the build did not produce {target.name}")


setup(
    license="Apache-2.0",
    ext_modules=[Extension("proxyattn._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshPython},
)

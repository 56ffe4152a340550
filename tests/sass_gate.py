"""Checks the machine code of every built CUDA kernel: python tests/sass_gate.py BUILD_DIR

No kernel may use stack or local memory, which is where spilled registers go. Kernels of an sm90
family must multiply with warpgroup instructions and with nothing else, and those of attention must
hold exactly the products and waits that their source has: ptxas adds waits where it serialises.
Needs cuobjdump and nvdisasm, on PATH or from the pip packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Objects whose kernels must run on the tensor cores of sm90 by warpgroup instructions.
_WARPGROUP_OBJECT = re.compile(r"/sm90/hdim\d+_\w+\.cu\.o$")
WARPGROUP_PRODUCT = "HGMMA"
WARPGROUP_WAIT = "WARPGROUP.DEPBAR"
# (products, waits) of the attention kernels by head_dim. A warpgroup scores its first tile, repeats
# a step (two copies of it for 128) that scores a tile and adds an output, and adds the last output:
# a wait after each end and two in each step.
ATTENTION_COUNTS = {64: (16, 4), 128: (48, 6), 256: (40, 4)}
# Where key tiles are gathered from two blocks, another way to end: over half a tile.
SMALL_BLOCK_COUNTS = {**ATTENTION_COUNTS, 128: (52, 7)}
_ATTENTION = re.compile(r"attention_kernel.*?Li(\d+)E.*?BlockSizesE(\d)E")
# The same of the score and budget kernels: the logits of one tile, waited for.
LOGIT_COUNTS = {64: (4, 1), 128: (8, 1), 256: (16, 1)}
_LOGIT_HEAD_DIM = re.compile(r"(?:score|block_lse)_kernel.*?LogitTraitsILi(\d+)E")
WARP_PRODUCT = "HMMA"
LOCAL_ACCESS = ("LDL", "STL")

_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) .*?LOCAL:(?P<local>\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.]*)")


@dataclass(frozen=True)
class Kernel:
    """What one kernel of one architecture uses."""

    arch: str
    name: str
    registers: int
    stack: int  # bytes
    local: int  # bytes


def find_tools() -> tuple[Path, dict[str, str]]:
    """cuobjdump, and an environment in which it finds nvdisasm."""
    packaged = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, sorted(packaged))])
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool, path=path) is None:
            raise SystemExit(
                f"sass_gate: {tool} was not found; run: "
                "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
            )
    return Path(shutil.which("cuobjdump", path=path)), {**os.environ, "PATH": path}


def parse_usage(text: str) -> Iterator[Kernel]:
    """The kernels in the output of cuobjdump -res-usage."""
    arch = name = ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith("Function "):
            name = line.removeprefix("Function ").rstrip(":")
        elif (usage := _USAGE.search(line)) and name:
            numbers = {key: int(value) for key, value in usage.groupdict().items()}
            yield Kernel(arch, name, **numbers)
            name = ""


def parse_instructions(text: str) -> dict[tuple[str, str], Counter[str]]:
    """How often each instruction, with and without its suffixes, stands in each (arch, kernel) of
    the output of cuobjdump -sass; of the suffixes only the first counts."""
    found: dict[tuple[str, str], Counter[str]] = {}
    arch, names = "", Counter()
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif line.strip().startswith("Function : "):
            names = found.setdefault((arch, line.strip().removeprefix("Function : ")), Counter())
        elif instruction := _INSTRUCTION.match(line):
            parts = instruction[1].split(".")
            names.update({parts[0], ".".join(parts[:2])})
    return found


def check_usage(kernels: list[Kernel]) -> Iterator[str]:
    for kernel in kernels:
        for what, size in (("stack", kernel.stack), ("local memory", kernel.local)):
            if size:
                yield f"{kernel.name} ({kernel.arch}) uses {size} bytes of {what}"


def expected_counts(name: str) -> tuple[int, int] | None:
    """(products, waits) that a kernel for sm90 must have; None if nothing is known of it."""
    if attention := _ATTENTION.search(name):
        counts = ATTENTION_COUNTS if attention[2] == "0" else SMALL_BLOCK_COUNTS
        return counts[int(attention[1])]
    if head_dim := _LOGIT_HEAD_DIM.search(name):
        return LOGIT_COUNTS[int(head_dim[1])]
    return None


def check_warpgroup(instructions: dict[tuple[str, str], Counter[str]]) -> Iterator[str]:
    for (arch, name), names in instructions.items():
        expected = expected_counts(name)
        if expected is not None:
            found = (names[WARPGROUP_PRODUCT], names[WARPGROUP_WAIT])
            if found != expected:
                yield (
                    f"{name} ({arch}) must have {expected[0]} {WARPGROUP_PRODUCT} and "
                    f"{expected[1]} {WARPGROUP_WAIT}, got {found[0]} and {found[1]}"
                )
        for unwanted in (WARP_PRODUCT, *LOCAL_ACCESS):
            if unwanted in names:
                yield f"{name} ({arch}) has {unwanted}"


def check_object(path: Path) -> tuple[int, list[str]]:
    """(number of kernels, what is wrong with them) of one object file."""
    tool, environment = find_tools()

    def dump(option: str) -> str:
        command = [tool, option, path]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout

    kernels = list(parse_usage(dump("-res-usage")))
    failures = list(check_usage(kernels))
    if _WARPGROUP_OBJECT.search(path.as_posix()):
        instructions = parse_instructions(dump("-sass"))
        if not instructions:
            failures.append("no kernel was found in it")
        failures += check_warpgroup(instructions)
    return len(kernels), failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build_dir", type=Path)
    build_dir = parser.parse_args().build_dir
    objects = sorted(build_dir.rglob("*.cu.o"))
    if not objects:
        raise SystemExit(f"sass_gate: {build_dir} holds no objects of CUDA files")
    total, failed = 0, 0
    for path in objects:
        count, failures = check_object(path)
        total += count
        failed += len(failures)
        for failure in failures:
            print(f"sass_gate: {path.relative_to(build_dir)}: {failure}")
    if not total:
        raise SystemExit(f"sass_gate: no kernel was found in the {len(objects)} objects")
    if failed:
        print(f"sass_gate: {failed} failures in {total} kernels of {len(objects)} objects")
        return 1
    print(f"sass_gate: {total} kernels of {len(objects)} objects are sound")
    return 0


if __name__ == "__main__":
    sys.exit(main())

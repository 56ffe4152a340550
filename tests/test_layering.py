"""The rules of the tree that no compiler checks: who includes whom, and what stands where."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("include", "csrc", "python", "tests", "bench")
HEADERS = (".h", ".cuh")
CPP = (".h", ".cuh", ".cpp", ".cu")
MAX_LINES = 600


@cache
def files(*suffixes):
    """Paths relative to the root of all source files with one of these suffixes."""
    found = [
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
    ]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


@cache
def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def code(path):
    """C++ text without comments and string contents."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'

    def blank(match):
        return '""' if match[0].startswith('"') else " "

    return re.sub(pattern, blank, text(path), flags=re.DOTALL)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text(path), flags=re.MULTILINE)


def under(folder, *suffixes):
    return [path for path in files(*suffixes) if path.is_relative_to(folder)]


def offences(paths, is_bad):
    """'path: what' for every include that is bad."""
    return [f"{path}: {name}" for path in paths for name in includes(path) if is_bad(name)]


def is_torch(name):
    return name.startswith(("torch/", "ATen/", "c10/", "pybind11/")) or name == "Python.h"


def is_cuda(name):
    return name.startswith(("cuda", "cub/", "thrust/", "cutlass/", "cute/", "nv/")) and not (
        name.startswith("cuda/") and (ROOT / "csrc" / name).exists()
    )


def is_folder(*folders):
    return lambda name: name.startswith(tuple(f"{folder}/" for folder in folders))


def test_there_is_something_to_check():
    assert len(files(*CPP)) > 20 and len(under("csrc/torch", ".cpp")) > 5


def test_public_headers_know_neither_torch_nor_cuda():
    paths = under("include", *CPP)
    assert offences(paths, lambda name: is_torch(name) or is_cuda(name)) == []
    assert offences(paths, is_folder("common", "cpu", "cuda")) == []


def test_common_is_below_the_devices():
    paths = under("csrc/common", *CPP)
    assert offences(paths, lambda name: is_torch(name) or is_cuda(name)) == []
    assert offences(paths, is_folder("cpu", "cuda", "torch")) == []


def test_cpu_and_cuda_do_not_know_each_other():
    cpu, cuda = under("csrc/cpu", *CPP), under("csrc/cuda", *CPP)
    assert offences(cpu, lambda name: is_cuda(name) or is_folder("cuda")(name)) == []
    assert offences(cuda, is_folder("cpu")) == []


def test_only_the_bindings_know_torch():
    paths = [path for path in files(*CPP) if not path.is_relative_to("csrc/torch")]
    assert offences(paths, is_torch) == []


def test_one_binding_file_knows_torchs_cuda():
    paths = [path for path in under("csrc/torch", *CPP) if path.name != "cuda.cpp"]
    assert offences(paths, lambda name: is_cuda(name) or "/cuda/" in name) == []


def test_bindings_include_single_torch_headers():
    banned = ("torch/extension.h", "torch/all.h", "torch/torch.h", "ATen/ATen.h")
    assert offences(files(*CPP), lambda name: name in banned) == []


def test_benchmarks_and_cpp_tests_use_the_core_alone():
    paths = under("bench", *CPP) + under("tests", *CPP)
    assert offences(paths, is_torch) == []


def reached(path):
    """The file and all of ours that it includes, and those include."""
    found = {path}
    pending = [path]
    while pending:
        for name in includes(pending.pop()):
            for folder in ("tests/cpp", "csrc", "include"):
                header = Path(folder) / name
                if (ROOT / header).exists() and header not in found:
                    found.add(header)
                    pending.append(header)
    return sorted(found)


def test_cpp_tests_of_a_cpu_build_need_no_toolkit():
    listed = re.search(r"set\(subjects ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    subjects = listed[1].split()
    assert len(subjects) > 10
    for subject in subjects:
        paths = reached(Path(f"tests/cpp/test_{subject}.cpp"))
        assert offences(paths, is_cuda) == [], subject


def places(pattern, paths):
    return sorted({str(path) for path in paths if re.search(pattern, code(path))})


def outside(folder, paths):
    return [path for path in paths if not path.is_relative_to(folder)]


def test_inline_assembly_lives_in_ptx():
    assert places(r"\basm\b", outside("csrc/cuda/ptx", files(*CPP))) == []


def test_architecture_macros_live_in_ptx():
    assert places(r"__CUDA_ARCH", outside("csrc/cuda/ptx", files(*CPP))) == []


def test_device_code_is_in_cuh_and_cu_files():
    paths = [path for path in files(".h", ".cpp") if path != Path("csrc/common/math.h")]
    assert places(r"\b__(global|device|shared)__\b", paths) == []


def test_kernel_names_end_in_kernel():
    wrong = []
    for path in files(".cuh", ".cu"):
        plain = re.sub(r"__launch_bounds__\s*\([^)]*\)", "", code(path))
        names = re.findall(r"__global__[^;{(]*?(\w+)\s*\(", plain)
        wrong += [f"{path}: {name}" for name in names if not name.endswith("_kernel")]
    assert wrong == []


def test_schemas_are_in_library_cpp():
    found = places(r"TORCH_LIBRARY\s*\(|TORCH_LIBRARY_FRAGMENT", files(*CPP))
    assert found == ["csrc/torch/library.cpp"]
    python = [path for path in files(".py") if not path.is_relative_to("tests")]
    defining = re.compile(r"library\.define|custom_op\b|torch\.library\.Library\(")
    found = [str(path) for path in python if defining.search(text(path))]
    assert found == ["python/proxyattn/hf/_ops.py"]  # ops that call back into Python


def test_headers_have_guards_and_no_using_directives():
    headers = files(*HEADERS)
    assert [str(path) for path in headers if "#pragma once" not in text(path)] == []
    assert places(r"\busing\s+namespace\b", headers) == []


def test_nothing_prints_or_exits():
    library = [path for path in files(*CPP) if path.parts[0] in ("include", "csrc")]
    assert places(r"std::(cout|cerr|clog)|\b(puts|fprintf|exit|abort)\s*\(", library) == []


@pytest.mark.parametrize("suffix", [".h", ".cuh", ".cpp", ".cu", ".py"])
def test_files_are_short(suffix):
    long = {str(path): len(text(path).splitlines()) for path in files(suffix)}
    assert {path: lines for path, lines in long.items() if lines > MAX_LINES} == {}


def test_setup_py_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120


def test_cmake_lists_every_source():
    listed = (ROOT / "CMakeLists.txt").read_text()
    sources = under("csrc", ".cpp", ".cu")
    assert [str(path) for path in sources if str(path) not in listed] == []


def test_cpu_families_ask_for_what_they_are_built_with():
    families = re.findall(r"^ *proxyattn_cpu_family\((.*)\)", text(Path("CMakeLists.txt")), re.M)
    built = set(re.findall(r"-m(\w+)", " ".join(families)))
    dispatch = text(Path("csrc/cpu/simd/dispatch.cpp"))
    asked = re.findall(r'__builtin_cpu_supports\("(\w+)"\)|& bit_(\w+)', dispatch)
    assert {(name or bit).lower() for name, bit in asked} == built != set()


def everything():
    own = Path(__file__).resolve().relative_to(ROOT)
    texts = [path for path in files(*CPP, ".py", ".md", ".txt", ".sh") if path != own]
    return [*texts, Path("CMakeLists.txt"), Path("setup.py"), Path("pyproject.toml")]


def lines_with(pattern, paths):
    return [
        f"{path}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(text(path).splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_to_dos():
    assert lines_with(r"\b(TODO|FIXME|XXX|HACK)\b", everything()) == []


def test_no_paths_of_some_machine():
    assert lines_with(r"(?<![\w./}])/(work|home|root|Users|mnt|scratch)/", everything()) == []

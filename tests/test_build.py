"""What make and CMake do before anything is built."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def cpu_index_args(index):
    """(what make tells pip about the index, seconds that it took)"""
    command = [tool("make"), "-s", "cpu-index-args", "CUDA=off", f"CPU_INDEX={index}"]
    # Not as a part of the make that may be running these tests.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    begin = time.monotonic()
    done = subprocess.run(
        [*command, f"BIN={Path(sys.executable).parent}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), time.monotonic() - begin


@pytest.fixture
def server():
    """Starts servers on this machine, each answering every request with one status."""
    running = []

    def start(status):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        running.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=partial(running[-1].serve_forever, 0.01), daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/whl"

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


def test_an_index_that_answers_is_used(server):
    index = server(200)
    assert cpu_index_args(index)[0] == f"--extra-index-url {index}"


def test_an_index_that_refuses_is_left_out(server):
    assert cpu_index_args(server(403))[0] == ""


def test_an_index_that_never_answers_costs_seconds():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        shown, seconds = cpu_index_args(f"http://127.0.0.1:{silent.getsockname()[1]}/whl")
    assert shown == "" and seconds < 5


def configure(folder, *options):
    command = [
        tool("cmake"),
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        "-DPROXYATTN_PYTHON=OFF",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "archs", ["90a", "80;90a", "90-real", "sm_90", "9.0", "80 90", "80,90", "75", "7", "", ";80"]
)
def test_architectures_that_would_go_without_kernels(tmp_path, archs):
    status, text = configure(tmp_path, f"-DPROXYATTN_ARCHS={archs}")
    assert status != 0
    assert (
        'proxyattn: PROXYATTN_ARCHS must be compute capabilities from 80 on, such as "80;90" (90 '
        f'brings the sm_90a kernels), got "{archs}"'
    ) in text


@pytest.mark.parametrize("archs", ["80", "90", "80;86;89;90", "90;100;120"])
def test_architectures(tmp_path, archs):
    assert configure(tmp_path, f"-DPROXYATTN_ARCHS={archs}", "-DPROXYATTN_CUDA=OFF")[0] == 0


def test_cuda_is_auto_on_or_off(tmp_path):
    status, text = configure(tmp_path, "-DPROXYATTN_CUDA=maybe")
    assert status != 0
    assert "proxyattn: PROXYATTN_CUDA must be AUTO, ON or OFF, got maybe" in text

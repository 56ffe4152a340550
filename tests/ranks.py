"""Processes with a process group: started once, then asked for one thing after another.

A job is a function of a module that the processes can import. It is called as
``job(group, *arguments)`` on every rank of the group and checks there what it wants to know.
"""

import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

#: Seconds that a rank waits for another, and this process for a job.
GROUP_TIMEOUT, JOB_TIMEOUT = 60, 150


class Ranks:
    """``world`` processes. ``folder`` must be a new one: it is where they meet."""

    def __init__(self, folder, world, backend="gloo"):
        # Forked from a process that did nothing but import, so that they need not do it each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["proxyattn.distributed"])
        self._processes, self._pipes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (there, f"file://{folder}/store", rank, world, backend)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, members, job, *arguments):
        """What the job returns on each of these ranks, given a number of them or a list.

        Raises:
            AssertionError: with the tracebacks of those where it failed.
        """
        members = list(range(members)) if isinstance(members, int) else list(members)
        for pipe in self._pipes:
            pipe.send((members, job, arguments))  # all ranks take part in making a group
        results, failures = {}, []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(JOB_TIMEOUT):
                self.stop()
                raise AssertionError(f"rank {rank} did not answer")
            results[rank], failure = pipe.recv()
            failures += [f"rank {rank}:\n{failure}"] if failure else []
        assert not failures, "\n".join(failures)
        return [results[rank] for rank in members]

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe, store, rank, world, backend):
    torch.set_num_threads(1)
    os.environ["PROXYATTN_CHECK"] = "1"
    timeout = timedelta(seconds=GROUP_TIMEOUT)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=world, timeout=timeout
    )
    groups = {}
    while True:
        try:
            members, job, arguments = pipe.recv()
        except EOFError:  # the test run is over
            break
        result = failure = None
        key = tuple(members)
        if key not in groups:
            groups[key] = dist.new_group(members, timeout=timeout)
        if rank in members:
            try:
                torch.manual_seed(0)
                result = job(groups[key], *arguments)
            except BaseException:
                failure = traceback.format_exc()
        pipe.send((result, failure))


def error_of(function, *arguments, **named):
    """(type, message) of what the call raises, or None."""
    try:
        function(*arguments, **named)
    except Exception as error:
        return type(error), str(error).splitlines()[0]
    return None

"""Sweeping on a Ray cluster: each task is one batch at some points, in any order, on any node.

A task whose worker or node is lost is done again, a few times. Statistics are per sample and are
put together in the order of the batches, so the result is the local one, as long as the nodes' CPUs
run the same kernels. Workers read the files and import the modules themselves, which must exist on
their nodes under the same absolute names. Workers change to the folder in which the sweep was
started, if their node has it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ..errors import CtonnxError, MissingDependency, UsageError, first_line
from ..optional import require
from .engine import Job, Measured, Runner, Work, measure_batch

# The most points of a task: its batch is decoded once for all of them.
_POINTS = 8

# How often a task is done again after its worker or node was lost: the batch may be the reason.
_RETRIES = 4

# Seconds that submitted tasks have to end if a sweep ends before them.
_GRACE = 5

# How many tasks are submitted at a time, per CPU of the cluster.
_SUBMITTED = 2

# In a worker: what it has opened, for one job at a time.
_opened = {}

# In a driver: the addresses that it has connected to.
_connected = set()


class Cluster:
    """A connection to a Ray cluster, for one sweep.

    Args:
        job: what to measure.
        address: as for ray.init; if None, the cluster that this process is connected to, or the
            running one.
        gpus: GPUs that a task asks for.

    Raises:
        MissingDependency: ray is not installed, or there is no cluster.
        UsageError: this process is connected to another cluster; no node has that many GPUs.
    """

    def __init__(self, job: Job, address: str | None = None, gpus: float = 0) -> None:
        self._ray = ray = require("ray")
        _connect(ray, address)
        available = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
        if gpus > max(available, default=0):
            raise UsageError(f"the Ray cluster has no node with {gpus:g} GPUs")
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": _RETRIES}
        self._task = ray.remote(_work).options(**options)
        # Ray passes a reference inside a list on as it is: a worker fetches the job once.
        self._job = [ray.put(job)]
        self._key = f"{ray.get_runtime_context().get_job_id()}-{self._job[0].hex()}"
        self._limit = max(1, int(_SUBMITTED * ray.cluster_resources().get("CPU", 1)))

    def run(self, work: Work) -> Iterator[Measured]:
        """Do the work on the cluster; yields each piece as it is done.

        Raises:
            MissingDependency: a batch kills its worker each time.
            CtonnxError: what the job raises on a worker.
        """
        ray = self._ray
        tasks = (
            (batch, chosen[i : i + _POINTS])
            for batch, chosen in work
            for i in range(0, max(1, len(chosen)), _POINTS)
        )
        waiting = {}
        try:
            while True:
                while len(waiting) < self._limit and (task := next(tasks, None)):
                    waiting[self._task.remote(self._key, os.getcwd(), self._job, *task)] = task
                if not waiting:
                    return
                (ready, *_), _ = ray.wait(list(waiting))
                batch, _ = waiting.pop(ready)
                yield self._result(ready, batch)
        finally:
            self._cancel(list(waiting))

    def _result(self, ready: Any, batch: int) -> Measured:
        """What a finished task returned, or raise what it raised."""
        ray = self._ray
        try:
            return ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            # A user's mistake is raised here as it was on the worker.
            if isinstance(error.cause, CtonnxError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise MissingDependency(
                f"batch {batch} killed its worker {_RETRIES + 1} times, perhaps for lack of "
                f"memory: {type(error).__name__}: {first_line(error)}"
            ) from None

    def _cancel(self, tasks: list) -> None:
        """Cancel tasks, and wait a little for them to end."""
        ray = self._ray
        for task in tasks:
            ray.cancel(task)
        if tasks:
            ended, _ = ray.wait(tasks, num_returns=len(tasks), timeout=_GRACE)
            for task in ended:
                # Ray prints the error of a task whose result nobody asks for.
                with suppress(Exception):
                    ray.get(task)


def _connect(ray: Any, address: str | None) -> None:
    """Connect this process to a cluster, unless it is connected to that."""
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", here, *_connected):
            raise UsageError(f"Ray is already connected to {here}: call ray.shutdown() first")
        return
    _connected.clear()
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        line = first_line(error)
        raise MissingDependency(f"no Ray cluster to connect to: {line}") from None
    _connected.add(address)


def _work(key: str, folder: str, reference: list, index: int, chosen: list[int]) -> Measured:
    """A task, on a worker: measure a batch at some points.

    Args:
        key: tells the job from others.
        folder: the folder in which the sweep was started.
        reference: Ray's reference to the Job, in a list.
        index: the index of the batch.
        chosen: the indices of the points.
    """
    if key not in _opened:
        _opened.clear()
        # Before unpickling the job, which imports the modules of the user's functions.
        if os.path.isdir(folder):
            os.chdir(folder)
            sys.path.insert(0, folder)
        job = require("ray").get(reference[0])
        _opened[key] = job, Runner(job.steerable, job.providers, threads=1), job.open_source()
    job, runner, source = _opened[key]
    batch = source.batch(index)
    if batch is None:
        raise UsageError(f"the data end in front of batch {index} on a worker: fix their length")
    return measure_batch(job, runner, source, batch, index, chosen)

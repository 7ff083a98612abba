"""Sweeping on a Ray cluster: tasks of a batch and some points, in any order, on any node.

A task that is lost with its worker or node is done again, a few times. Statistics are per sample
and are put together in the order of the batches, so the result is the local one, as long as the
nodes' CPUs run the same kernels. Files are read and modules imported on the nodes: they must be
there under the same absolute names. Where the folder that the sweep was started in is there, the
workers change to it.
"""

import os
import sys
from contextlib import suppress

from ..errors import CtonnxError, MissingDependency, UsageError, first_line
from ..optional import require
from .engine import Runner, measure

# Points of a task: its batch is decoded once for all of them.
_POINTS = 8

# How often a task is done again whose worker or node was lost: a batch may be what kills it.
_RETRIES = 4

# Seconds that tasks have to end in when a sweep ends before them.
_GRACE = 5

# Tasks that are submitted before results are waited for, per CPU of the cluster.
_AHEAD = 2

# What this process, a worker, has opened: one job's session and data.
_opened = {}

# The addresses that this process, a driver, has connected to.
_connected = set()


class Cluster:
    """A connection to a Ray cluster, for one sweep.

    Args:
        address: as for ray.init; where None the cluster that this process is connected to, or the
            running one.
        gpus: GPUs that a task asks for.
        opening: a function that opens the source; every worker does for itself.
        providers, steerable, metric, points: as for engine.Runner and run_local.

    Raises:
        MissingDependency: ray is not installed, or there is no cluster.
        UsageError: this process is connected to another cluster; no node has as many GPUs.
    """

    def __init__(self, address, gpus, opening, providers, steerable, metric, points):
        self._ray = ray = require("ray")
        if ray.is_initialized():
            here = ray.get_runtime_context().gcs_address
            if address not in (None, "auto", here, *_connected):
                raise UsageError(f"Ray is connected to {here} already: ray.shutdown() ends that")
        else:
            _connected.clear()
            try:
                ray.init(address=address or "auto", log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                line = first_line(error)
                raise MissingDependency(f"no Ray cluster to connect to: {line}") from None
            _connected.add(address)
        held = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
        if gpus > max(held, default=0):
            raise UsageError(f"the Ray cluster has no node with {gpus:g} GPUs")
        job = ray.get_runtime_context().get_job_id()
        self._task = ray.remote(_work).options(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)
        # Within a list Ray hands over the reference: a worker gets the value once, not per task.
        self._held = [ray.put((opening, providers, steerable, metric, points))]
        self._key = f"{job}-{self._held[0].hex()}"
        self._limit = max(1, int(_AHEAD * ray.cluster_resources().get("CPU", 1)))

    def run(self, work):
        """As engine.run_local; results come as they are ready."""
        ray = self._ray
        tasks = (
            (batch, chosen[i : i + _POINTS])
            for batch, chosen in work
            for i in range(0, len(chosen), _POINTS)
        )
        waiting = {}
        try:
            while True:
                while len(waiting) < self._limit and (task := next(tasks, None)):
                    waiting[self._task.remote(self._key, os.getcwd(), self._held, *task)] = task
                if not waiting:
                    return
                (ready, *_), _ = ray.wait(list(waiting))
                batch, chosen = waiting.pop(ready)
                try:
                    statistics, broken = ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    # A user's mistake comes back as what it was raised as.
                    if isinstance(error.cause, CtonnxError):
                        raise error.cause from None
                    raise
                except ray.exceptions.RayError as error:
                    raise MissingDependency(
                        f"batch {batch} ends its worker {_RETRIES + 1} times, for lack of memory? "
                        f"{type(error).__name__}: {first_line(error)}"
                    ) from None
                yield batch, chosen, statistics, broken
        finally:
            for task in waiting:
                ray.cancel(task)
            # Ray prints the errors that nobody asked for.
            left = list(waiting)
            for task in left and ray.wait(left, num_returns=len(left), timeout=_GRACE)[0]:
                with suppress(Exception):
                    ray.get(task)


def _work(key, folder, held, batch, chosen):
    """Runs on a worker: the statistics of a batch at the points `chosen`."""
    import ray

    if key not in _opened:
        _opened.clear()
        # Before the function's own modules are imported, on unpickling.
        if os.path.isdir(folder):
            os.chdir(folder)
            sys.path.insert(0, folder)
        opening, providers, steerable, metric, points = ray.get(held[0])
        _opened[key] = Runner(steerable, providers, threads=1), opening(), metric, points
    runner, source, metric, points = _opened[key]
    given = source.batch(batch)
    return measure(runner, given, metric, points, chosen), given.broken

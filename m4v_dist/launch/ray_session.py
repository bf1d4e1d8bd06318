"""Start Ray on this machine or join a cluster, after asking whether it can hold the workers; leave nothing behind."""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import ConfigError

logger = logging.getLogger(__name__)


def _address(settings: LaunchSettings) -> str | None:
    return settings.address or os.environ.get("RAY_ADDRESS")


def require_resources(settings: LaunchSettings, *, num_gpus: int, num_cpus: int) -> None:
    """Check that this machine can hold the workers; Ray would wait for ever for what will not come.

    More workers than CPUs are allowed: they take turns.

    Args:
        settings: resources of the workers.
        num_gpus, num_cpus: of this machine.

    Raises:
        ConfigError: no GPU for a worker, or a worker that wants more CPUs than there are.
    """
    where = "on this machine; join a cluster by launch.address"
    if settings.use_gpu and num_gpus < settings.least_workers:
        fewer = f", or launch.num_workers={num_gpus}" if num_gpus else ""
        raise ConfigError(
            f"launch.use_gpu=true needs {settings.least_workers} GPUs, one a worker, but there are {num_gpus} {where}, "
            f"or set launch.use_gpu=false{fewer}."
        )
    if settings.cpus_per_worker > num_cpus:
        raise ConfigError(
            f"launch.cpus_per_worker={settings.cpus_per_worker:g}, but there are {num_cpus} CPUs {where}, or set at "
            f"most launch.cpus_per_worker={num_cpus}."
        )


def require_room(settings: LaunchSettings, nodes: Sequence[Mapping[str, float]]) -> None:
    """Check that the nodes that are up could hold the workers if they were idle: else Ray would wait for ever.

    Of an elastic run the fewest count.

    Whether a cluster grows cannot be seen from inside, so the user says it: `launch.wait_for_nodes`.

    Args:
        settings: resources of the workers.
        nodes: resources of each node that is up, by Ray's names.

    Raises:
        ConfigError: fewer workers fit, and no node is waited for.
    """
    wanted = {"CPU": settings.cpus_per_worker} | ({"GPU": 1.0} if settings.use_gpu else {})
    fitting = sum(int(min(node.get(name, 0.0) // amount for name, amount in wanted.items())) for node in nodes)
    if fitting >= settings.least_workers:
        return
    each = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    name = "num_workers" if settings.min_workers is None else "min_workers"
    message = (
        f"launch.{name}={settings.least_workers} of {each} each, but the {len(nodes)} nodes of the cluster that are up "
        f"hold {fitting} ({'; '.join(describe_resources(node) for node in nodes[:8])})"
    )
    if not settings.wait_for_nodes:
        raise ConfigError(
            f"{message}; set launch.{name} or launch.cpus_per_worker lower, or launch.wait_for_nodes=true if the "
            "cluster grows."
        )
    logger.warning("%s; waiting for it to grow", message)


def check_resources(settings: LaunchSettings) -> None:
    """What `ray_session` checks, without starting Ray here; a cluster that is named is joined for the question.

    Raises:
        ConfigError: see `require_resources` and `require_room`.
    """
    if _address(settings) is None:
        _require_machine(settings)
        return
    with ray_session(settings):
        pass


def _require_machine(settings: LaunchSettings) -> None:
    import torch

    require_resources(settings, num_gpus=torch.cuda.device_count(), num_cpus=os.cpu_count() or 1)


def start_ray(settings: LaunchSettings, *, num_cpus: int | None = None) -> str | None:
    """Join the cluster of `settings.address` or of the running Ray job; else start Ray on this machine.

    Args:
        settings: address and resources of the workers.
        num_cpus: CPUs that a local Ray declares; None takes what the workers need, at least the machine's own.

    Returns:
        The folder that was made for a local Ray's logs and sockets, for `stop_ray` to remove; None if none was made.
    """
    import ray

    if ray.is_initialized():
        logger.info("Ray is up already: %s", ray.get_runtime_context().gcs_address)
        return None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = _address(settings)
    if address is not None:
        ray.init(address=address, logging_level=logging.WARNING)
        logger.info("joined the Ray cluster at %s: %s", address, describe_resources(ray.cluster_resources()))
        return None
    needed = max(1, math.ceil(settings.num_workers * settings.cpus_per_worker))
    cpus = num_cpus if num_cpus is not None else max(needed, os.cpu_count() or 1)
    # A folder of its own: Ray would join another local cluster that it finds in a shared one. Short, because socket
    # paths in it are cut at 107 characters.
    given = os.environ.get("RAY_TMPDIR")
    folder = given or tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        _temp_dir=folder,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": _quieting_hook()},
    )
    logger.info("started Ray on this machine: %d CPUs declared, logs in %s", cpus, folder)
    return None if given else folder


def describe_resources(resources: Mapping[str, float]) -> str:
    """Ray's resources in words: CPUs and GPUs."""
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"


def _quieting_hook() -> Callable[[], None]:
    """What runs first in each process of a local Ray: it silences one message that would come every second.

    Ray Train's placement group cleaner asks the dashboard whether the controller lives; a local Ray has no dashboard.
    """

    def quiet() -> None:
        # Inside, so that Ray ships this function by value: the process that runs it cannot import our modules yet.
        import logging

        cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
        logging.getLogger(cleaner).setLevel(logging.ERROR)

    return quiet


def stop_ray(folder: str | None = None) -> None:
    """Disconnect, with the workers' last log lines shown; ends a Ray that `start_ray` started.

    Args:
        folder: what `start_ray` returned; removed. None leaves Ray's logs where they are.
    """
    import ray

    ray.shutdown()
    if folder is not None:
        # A process of Ray that ends late may still write there: what it leaves is a few logs.
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_session(settings: LaunchSettings, *, has_workers: bool = True) -> Iterator[None]:
    """`start_ray`, and `stop_ray` on leaving unless Ray was up before; after an error Ray's logs stay.

    Args:
        settings: address, and resources of the workers.
        has_workers: whether `run_workers` will be called inside, so that there must be room for its workers.

    Raises:
        ConfigError: see `require_resources` and `require_room`.
    """
    import ray

    was_up = ray.is_initialized()
    is_local = not was_up and _address(settings) is None
    if has_workers and is_local:
        _require_machine(settings)
    folder = start_ray(settings)
    try:
        if has_workers and not is_local:
            require_room(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield
    except BaseException:
        if not was_up:
            stop_ray()
            if folder is not None:
                logger.info("Ray's logs stay in %s", folder)
        raise
    if not was_up:
        stop_ray(folder)

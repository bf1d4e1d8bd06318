"""Work of many shards on a pool of Ray Data actors: the only file here that imports ray.

An actor class has one call, `{"task": [JSON of a task]}` to a column each of `name`, `outcome` (JSON, empty where it
failed), `error` and `exit_code` (0 where it did not): `shard_actor.ShardActor` is one. What travels are task names and
counts, never frames. An actor that dies (or its node) is replaced, and its task given to another, for ever: how often
is enough is the actor's own to say.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m4v_dist.config.curation_settings import CurationSettings
from m4v_dist.config.data_settings import PrecomputeSettings
from m4v_dist.errors import ConfigError

logger = logging.getLogger(__name__)

_MIN_SHARDS_A_CALL = 4
"""Tasks for each call of each actor, from which on an actor is given several calls at once."""


@dataclass(frozen=True)
class ActorPool:
    """How many actors do the work, and what each of them reserves.

    Args:
        min_actors, max_actors: actors to begin with, and the most there may be: the pool grows while tasks wait and
            there is room (nodes that come), and shrinks to the fewest as nodes go.
        cpus_per_actor, gpus_per_actor: what Ray reserves for one.
        waits_for_nodes: the cluster grows: a pool that no node can hold yet waits.
        calls_per_actor: tasks that an actor is given at once, each in a thread; the actor says what of them overlaps.
    """

    min_actors: int
    max_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    waits_for_nodes: bool
    calls_per_actor: int = 1

    @classmethod
    def of(cls, settings: PrecomputeSettings, calls_per_actor: int = 1) -> "ActorPool":
        """The pool of a precompute."""
        return cls(
            settings.min_actors or settings.num_actors,
            settings.num_actors,
            settings.cpus_per_actor,
            settings.gpus_per_actor,
            settings.wait_for_nodes,
            calls_per_actor,
        )

    @classmethod
    def of_surveys(cls, settings: CurationSettings, waits_for_nodes: bool) -> "ActorPool":
        """The pool of pass 1."""
        return cls(1, settings.num_actors, settings.cpus_per_actor, 0.0, waits_for_nodes)


def run_on_ray(
    actor: type, constructor_args: Sequence[Any], tasks: Sequence[str], pool: ActorPool
) -> Iterator[Mapping[str, Any]]:
    """Do tasks in a pool of actors on the Ray that is up.

    Args:
        actor: class of the actors, see above.
        constructor_args: what each actor is made from; sent by Ray, so picklable.
        tasks: JSON of each task, at least one.
        pool: how many, and how large.

    Yields:
        a row for each task, in the order in which they are done.

    Raises:
        ConfigError: no node that is up could hold an actor, and none is waited for.
    """
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    # our own bar counts shards; Ray's would count blocks beside it
    context.enable_progress_bars = False
    # A task is a whole shard, minutes long, so none waits behind another in an actor's queue: the pool is full, and
    # grows if it may, when every actor has its calls.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    require_room_for_an_actor(pool, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    most = min(pool.max_actors, len(tasks))
    # A second call is worth having where shards are many; where they are few it would keep one from an idle actor.
    calls = pool.calls_per_actor if len(tasks) >= _MIN_SHARDS_A_CALL * pool.calls_per_actor * most else 1
    rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks)).map_batches(
        actor,
        fn_constructor_args=tuple(constructor_args),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(pool.min_actors, most),
            max_size=most,
            max_tasks_in_flight_per_actor=calls,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor or None,
    )
    yield from rows.iter_rows()


def require_room_for_an_actor(pool: ActorPool, nodes: Sequence[Mapping[str, float]]) -> None:
    """Check that one node that is up could hold an actor if it were idle: else Ray would wait for ever.

    Whether a cluster grows cannot be seen from inside, so the user says it: `precompute.wait_for_nodes`.

    Args:
        pool: what an actor asks for.
        nodes: resources of each node that is up, by Ray's names.

    Raises:
        ConfigError: no node is large enough, and none is waited for.
    """
    wanted = {"CPU": pool.cpus_per_actor, "GPU": pool.gpus_per_actor}
    if any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
        return
    largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in wanted}
    message = (
        f"an actor wants {wanted['CPU']:g} CPU and {wanted['GPU']:g} GPU (precompute.cpus_per_actor, gpus_per_actor) "
        f"on one node, but no node of the cluster has that ({len(nodes)} up; at most {largest['CPU']:g} CPU and "
        f"{largest['GPU']:g} GPU on one)"
    )
    if not pool.waits_for_nodes:
        on_cpu = " (gpus_per_actor=0 encodes on CPUs)" if wanted["GPU"] > largest["GPU"] else ""
        raise ConfigError(f"{message}; lower them{on_cpu}, or set precompute.wait_for_nodes=true if the cluster grows.")
    logger.warning("%s; waiting for it to grow", message)

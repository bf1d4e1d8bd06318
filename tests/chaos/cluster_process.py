"""A Ray cluster in a process of its own, told by lines what to do: Ray reads its token when the process starts.

python -m tests.chaos.cluster_process        add | lose <node id> ; each answered by one line; ends with its input
"""

import sys

from ray.cluster_utils import Cluster

HEAD = {"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False}
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    nodes = {}
    print(cluster.address, flush=True)
    for line in sys.stdin:
        match line.split():
            case ["add"]:
                node = cluster.add_node(**NODE)
                nodes[node.node_id] = node
                print(node.node_id, flush=True)
            case ["lose", node_id]:
                # As a machine is lost: no process says good-bye.
                cluster.remove_node(nodes.pop(node_id), allow_graceful=False)
                print("lost", flush=True)
            case other:
                raise ValueError(f"{other}: neither add nor lose")
    cluster.shutdown()


if __name__ == "__main__":
    main()

"""`serve run` on a machine that does other things as well: less is started, and it is waited for.

python -m tests.ray.run SECONDS serve.yaml: how long Ray's proxy may take to start. Ray gives it 60,
which none of its settings changes.
"""

import sys

import ray
from ray.serve._private import api, client
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.scripts import cli

OBJECT_STORE_BYTES = 80 << 20


def main() -> None:
    """No dashboard, and room for few objects: Serve passes requests, and they are small."""
    api.HTTP_PROXY_TIMEOUT = client.HTTP_PROXY_TIMEOUT = float(sys.argv[1])
    ray.init(
        namespace=SERVE_NAMESPACE,
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    cli(["run", *sys.argv[2:]])


if __name__ == "__main__":
    main()

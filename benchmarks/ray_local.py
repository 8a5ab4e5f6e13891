"""Ray on this machine, and Refrain deployed on it as `serve deploy` would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.report import step

APP = "refrain"
# Until proxies and replicas run: each imports much, and Ray's own minute is too short for that on a busy machine.
LONGEST_S = 180


@contextmanager
def ray_running(folder: Path) -> Iterator[str]:
    """Ray with its proxy, whose URL is given; its files lie in `folder`, which must be short: sockets are there."""
    import ray
    from ray import serve
    from ray.serve._private import api, client

    api.HTTP_PROXY_TIMEOUT = client.HTTP_PROXY_TIMEOUT = LONGEST_S
    step("starting Ray")
    with ExitStack() as stack:
        ray.init(
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=str(folder / "ray"),
        )
        stack.callback(ray.shutdown)
        stack.callback(serve.shutdown)
        port = servers.free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"


def deploy(args: dict[str, Any], *, is_waited_for: bool, **options: Any) -> None:
    """The application with these settings; `options` are the deployment's own, as in a config file."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    ours = {"name": "refrain", "user_config": {}, "ray_actor_options": {"num_cpus": 0}}
    application = {
        "name": APP,
        "import_path": "app.cluster.application:build",
        "args": args,
        "deployments": [ours | options],
    }
    config, client = ServeDeploySchema.model_validate({"applications": [application]}), _get_global_client()
    client.deploy_apps(config)  # what `serve deploy` asks the controller for
    if is_waited_for:
        client._wait_for_application_running(APP, timeout_s=LONGEST_S)
        client.wait_for_proxies_serving()

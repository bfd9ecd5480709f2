"""The OpenAI server as a Ray Serve deployment. Replicas run on many machines. More of them start while requests
wait."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenswift_py.serving.bulk.ray_data import need_ray

DRAIN_S = 600.0  # seconds that a replica has to end its texts when it is taken away


def application(
    model: str, *, name: str | None = None, context: int | None = None, drafter: str = "auto", running: int = 16,
    waiting: int = 64, kv_tokens: int | None = None, key: str | None = None, hosts: Collection[str] | None = None,
    limits: Mapping[str, Any] | None = None, replicas: tuple[int, int] = (1, 4),
    autoscaling: Mapping[str, Any] | None = None, actor: Mapping[str, Any] | None = None, **loading: Any,
) -> Any:  # fmt: skip
    """Returns what `serve.run` deploys: the endpoints of `tokenswift serve`, with an engine in each replica.

    Raises UserError if Ray is not installed.

    model:       the model, as `TokenSwift.from_pretrained` takes it. Arguments that are not named here go there, too.
    name:        the model's name in requests. None takes the name from `model`, without folders.
    running:     the number of texts that a replica writes at once.
    waiting:     the number of texts that may wait in a replica.
    key:         the key that clients must send.
    hosts:       the names by which clients may call the server. None is this machine's own, or any name if there is a
                 key.
    limits:      the fields of `Limits`.
    replicas:    the fewest and the most replicas. Ray aims at `running` requests for each, waiting ones included.
    autoscaling: further fields of Ray's autoscaling_config.
    actor:       fields of Ray's ray_actor_options, such as num_gpus.
    """
    need_ray("ray.serve")
    from ray import serve

    def build() -> Any:  # it runs in the replica
        from tokenswift_py.api import TokenSwift
        from tokenswift_py.serving.engine import Engine
        from tokenswift_py.serving.http.gate import LOOPBACK
        from tokenswift_py.serving.http.server import Service
        from tokenswift_py.serving.limits import Limits

        swift = TokenSwift.from_pretrained(model, **loading)
        engine = Engine(
            swift, context, drafter=drafter, most_running=running, most_waiting=waiting, kv_tokens=kv_tokens
        )
        here = LOOPBACK if key is None else None
        return Service(engine, name or Path(model).name, Limits(**(limits or {})), key, hosts or here).app

    fewest, most = replicas
    scaling = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": running, **(autoscaling or {})}
    deployment = serve.deployment(
        name="tokenswift",
        max_ongoing_requests=running + waiting,
        graceful_shutdown_timeout_s=DRAIN_S,
        autoscaling_config=scaling,
        ray_actor_options=dict(actor or {}),
    )
    return deployment(serve.ingress(build)()).bind()

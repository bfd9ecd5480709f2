"""The OpenAI server as a Ray Serve deployment: replicas over many machines, more of them while requests queue."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenswift_py.serving.bulk.ray_data import need_ray

DRAIN_S = 600.0  # that the texts of a replica have when it is taken away


def application(
    model: str, *, name: str | None = None, context: int | None = None, drafter: str = "auto", running: int = 16,
    waiting: int = 64, kv_tokens: int | None = None, key: str | None = None, hosts: Collection[str] | None = None,
    limits: Mapping[str, Any] | None = None, replicas: tuple[int, int] = (1, 4),
    autoscaling: Mapping[str, Any] | None = None, actor: Mapping[str, Any] | None = None, **loading: Any,
) -> Any:  # fmt: skip
    """Returns what `serve.run` deploys: the endpoints of `tokenswift serve`, an engine in each replica.

    model:       as `TokenSwift.from_pretrained` takes it; arguments that are not named here go there, too.
    name:        the model's in requests; None is the model's, without folders.
    running, waiting: texts of a replica that are written at once, and that may wait in it.
    key:         what clients must send. hosts: names under which they may ask; None is this machine's own, or any with
                 a key.
    limits:      fields of `Limits`.
    replicas:    the fewest and the most. There are as many as have `running` requests each, waiting ones included.
    autoscaling: further fields of Ray's autoscaling_config. actor: of its ray_actor_options, such as num_gpus.
    Raises UserError where Ray is not installed.
    """
    need_ray("ray.serve")
    from ray import serve

    def build() -> Any:  # in the replica
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

"""Reaching Ray: one on this machine, or a cluster by its address.

Owns what is refused before Ray is asked, since Ray itself tries for minutes to reach an address at
which nobody listens. Leaves the workers to `ray_executor`.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from types import ModuleType
from typing import Any

from drllm.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
"""How long it may take until somebody answers at an address."""


def import_ray() -> ModuleType:
    """Return the package ray.

    Raises:
        ConfigError: It isn't installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--executor ray needs the package ray, which isn't installed; install it with "
            "pip install 'drllm[ray]', or leave --executor out"
        ) from error
    module: ModuleType = ray
    return module


def connect(ray: Any, address: str | None, num_workers: int | None) -> None:
    """Start Ray on this machine, or join a cluster.

    Args:
        ray: The package.
        address: HOST:PORT of a cluster, or `auto` for the one that `RAY_ADDRESS` names or Ray
            finds on this machine; None starts Ray here.
        num_workers: That it is to have cores for, at least, where it is started here.

    Raises:
        ConfigError: An address that is none, or at which there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        cores = max(os.cpu_count() or 1, num_workers or 1)
        # A RAY_ADDRESS in the environment isn't asked: without --ray-address, this machine.
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        return
    if address != "auto":
        host, port = _host_and_port(address)
    try:
        if address != "auto":
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray-address {address!r} can't be reached ({' '.join(str(error).split())[:200]}); "
            f"give HOST:PORT of a running cluster, as 'ray start' has said it, or leave it out"
        ) from error


def _host_and_port(address: str) -> tuple[str, int]:
    """Take an address apart.

    Raises:
        ConfigError: It isn't of the form HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    is_port = re.fullmatch(r"[0-9]{1,5}", port) is not None and int(port) < 1 << 16
    if not is_port or not re.fullmatch(r"[^/]+", host):
        raise ConfigError(
            f"--ray-address is {address!r}; give HOST:PORT of a running cluster, 'auto' for one "
            f"on this machine, or leave it out to start one"
        )
    return host.strip("[]"), int(port)  # an IPv6 address stands in brackets

"""Addresses at which there is no Ray are refused before Ray is asked."""

from __future__ import annotations

import socket
import time

import pytest

from drllm.errors import ConfigError
from drllm.search.ray_cluster import connect

NEVER_ASKED = object()
"""In place of the package ray: whoever asks it for anything fails."""


@pytest.fixture
def dead_port():
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_an_address_at_which_nobody_listens_is_refused_at_once(dead_port):
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        connect(NEVER_ASKED, f"127.0.0.1:{dead_port}", None)
    assert time.monotonic() - started < 2
    says = str(caught.value)
    assert says.startswith(f"--ray-address '127.0.0.1:{dead_port}' can't be reached (")
    assert "refused" in says
    assert says.endswith(
        "give HOST:PORT of a running cluster, as 'ray start' has said it, or leave it out"
    )


@pytest.mark.parametrize(
    "address",
    ["local", "head", "head:", "head:six", "head:99999", ":6379", "", "ray://head:10001"],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match=f"--ray-address is '{address}'; give HOST:PORT"):
        connect(NEVER_ASKED, address, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_an_address_at_which_somebody_listens_is_left_to_ray(host):
    """A Ray that notes what it is asked for."""

    class Noting:
        def init(self, **options):
            self.asked = options

    ray = Noting()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        try:
            server.bind((host.strip("[]"), 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        server.listen()
        address = f"{host}:{server.getsockname()[1]}"
        connect(ray, address, None)
    assert ray.asked["address"] == address


def test_what_ray_says_is_passed_on_in_one_line():
    class Failing:
        def init(self, **options):
            raise ConnectionError("Could not find\nany running Ray instance.")

    with pytest.raises(ConfigError) as caught:
        connect(Failing(), "auto", None)
    assert "--ray-address 'auto' can't be reached (Could not find any running" in str(caught.value)

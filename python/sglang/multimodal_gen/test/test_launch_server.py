"""The address that the supervisor listens on, before it starts any process."""

from __future__ import annotations

import socket

import pytest

from sglang.multimodal_gen.errors import PortInUse
from sglang.multimodal_gen.runtime import launch_server
from sglang.multimodal_gen.runtime.server_args import HttpArgs


def test_a_port_that_is_taken_is_refused_with_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(PortInUse, match=rf"port: {port} on 127\.0\.0\.1 is in use.*0 for any free one") as caught,
            launch_server._listening_socket(HttpArgs(port=port)),
        ):
            pass
    assert caught.value.param == "port"


def test_an_address_of_another_machine_is_refused_by_name() -> None:
    with (
        pytest.raises(PortInUse, match=r"cannot listen on 192\.0\.2\.1:0 .*use an address of this machine"),
        launch_server._listening_socket(HttpArgs(host="192.0.2.1", port=0)),
    ):
        pass


def test_port_0_takes_a_free_one() -> None:
    with launch_server._listening_socket(HttpArgs(port=0)) as listener:
        assert listener.getsockname()[1] > 0

"""The loss of Ray's GCS: told by its port, after a limit, and over as soon as it answers."""

from __future__ import annotations

import asyncio

import pytest

from elastic_moe.deploy.backend.gcs_watch import GcsWatch, limit_s


def test_silence_counts_from_the_last_answer() -> None:
    async def work() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        watch = GcsWatch(f"127.0.0.1:{port}", 10.0)
        for now in (0.0, 100.0):
            await watch.look(now)
            assert watch.lost is None
        server.close()
        await server.wait_closed()
        for now in (101.0, 109.9):
            await watch.look(now)
            assert watch.lost is None
        await watch.look(110.0)
        assert watch.lost is not None
        assert f"GCS at 127.0.0.1:{port} has not answered for 10 s" in watch.lost
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
        await watch.look(111.0)
        assert watch.lost is None
        server.close()
        await server.wait_closed()

    asyncio.run(work())


def test_one_that_never_answered_counts_from_the_first_look() -> None:
    async def work() -> None:
        # nobody listens on port 1
        watch = GcsWatch("127.0.0.1:1", 10.0)
        await watch.look(50.0)
        assert watch.lost is None
        await watch.look(60.0)
        assert watch.lost is not None

    asyncio.run(work())


@pytest.mark.parametrize(
    ("setting", "expected"), [(None, 45.0), ("600", 585.0), ("10", 5.0), ("20", 5.0), ("many", 45.0)]
)
def test_requests_end_before_ray_ends_their_process(setting: str | None, expected: float) -> None:
    assert limit_s(setting) == expected

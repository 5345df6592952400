"""A real Triton with tiny models, started once a session; clients of it for each test.

Use it with `pytest_plugins = ["tests.integration.triton_fixtures"]` in a test module.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.integration.models import write_all

from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.repository import TritonRepository


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with every model of tests/integration/models.py."""
    return write_all(tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def triton(
    tiny_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalTriton]:
    """A Triton that serves `tiny_models`, none loaded; tests must not kill it."""
    settings = LocalTritonSettings(
        state_directory=tmp_path_factory.mktemp("triton"),
        model_repositories=(tiny_models,),
        stop_timeout_s=0.5,
    )
    async with LocalTriton(settings) as local:
        yield local


@pytest_asyncio.fixture
async def triton_client(triton: LocalTriton) -> AsyncIterator[TritonClient]:
    """A client on the test's own loop."""
    client = await TritonClient.connect(triton.url, name="m1")
    yield client
    await client.close()


@pytest.fixture
def triton_repository(triton_client: TritonClient, tiny_models: Path) -> TritonRepository:
    """The session's Triton as a repository whose directory is readable."""
    return TritonRepository(triton_client, (tiny_models,))

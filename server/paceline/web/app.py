"""The HTTP endpoints: /metrics, /healthz, /readyz and the status page at /.

Invariant: everything is a GET that reads; nothing can be changed over HTTP, and the page loads
nothing from elsewhere.
"""

from __future__ import annotations

import errno

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from paceline.core.errors import ConfigError
from paceline.core.ports import Control
from paceline.web.page import render

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}
_CLOSE_S = 1.0
"""How long open connections may take to finish their answer when the server stops."""


class WebServer:
    """A started server."""

    def __init__(self, runner: web.AppRunner, *, port: int) -> None:
        self._runner = runner
        self.port = port

    async def stop(self) -> None:
        """Stop listening and close what is open."""
        await self._runner.cleanup()


async def start_web(
    control: Control, registry: CollectorRegistry, *, host: str = "127.0.0.1", port: int = 8002
) -> WebServer:
    """Serve on `host:port` (0: a free one; see `WebServer.port`).

    Raises ConfigError when it cannot listen there.
    """
    runner = web.AppRunner(
        create_app(control, registry), access_log=None, shutdown_timeout=_CLOSE_S
    )
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is in use; choose another with --http-port") from error
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; see --host and --http-port"
        ) from error
    return WebServer(runner, port=runner.addresses[0][1])


def create_app(control: Control, registry: CollectorRegistry) -> web.Application:
    """The application, for a runner of one's own."""
    endpoints = _Endpoints(control, registry)
    app = web.Application()
    app.router.add_get("/", endpoints.page)
    app.router.add_get("/metrics", endpoints.metrics)
    app.router.add_get("/healthz", endpoints.healthz)
    app.router.add_get("/readyz", endpoints.readyz)
    return app


class _Endpoints:
    def __init__(self, control: Control, registry: CollectorRegistry) -> None:
        self._control = control
        self._registry = registry

    async def page(self, request: web.Request) -> web.Response:
        text = render(self._control.status())
        return web.Response(text=text, content_type="text/html", headers=_PAGE_HEADERS)

    async def metrics(self, request: web.Request) -> web.Response:
        """In the format that the scraper accepts."""
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def healthz(self, request: web.Request) -> web.Response:
        """The process answers: that is all it says."""
        return web.json_response({"live": True})

    async def readyz(self, request: web.Request) -> web.Response:
        """200 when requests are served, 503 and the reason when not."""
        reason = self._why_not_ready()
        if reason:
            return web.json_response({"ready": False, "reason": reason}, status=503)
        return web.json_response({"ready": True})

    def _why_not_ready(self) -> str:
        if self._control.draining:
            return "draining: new requests are refused"
        if self._control.ready:
            return ""
        states = [
            f"{state.name} is {state.state}{f' ({state.reason})' if state.reason else ''}"
            for state in self._control.repository_index()
            if state.state != "READY"
        ]
        return "; ".join(states) or "starting"

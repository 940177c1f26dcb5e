"""Serving the page: to this machine alone unless another address is given, and with no network."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

# Before Gradio is imported: it reads these once.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import fastapi
import gradio as gr
import uvicorn
from absl import logging

from jaxpercept.webpage.models import Model
from jaxpercept.webpage.page import CSS, Page
from jaxpercept.webpage.uploads import Limits

# The browser may load nothing from anywhere else, whatever Gradio's page asks for.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'self'"
)
_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class _Guarded:
    """An ASGI application whose answers carry the policy."""

    def __init__(self, app: Callable[..., Any]):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = ((b"content-security-policy", _POLICY.encode()), *_HEADERS)
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        await self._app(scope, receive, guarded)


def application(models: Sequence[Model], limits: Limits) -> fastapi.FastAPI:
    """The page as an ASGI application."""
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guarded)
    return gr.mount_gradio_app(
        app,
        Page(models, limits).blocks,
        path="/",
        css=CSS,
        footer_links=[],
        max_file_size=int(limits.megabytes * 1e6),
        show_error=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )


def serve(models: Sequence[Model], limits: Limits, listening: socket.socket) -> None:
    """Serve the page until Ctrl-C; what visitors upload is gone afterwards."""
    host, port = listening.getsockname()[:2]
    with tempfile.TemporaryDirectory(prefix="jaxpercept_page_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        config = uvicorn.Config(
            application(models, limits), log_level="warning", timeout_graceful_shutdown=2
        )
        name = f"[{host}]" if ":" in host else host
        logging.info("ready: http://%s:%d", name, port)
        uvicorn.Server(config).run(sockets=[listening])

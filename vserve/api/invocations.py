"""POST /invocations: SageMaker's one path for all that a model can be asked.  The body says which endpoint is meant.

Event-loop thread only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from vserve.api.app import App
from vserve.api.asked import checked
from vserve.errors import BadRequest
from vserve.http.exchange import Exchange, Handler, Response


class Invocations:
    """The endpoint."""

    def __init__(self, app: App, handlers: Mapping[str, Handler]) -> None:
        """handlers: who answers a body that has this field; the first that is there decides."""
        self._app = app
        self._handlers = handlers

    async def create(self, exchange: Exchange) -> Response | None:
        """Hand the exchange on.  Raises BadRequest for a body that fits none."""
        fields = await checked(self._app, self._app.served, exchange, lambda fields, *_: fields)
        for name, handler in self._handlers.items():
            if fields.get(name) is not None:
                reply = handler(exchange)
                return await reply if inspect.isawaitable(reply) else reply
        raise BadRequest(f"The body must have one of {', '.join(f'`{name}`' for name in self._handlers)}.")

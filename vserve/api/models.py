"""GET /v1/models: the names the one model is served under."""

from __future__ import annotations

import orjson

from vserve.api.app import App, Served
from vserve.http.exchange import Exchange, Response


class Models:
    """The two endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app

    def list(self, exchange: Exchange) -> Response:
        """All names, the default one first."""
        served = self._app.served
        cards = [card(served, name) for name in served.model.names]
        return Response(200, orjson.dumps({"object": "list", "data": cards}))

    def retrieve(self, exchange: Exchange) -> Response:
        """One name.  Raises NotFound for any other."""
        served = self._app.served
        return Response(200, orjson.dumps(card(served, served.name(exchange.params["id"]))))


def card(served: Served, name: str) -> dict[str, object]:
    """The model object of OpenAI with vLLM's additions."""
    permission: dict[str, object] = {
        "id": f"modelperm-{served.fingerprint.removeprefix('fp_')}",
        "object": "model_permission",
        "created": served.created_s,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": served.created_s,
        "owned_by": "vserve",
        "root": served.model.names[0],
        "parent": None,
        "max_model_len": served.model.max_model_len,
        "permission": [permission],
    }

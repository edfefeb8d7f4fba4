"""GET /v1/models: the names that the models are served under, the one that generates before the embedding model."""

from __future__ import annotations

import orjson

from vserve.api.app import App
from vserve.errors import NotFound, shorten
from vserve.http.exchange import Exchange, Response


class Models:
    """The two endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app

    def list(self, exchange: Exchange) -> Response:
        """All names, the default one first."""
        return Response(200, orjson.dumps({"object": "list", "data": list(self._cards().values())}))

    def retrieve(self, exchange: Exchange) -> Response:
        """One name.  Raises NotFound for any other."""
        cards, name = self._cards(), exchange.params["id"]
        if name not in cards:
            raise NotFound(
                f"The model `{shorten(name)[1:-1]}` does not exist. Valid models: {', '.join(cards)}", param="model"
            )
        return Response(200, orjson.dumps(cards[name]))

    def _cards(self) -> dict[str, dict[str, object]]:
        app = self._app
        error = app.unavailable()
        if error is not None:
            raise error
        cards: dict[str, dict[str, object]] = {}
        encoder, served = app.loaded_encoder, app.loaded
        if served is not None:
            stamp = served.fingerprint.removeprefix("fp_")
            for name in served.model.names:
                cards[name] = card(name, served.model.names[0], served.model.max_model_len, served.created_s, stamp)
        if encoder is not None:
            model = encoder.model
            for name in model.names:
                cards.setdefault(name, card(name, model.names[0], model.max_tokens, encoder.created_s, "embedding"))
        return cards


def card(name: str, root: str, max_model_len: int, created_s: int, stamp: str) -> dict[str, object]:
    """The model object of OpenAI with vLLM's additions.  stamp: what its permission's id ends with."""
    permission: dict[str, object] = {
        "id": f"modelperm-{stamp}",
        "object": "model_permission",
        "created": created_s,
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
        "created": created_s,
        "owned_by": "vserve",
        "root": root,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [permission],
    }

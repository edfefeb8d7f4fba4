"""POST /scale_elastic_ep and GET, POST /is_scaling_elastic_ep: how many copies of the model there are to be.

Owns the two forms of the request; what is done is the workers' business (vserve/scale).  Event-loop thread only.
"""

from __future__ import annotations

import orjson

from vserve.api import body
from vserve.api.app import App
from vserve.api.asked import query_fields
from vserve.api.fields import Field, Int, Table, read, table
from vserve.api.generation import ignored_header
from vserve.errors import BadRequest
from vserve.http.exchange import Exchange, Request, Response
from vserve.scale.workers import Phase

SIZE: Field[int | None] = Field("new_data_parallel_size", Int(1, 65536), None, "copies of the model there are to be")
WORKERS: Field[int | None] = Field("workers", Int(1, 65536), None, "other name of new_data_parallel_size")
DRAIN: Field[int] = Field("drain_timeout", Int(0, 86400), 120, "seconds that requests in flight get to end")
SCALE = table(SIZE, WORKERS, DRAIN)


class Scale:
    """The endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def resize(self, exchange: Exchange) -> Response:
        """200 once there are as many as asked for.  Raises what Workers.resize raises."""
        fields = _fields(exchange.request, SCALE)
        values, ignored = read(fields, SCALE, 0, self._app.options.strict)
        size, other = values[SIZE], values[WORKERS]
        if size is not None and other is not None and size != other:
            raise BadRequest(f"`workers` is {other} and `new_data_parallel_size` {size}; give one.", param="workers")
        wanted = size if size is not None else other
        if wanted is None:
            raise BadRequest("`new_data_parallel_size` (or `workers`) is required.", param="new_data_parallel_size")
        await self._app.workers.resize(wanted, float(values[DRAIN]))
        message = f"Scaled to {wanted} data parallel engines"
        reply = {"message": message, "data_parallel_size": self._app.workers.size}
        return Response(200, orjson.dumps(reply), headers=ignored_header(ignored))

    def state(self, exchange: Exchange) -> Response:
        """Whether a change is under way, and what became of the last."""
        scaling = self._app.workers.scaling
        reply = {
            "is_scaling_elastic_ep": scaling.phase is not Phase.IDLE,
            "phase": scaling.phase.value,
            "data_parallel_size": self._app.workers.size,
            "requested_data_parallel_size": scaling.requested,
            "error": scaling.error,
        }
        return Response(200, orjson.dumps(reply))


def _fields(request: Request, rows: Table) -> dict[str, object]:
    """The fields of query and body together."""
    made = query_fields(request, rows)
    if request.body:
        for name, value in body.read(request.body, request.headers.get("content-type")).items():
            if name in made and made[name] != value and name in rows:
                raise BadRequest(f"`{name}` differs between query and body.", param=name)
            made[name] = value
    return made

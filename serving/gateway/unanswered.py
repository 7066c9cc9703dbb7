"""What it means when an engine gives no answer, or none with status 200."""

from typing import TYPE_CHECKING

import aiohttp

from serving.gateway.errors import ApiError, from_engine
from serving.gateway.parameters import Checked

if TYPE_CHECKING:
    from serving.gateway.replica import Replica

LONGEST_ERROR = 65_536  # bytes of an engine's refusal that are read
LONGEST_RETRY = 300  # seconds, in Retry-After


class Unanswered(Exception):
    """A replica gave no answer, and nothing of one has reached the client: another may be asked.

    Args:
        error: for the client, if no other is; the replica has failed, where there is none.
    """

    def __init__(self, reason: str, error: ApiError | None = None) -> None:
        super().__init__(reason)
        self.reason, self.error = reason, error


class NoChunkUsage(Exception):
    """The engine does not tell the usage with every chunk of a stream, and says so instead of answering."""


async def refused(
    upstream: aiohttp.ClientResponse, replica: "Replica", checked: Checked, route: str, model: str
) -> Exception:
    """What a status other than 200 means.

    Args:
        model: the client's name of it.

    Returns:
        An ``Unanswered`` where the engine is at fault: what it says can hold anything, and is not for the client. An
        ``ApiError`` where the request is. A ``NoChunkUsage`` where the engine may be asked again, without that.
    """
    status = upstream.status
    if status in (429, 503):
        given = upstream.headers.get("Retry-After", "")
        seconds = min(int(given), LONGEST_RETRY) if given.isdecimal() else replica.retry_after
        return Unanswered("busy", ApiError(status, "the model's engine is overloaded", "overloaded", None, seconds))
    if status in (401, 403, 407):
        error = ApiError(502, "the engine does not accept the gateway: set its api_key_env", "engine_unavailable")
        return Unanswered("refused", error)
    if status < 400 or (status >= 500 and status != 501):
        return Unanswered("500" if status == 500 else "5xx")
    said = b""
    while len(said) < LONGEST_ERROR and (piece := await upstream.content.readany()):
        said += piece
    if status in (400, 422):
        # Fields of ours that not every server has; the client knows nothing of them.
        if checked.chunk_usage_added and replica.chunk_usage and b"continuous_usage_stats" in said:
            return NoChunkUsage()
        if checked.salted and b"cache_salt" in said:
            what = f"the engine does not take cache_salt: set models.{replica.model}.cache_salts to false"
            return ApiError(502, what, "engine_unavailable")
    error = from_engine(status, said, route, model)
    if error.status == 404 and error.code is None:  # it lists the model, and does not have it
        return Unanswered("missing")
    return error

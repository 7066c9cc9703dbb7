"""A double of an OpenTelemetry collector: takes traces as OTLP over HTTP, and counts their spans.

    python -m loadtest.gateway.collector --port PORT

``GET /state`` tells how many spans and requests came.
"""

import argparse

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """Counts."""

    def __init__(self) -> None:
        self.spans = self.requests = 0

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/traces", self.traces)
        app.router.add_get("/health", self.state)
        app.router.add_get("/state", self.state)
        return app

    async def traces(self, request: web.Request) -> web.Response:
        sent = ExportTraceServiceRequest.FromString(await request.read())
        self.requests += 1
        self.spans += sum(len(scope.spans) for resource in sent.resource_spans for scope in resource.scope_spans)
        return web.Response(content_type="application/x-protobuf")

    async def state(self, request: web.Request) -> web.Response:
        return web.json_response({"spans": self.spans, "requests": self.requests})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    web.run_app(Collector().application(), host="127.0.0.1", port=given.port, print=None, access_log=None)


if __name__ == "__main__":
    main()

"""Loaded by schemathesis, see test_openapi.py: makes requests reach the model, and keeps its answers short."""

import os
from typing import Any

import schemathesis

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
SHORT = 4  # tokens
LONG = 10_000  # what is beyond it is there to be refused


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """What is valid stays so, and what is not, too."""
    body, path = case.body, case.path_parameters
    if path and len(str(path.get("model", ""))) % 2:
        path["model"] = os.environ["MODEL"]
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = os.environ["MODEL"]
    if body.get("prompt") == "":
        body["prompt"] = "Asthma is"
    for name in LENGTHS:
        if isinstance(body.get(name), int) and SHORT < body[name] < LONG:
            body[name] = SHORT

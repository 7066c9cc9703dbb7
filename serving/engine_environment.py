"""What an engine gets of the environment: all but what writes down requests, and secrets that are others' to use.

An engine needs no password of the store, of Redis or of another engine. What runs in it (a model's code, a library that
prints its environment when it crashes) must not have them either.
"""

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.gateway.settings import Settings

# Variables that make vLLM write down what requests say, past the log that we read.
_TELLING = frozenset(("VLLM_DEBUG_LOG_API_SERVER_RESPONSE", "VLLM_DEBUG_DUMP_PATH", "VLLM_LOGGING_CONFIG_PATH"))
# Secrets whose variables no settings name. VLLM_API_KEY would have the engine refuse the gateway, which sends it none.
_SECRET = re.compile(
    r"PGPASSWORD|MEDASSIST_STORE_URL|MEDASSIST_API_KEY|OPENAI_API_KEY|VLLM_API_KEY|OTEL_EXPORTER_OTLP_(?:\w+_)?HEADERS"
)


def secret_variables(settings: "Settings") -> frozenset[str]:
    """The environment variables that settings name for secrets."""
    names = {settings.store.url_env, settings.redis.url_env, settings.tracing.headers_env}
    names |= {engine.api_key_env for model in settings.models.values() for engine in model.engines}
    return frozenset(name for name in names if name)


def inherited(secrets: frozenset[str]) -> dict[str, str]:
    """This process's environment without ``secrets``, the usual ones, and what would have requests written down."""
    withheld = secrets | _TELLING
    return {name: value for name, value in os.environ.items() if name not in withheld and not _SECRET.fullmatch(name)}

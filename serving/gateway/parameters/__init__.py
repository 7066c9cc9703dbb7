"""What requests may ask for: an allow-list per route, bounded by the settings of the model."""

from serving.gateway.parameters.checks import Checked, check
from serving.gateway.parameters.optional import NEVER, OPTIONAL
from serving.gateway.parameters.parsing import parse
from serving.gateway.parameters.requests import ROUTES

# Every field that a request may have on some route, and those that are always refused.
KNOWN: frozenset[str] = frozenset().union(NEVER, OPTIONAL, *(schema.model_fields for schema in ROUTES.values()))

__all__ = ["KNOWN", "NEVER", "OPTIONAL", "ROUTES", "Checked", "check", "parse"]

"""vLLM engines behind an OpenAI-compatible gateway."""

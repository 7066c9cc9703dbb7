"""LangChain's standard tests of a chat model, run by test_langchain.py in a process of its own.

``BASE_URL`` and ``MODEL`` come from the environment.
"""

import os
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models.base import OpenAIInvalidRequestError
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestServedModel(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": os.environ["MODEL"],
            "base_url": os.environ["BASE_URL"],
            "api_key": "unused",
            "temperature": 0,
            "max_tokens": 160,
            "max_retries": 0,
            "stream_usage": True,
        }

    @property
    def structured_output_kwargs(self) -> dict[str, str]:
        return {"method": "json_schema"}

    @property
    def model_override_value(self) -> str:
        return os.environ["MODEL"]

    # The model was trained on questions and answers alone.

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_tool_choice(self) -> bool:
        return False

    @pytest.mark.xfail(
        reason="LangChain turns schemas of Pydantic 1 into tools, whatever the method asked for",
        raises=OpenAIInvalidRequestError,
        strict=True,
    )
    def test_structured_output_pydantic_2_v1(self, model: Any) -> None:
        super().test_structured_output_pydantic_2_v1(model)


@pytest.fixture
def benchmark() -> None:
    """For the one test of recorded traffic, which skips itself: its plugins would be two more packages."""


@pytest.fixture
def vcr() -> None:
    """As ``benchmark``."""

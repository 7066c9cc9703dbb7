"""Anthropic's SDK against /v1/messages."""

import anthropic
import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.engine
QUESTION: list[anthropic.types.MessageParam] = [{"role": "user", "content": "What are the symptoms of asthma?"}]
GREEDY = {"temperature": 0}  # no argument of its own in this version


@pytest.fixture(scope="module")
def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.root, api_key="unused", max_retries=0)


def test_a_message_and_its_stream_give_the_same_answer(server: Server, client: anthropic.Anthropic) -> None:
    message = client.messages.create(model=server.model, messages=QUESTION, max_tokens=80, extra_body=GREEDY)
    (block,) = message.content
    assert block.type == "text"
    assert "asthma" in block.text.lower()
    assert message.stop_reason == "end_turn"
    with client.messages.stream(model=server.model, messages=QUESTION, max_tokens=80, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == block.text
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == message.usage.output_tokens > 0
    assert final.usage.input_tokens == message.usage.input_tokens > 0


def test_a_refusal_is_the_sdks_exception(server: Server, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as error:
        client.messages.create(model="no-such-model", messages=QUESTION, max_tokens=8)
    assert "no-such-model" in str(error.value)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model=server.model, messages=QUESTION, max_tokens=0)

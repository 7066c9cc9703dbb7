"""Text that a tokenizer may read as control tokens.

Most tokenizers turn ``<|im_start|>`` into one id wherever they find it, so whoever writes it in a message writes turns
that are not theirs; a media placeholder without its media has crashed engines (CVE-2026-44222).
"""

import re


def _cases(*words: str) -> str:
    """Words as tokenizers spell them; three literals are found far faster than one that ignores case."""
    return "|".join(form for word in words for form in (word, word.upper(), word.capitalize()))


# Each pattern has one literal first character, which is searched for at memchr's speed, and then a set that tells at
# once that it is nothing: text full of brackets must not take long either.
_MEDIA_WORDS = _cases("img", "image", "video", "audio", "speech")
_NAMED_MEDIA = (
    rf"(?:(?:start|end|begin)_of_|ds_|global[-_]|fake_token_around_)?(?:{_MEDIA_WORDS})"
    r"(?:_?(?:pad|token|context|CONTEXT|placeholder|soft_token|start|end|break|newline))?(?:[-_]?[0-9]{1,4})?>"
    r"|[be]oi>|row_[0-9]{1,3}_col_[0-9]{1,3}>"
)
_BARRED_MEDIA = rf"\|[^<>|\s]{{0,24}}?(?:{_MEDIA_WORDS}|{_cases('vision', 'media')})[^<>|\s]{{0,24}}\|?>"
# <|im_start|>, <|turn>, <turn|>, DeepSeek's full-width bars, and names of Llama, Mistral, Gemma, GLM and BERT.
_CONTROL = (
    r"\|[^<>|\s](?:[^<>|]{0,62}\|>|[a-z_]{0,30}>)|\uff5c[^<>\uff5c]{1,64}\uff5c>"
    r"|/?[sS]>|(?:[be]os|[se]op|pad|unk|mask|BOS|EOS|PAD|UNK)>|(?:start|end|begin)_of_(?:turn|text)>"
    r"|fim_(?:prefix|middle|suffix|pad)>"
)
_SQUARE_MEDIA = r"(?:IMG|IMAGE|VIDEO|AUDIO|img|image|video|audio)(?:_(?:BREAK|END|START|PAD|break|end|start|pad))?\]"
_SQUARE_CONTROL = (
    r"/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|ARGS|THINK)\]"
    r"|(?:BOS|EOS|CLS|SEP|MASK|PAD|UNK|[gs]MASK)\]"
)

_MEDIA = (re.compile(rf"<(?=[|abdefgirsvABEISV])(?:{_BARRED_MEDIA}|{_NAMED_MEDIA})"), re.compile(rf"\[{_SQUARE_MEDIA}"))
_ANY = (
    re.compile(rf"<(?=[|\uff5c/abdefgimprsuvABEIPSUV])(?:{_CONTROL}|{_NAMED_MEDIA})"),
    re.compile(rf"\[(?=[/ABCEIMPSTUVagisv])(?:{_SQUARE_CONTROL}|{_SQUARE_MEDIA})"),
)
_CLOSED = re.compile(r"<[a-z_]{1,30}\|>")  # only where there is a "|>": it would look at every tag of a page


def has_media(text: str) -> bool:
    """Whether it holds a placeholder for an image, a video or sound."""
    return any(pattern.search(text) for pattern in _MEDIA)


def has_control(text: str) -> bool:
    """Whether it holds something like a control token, a placeholder for media included."""
    if any(pattern.search(text) for pattern in _ANY) or "<<SYS>>" in text or "<</SYS>>" in text:
        return True
    return "|>" in text and bool(_CLOSED.search(text))

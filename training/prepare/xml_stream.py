"""Articles cut out of XML files of any size, without parsing them.

PubMed's files hold thirty thousand articles, a PMC file one, a collection many. Cutting at the tags is some twenty
times as fast as a streaming parser, needs no more memory than the largest article, and leaves behind the document type
declaration, and with it every entity that it declares. Each article is then parsed by a worker.
"""

import re
from collections.abc import Iterator
from typing import IO

_OPENING = re.compile(rb"<(PubmedArticle|article)(?=[\s>])")
_BLOCK = 2**20


def articles(content: IO[bytes], largest: int) -> Iterator[bytes | None]:
    """The bytes of each ``<article>`` or ``<PubmedArticle>``; None for one of more than ``largest`` bytes.

    An article that the file breaks off in, and a file that has none, come as they are: parsing them fails, which counts
    them.
    """
    buffer, at, found = b"", 0, False
    opening: re.Match[bytes] | None = None
    searched = 0
    while True:
        if opening is None and (opening := _OPENING.search(buffer, at)):
            at = searched = opening.start()
            found = True
        if opening is not None:
            closing = b"</" + opening[1] + b">"
            end = buffer.find(closing, searched)
            if end >= 0:
                end += len(closing)
                yield buffer[at:end] if end - at <= largest else None
                at, opening = end, None
                continue
            searched = max(at, len(buffer) - len(closing))
        elif len(buffer) - at > 32:
            at = len(buffer) - 32  # a tag may begin in this block and end in the next
        kept = buffer[at:]
        if opening is not None and len(kept) > largest:
            # Only the end is looked for from here on; the length stays above the limit.
            kept = kept[: largest + 1] + kept[-32:] if len(kept) > largest + 33 else kept
        searched = max(0, min(searched - at, len(kept) - 32))
        block = content.read(_BLOCK)
        if not block:
            if opening is not None or (not found and kept.strip()):
                yield kept[:largest]
            return
        buffer, at = kept + block, 0

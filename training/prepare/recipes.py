"""Known data sets, by the names that ``medassist data prepare`` takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A data set on the Hugging Face hub.

    Attributes:
        path: its repository.
        columns: those that make a document.
        split: the split that is read; our own splits are made from it.
        about: one line for the help.
    """

    path: str
    columns: tuple[str, ...]
    split: str
    about: str


KNOWN = {
    "tinystories": Known("roneneldan/TinyStories", ("text",), "train", "short stories in a child's words"),
    "pubmed-abstracts": Known("japhba/pubmed_simple", ("abstract",), "train", "abstracts of PubMed"),
}

"""Where a run's text comes from: a directory made by ``medassist data prepare``, or a corpus rendered into its own.

Both are a tokenizer and folders of shards. The run keeps the tokenizer; a prepared directory stays where it is.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from modeling import registry
from modeling.tokenizers import ASSISTANT, END_OF_TURN, train_bpe
from training import shards
from training.corpus import Phrasing, Renderer, encode_conversation, read_evaluation, read_facts, resolve
from training.data import NoText, Windows
from training.progress import bar
from training.recipe import Recipe


@dataclass(frozen=True)
class Dataset:
    """Text that is ready to be trained on.

    Attributes:
        tokenizer: a Hugging Face fast tokenizer.
        tokenizer_dir: where it lies.
        train, held_out: folders of shards.
        fingerprint: what identifies the text of both, and the tokenizer.
    """

    tokenizer: Any
    tokenizer_dir: Path
    train: Path
    held_out: Path
    fingerprint: str

    def windows(self, recipe: Recipe, verify: bool = True) -> tuple[Windows, Windows | None]:
        """Windows of the training text and of the held-out text, which may be too little for any.

        Args:
            verify: false where another rank does what ``data.verify`` asks for.

        Raises:
            ValueError: a shard is missing or damaged, or the recipe's settings do not fit the text.
        """
        t, span = recipe.train, None
        if t.loss_on == "answers":
            span = tuple(self.tokenizer.convert_tokens_to_ids(token) for token in (ASSISTANT, END_OF_TURN))
            if None in span or self.tokenizer.unk_token_id in span:
                raise ValueError(
                    f"train.loss_on 'answers' needs a tokenizer with {ASSISTANT} and {END_OF_TURN}: set it to 'all'"
                )

        def of(folder: Path, seed: int) -> Windows:
            opened = shards.open_shards(folder, self.tokenizer_dir, verify=verify and recipe.data.verify)
            windows = Windows(opened, t.window, seed, recipe.data.windows == "stream", span)
            if span and not any(bool((shard.tokens == span[0]).any()) for shard in opened):
                raise ValueError(
                    f"train.loss_on 'answers': no document in {folder} has any {ASSISTANT}; set it to 'all'"
                )
            return windows

        train = of(self.train, t.seed)
        try:
            return train, of(self.held_out, 0) if self.held_out.is_dir() else None
        except NoText:
            return train, None

    def sources(self, recipe: Recipe) -> list[str]:
        """Names of what the text was made of, without their folders."""
        if not recipe.data.path:
            return [Path(recipe.corpus.facts).parent.name]
        manifest = self.train.parent / "manifest.json"  # not where shards were made by other programs
        made = json.loads(manifest.read_text()) if manifest.is_file() else {}
        return [Path(str(source["name"])).name for source in made.get("sources", ())]

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Split -> its manifest."""
        return {
            name: shards.read_manifest(folder)
            for name, folder in (("train", self.train), ("held_out", self.held_out))
            if folder.is_dir()
        }


def open_dataset(recipe: Recipe, out: Path, console: Console, main: bool = True) -> Dataset:
    """The recipe's text.

    Args:
        out: the run's directory; a corpus is rendered into it, unless that has been done.
        main: whether this rank is the one that writes.

    Raises:
        ValueError: what the recipe names is missing or unfinished.
    """
    if recipe.data.path:
        source = Path(recipe.data.path)
        train, held_out = source / "train", source / "validation"
        if not (source / "tokenizer/tokenizer.json").is_file():
            raise ValueError(
                f"data.path: {source} is not a directory made by `medassist data prepare` (it has no tokenizer/)"
            )
        if main:
            shutil.copytree(source / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
        tokenizer_dir = source / "tokenizer"
    else:
        if main:
            _render(recipe, out, console)
        train, held_out, tokenizer_dir = out / "data/train", out / "data/held_out", out / "tokenizer"
    folders = [folder for folder in (train, held_out) if folder.is_dir()]
    marks = "+".join(shards.fingerprint(folder) for folder in (folders or [train]))
    return Dataset(AutoTokenizer.from_pretrained(tokenizer_dir), tokenizer_dir, train, held_out, marks)


def _rendered_from(recipe: Recipe) -> dict[str, Any]:
    """What a rendered corpus and its tokenizer depend on."""
    facts = resolve(recipe.corpus.facts)
    files = {"corpus.facts": facts, "corpus.evaluation": resolve(recipe.corpus.evaluation),
             "phrasing.toml": facts.with_name("phrasing.toml")}  # fmt: skip
    config = registry.get(recipe.model.architecture).presets()[recipe.model.preset](**recipe.model.changes)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} | {
        "corpus.renders": recipe.corpus.renders,
        "train.seed": recipe.train.seed,
        "tokenizer.vocab_size": recipe.tokenizer.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _source(out: Path) -> dict[str, Any]:
    path = out / "data/source.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def is_rendered(recipe: Recipe, out: Path) -> bool:
    """Whether ``out`` has the recipe's corpus, rendered from what the files now hold."""
    finished = (out / "data/held_out/manifest.json").is_file()
    return not recipe.data.path and finished and _source(out) == _rendered_from(recipe)


def _forget_another(recipe: Recipe, out: Path) -> None:
    """Makes room for the recipe's corpus where ``out`` has another one.

    Raises:
        ValueError: a run has been trained on that one.
    """
    was, now = _source(out), _rendered_from(recipe)
    if was and was != now:
        names = ", ".join(name for name in now if was.get(name) != now[name])
        if any((out / "checkpoints").glob("step-*")):
            raise ValueError(
                f"{out} was trained on another corpus ({names} changed since): restore it, or choose another --out"
            )
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
    if was != now:
        shutil.rmtree(out / "data", ignore_errors=True)
        (out / "data").mkdir(parents=True)
        shards.write_json(out / "data/source.json", now)


def _render(recipe: Recipe, out: Path, console: Console) -> None:
    """Trains the tokenizer and tokenises the rendered corpus, unless ``out`` has both."""
    for path in (recipe.corpus.facts, recipe.corpus.evaluation):
        if not resolve(path).is_file():
            raise ValueError(f"corpus: there is no file {resolve(path)}")
    facts = read_facts(resolve(recipe.corpus.facts))
    _forget_another(recipe, out)
    renderer = Renderer(facts, Phrasing(resolve(recipe.corpus.facts).with_name("phrasing.toml")))
    if not (out / "tokenizer/tokenizer.json").exists():
        console.print(
            f"[bold]Tokenizer[/] byte-level BPE of {recipe.tokenizer.vocab_size} tokens from {len(facts)} facts"
        )
        config = registry.get(recipe.model.architecture).presets()[recipe.model.preset](**recipe.model.changes)
        texts = (text for f in facts for text in (f.answer, *(q.lower() for q in (*f.questions, *f.aliases))))
        partial = out / "tokenizer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        train_bpe(texts, recipe.tokenizer.vocab_size, config.max_position_embeddings).save_pretrained(partial)
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        partial.rename(out / "tokenizer")
    vocab_size = len(AutoTokenizer.from_pretrained(out / "tokenizer"))
    answers = {fact.id: fact.answer for fact in facts}
    held_out = (
        [{"role": "user", "content": question}, {"role": "assistant", "content": answers[fact_id]}]
        for question, fact_id in read_evaluation(resolve(recipe.corpus.evaluation), facts)
    )
    rendered = renderer.conversations(recipe.corpus.renders, recipe.train.seed)
    total = len(facts) * recipe.corpus.renders
    for name, documents, count in (("train", rendered, total), ("held_out", held_out, None)):
        if not (out / "data" / name / "manifest.json").exists():
            with bar(console) as progress:
                task = progress.add_task(f"Tokenising {name}", total=count, info="")
                manifest = shards.tokenize(
                    documents,
                    out / "data" / name,
                    out / "tokenizer",
                    conversation_encoder,
                    vocab_size,
                    progress=lambda n, p=progress, b=task: p.advance(b, n),  # type: ignore[misc]
                )
            console.print(f"  {name}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")


def conversation_encoder(tokenizer_dir: Path) -> Callable[[Any], list[int]]:
    """The encoder of conversations for :func:`training.shards.tokenize`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return lambda messages: encode_conversation(tokenizer, messages)

"""A data set of many short documents and a recipe of a tiny model, without dropout, that trains on it."""

from pathlib import Path

from modeling.tokenizers import train_bpe
from training.shards import describe_shard, tokenizer_hash, write_manifest, write_shard

STEPS = 50
RECIPE = """
data:
  path: DATA
model:
  preset: tiny
train:
  steps: 50
  window: 32
  batch_size: 2
  accumulation: 2
  threads: 1
  log_every: 1
  eval_every: 25
  checkpoint_every: 20
  keep: 9
optimizer:
  warmup: 5
"""
LINES = [f"The {size} {thing} is {colour}." for size in ("big", "small", "old", "new", "round")
         for thing in ("brick", "leaf", "sun", "sea") for colour in ("red", "green", "yellow", "blue")]  # fmt: skip


def prepared(folder: Path) -> Path:
    """A data set of many short documents, as ``medassist data prepare`` leaves it."""
    tokenizer = train_bpe(LINES, 300, 1024)
    tokenizer.save_pretrained(folder / "tokenizer")
    sha256 = tokenizer_hash(folder / "tokenizer/tokenizer.json")
    for name, lines in (("train", LINES[8:]), ("validation", LINES[:8])):
        documents = [[*tokenizer.encode(line), tokenizer.eos_token_id] for line in lines]
        (folder / name).mkdir()
        write_shard(folder / name / "00000.shard", documents, len(tokenizer), sha256)
        entry = describe_shard(folder / name / "00000.shard", sum(map(len, documents)), len(documents))
        write_manifest(folder / name, [entry], len(tokenizer), sha256, sum(map(len, lines)))
    return folder


def write_recipe(folder: Path) -> Path:
    """Makes the data set in ``folder/lines``, and a recipe beside it."""
    path = folder / "lines.yaml"
    path.write_text(RECIPE.replace("DATA", str(prepared(folder / "lines"))))
    return path

"""What preparing a data set costs beside tokenising alone, and the memory that it takes.

``python -m loadtest.preparation`` prepares real corpora (cleaning, duplicates, tokens, shards) and, in the same rounds,
gives their texts to the bare tokenizers on one thread: ``tokenizers`` (``encode_batch``, and ``encode_batch_fast``,
which leaves out offsets) and ``tiktoken``. Figures are tokens of all documents read, those dropped later included, per
CPU-second: user and system time of all processes, medians over the rounds. Start-up is what a corpus of one document
costs (Python, transformers, which writes the tokenizer's folder, and the workers); it does not grow with the
corpus, and figures are given with and without it. Without it there are none (-) where what is left is below
``RESOLUTION`` CPU-seconds: start-up varies by some tenths of a second, and the difference would be mostly that.

Memory is the peak of the sum over all processes of their proportional set sizes, sampled twice a second.
"""

import argparse
import gzip
import json
import os
import random
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from loadtest.engine_benchmark import environment
from loadtest.engine_report import aligned

ONE = {"text": "One document, long enough to be kept, for what a run costs before it has done anything. " * 2}
RESOLUTION = 1.0
BARE = ("encode_batch", "encode_batch_fast", "tiktoken")


def run(command: list[str]) -> tuple[float, float]:
    """Runs a command and returns the CPU-seconds of it and its children, and its peak memory in MiB.

    Raises:
        RuntimeError: it failed; the message has what it printed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.5)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{shlex.join(command)}\n{said.read()[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak / 2**20


def memory(pid: int) -> int:
    """Bytes that a process and its descendants take, shared pages counted once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        pass  # one of them has just ended
    return total


def prepare(source: Path, columns: str, tokenizer: str) -> tuple[float, float]:
    """Prepares a corpus with the command, and returns what :func:`run` does."""
    with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as folder:
        command = [sys.executable, "-m", "clients.cli", "data", "prepare", str(source), "--columns", columns]
        return run([*command, "--tokenizer", tokenizer, "--out", f"{folder}/out"])


def bare(kind: str, source: Path, columns: list[str], tokenizer: str) -> tuple[int, float]:
    """Tokens, and CPU-seconds of nothing but encoding, on one thread."""
    os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
    texts = []
    with gzip.open(source, "rt") as lines:
        for row in map(json.loads, lines):
            values = (row[column] for column in columns)
            texts.append("\n\n".join(v if isinstance(v, str) else "\n\n".join(v) for v in values))
    tokens = 0
    if kind == "tiktoken":
        from modeling.tiktoken_encodings import load_encoding

        encoding = load_encoding(tokenizer)
        start = time.process_time()
        for text in texts:
            tokens += len(encoding.encode_ordinary(text))
        return tokens, time.process_time() - start
    from tokenizers import Tokenizer

    if Path(tokenizer).is_dir():
        fast = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    else:
        from modeling.tiktoken_encodings import from_encoding

        fast = from_encoding(tokenizer, 1024).backend_tokenizer
    encode = getattr(fast, kind)
    start = time.process_time()
    for first in range(0, len(texts), 500):
        tokens += sum(len(e.ids) for e in encode(texts[first : first + 500], add_special_tokens=False))
    return tokens, time.process_time() - start


def bare_apart(kind: str, source: Path, columns: str, tokenizer: str) -> tuple[int, float]:
    """:func:`bare` in a process of its own."""
    command = [sys.executable, "-m", "loadtest.preparation", "--bare", kind, str(source), columns, tokenizer]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, seconds = done.stdout.split()[-2:]
    return int(tokens), float(seconds)


def measure(source: Path, columns: str, tokenizer: str, rounds: int, one: Path) -> dict[str, Any]:
    """Medians over interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in (*BARE, "prepare", "start")}
    tokens = 0
    for number in range(rounds):
        for kind in BARE if not Path(tokenizer).is_dir() else BARE[:2]:
            tokens, seconds = bare_apart(kind, source, columns, tokenizer)
            found[kind].append(seconds)
        found["prepare"].append(prepare(source, columns, tokenizer)[0])
        found["start"].append(prepare(one, "text", tokenizer)[0])
        print(f"{source.name} {tokenizer}: round {number + 1} of {rounds}", file=sys.stderr)
    return {"tokens": tokens} | {name: statistics.median(x) if x else None for name, x in found.items()}


def generate(path: Path, medquad: Path, size: int) -> None:
    """Writes JSON lines of ``size`` bytes: documents of 40 to 700 words, strung together from phrases of MedQuAD."""
    with gzip.open(medquad, "rt") as lines:
        answers = [json.loads(line)["answer"].replace("\n", " ") for line in lines]
    sentences = [s for answer in answers for s in answer.split(". ") if 20 < len(s) < 400]
    words = [word for sentence in sentences for word in sentence.split()]
    chosen = random.Random(1)
    written = 0
    with path.open("w") as out:
        while written < size:
            length = chosen.randint(40, 700)
            phrases = chosen.sample(range(len(words) - 12), length // 6)
            text = " ".join(" ".join(words[at : at + chosen.randint(2, 10)]) for at in phrases)
            written += out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def row(corpus: str, tokenizer: str, m: dict[str, Any]) -> list[str]:
    def rate(seconds: float | None) -> str:
        return f"{m['tokens'] / seconds:,.0f}" if seconds else "-"

    steady = m["prepare"] - m["start"]
    told = steady if steady >= RESOLUTION else None

    def ratio(kind: str) -> str:
        return f"{m[kind] / told:.2f}" if told and m[kind] else "-"

    return [
        corpus, tokenizer, f"{m['tokens']:,}", *(rate(m[kind]) for kind in BARE), rate(told), rate(m["prepare"]),
        f"{m['start']:.1f}", *(ratio(kind) for kind in BARE), f"{m['encode_batch'] / m['prepare']:.2f}",
    ]  # fmt: skip


HEAD = [
    "corpus", "tokenizer", "tokens", "encode_batch", "encode_batch_fast", "tiktoken", "prepare", "with start-up",
    "start-up, s", "/ encode_batch", "/ fast", "/ tiktoken", "with start-up / encode_batch",
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of medquad.jsonl.gz and pubmedqa.jsonl.gz")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--large", type=int, default=0, help="bytes of a generated corpus, prepared once for its memory"
    )
    parser.add_argument("--report", type=Path)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--bare"]:  # the process that `bare_apart` starts
        _, kind, corpus, columns, tokenizer = arguments
        print(*bare(kind, Path(corpus), columns.split(","), tokenizer))
        return 0
    options = parser.parse_args(arguments)
    facts = environment("python -m " + shlex.join(["loadtest.preparation", *arguments]))
    text = ["# Preparing data", aligned([["", ""], *([name, value] for name, value in facts.items())])]
    with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as folder:
        one = Path(folder) / "one.jsonl"
        one.write_text(json.dumps(ONE) + "\n")
        rows = [HEAD]
        medquad = options.data / "medquad.jsonl.gz"
        subprocess.run(
            [sys.executable, "-m", "clients.cli", "data", "prepare", str(medquad), "--columns", "question,answer",
             "--out", f"{folder}/trained"], check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        corpora = (("MedQuAD", medquad, "question,answer"),
                   ("PubMedQA", options.data / "pubmedqa.jsonl.gz", "contexts,answer"))  # fmt: skip
        for corpus, source, columns in corpora:
            for name, tokenizer in (("gpt2", "gpt2"), ("trained, 4,096", f"{folder}/trained/tokenizer")):
                rows.append(row(corpus, name, measure(source, columns, tokenizer, options.rounds, one)))
        text += ["Tokens per CPU-second.", aligned(rows)]
        if options.large:
            large, out = Path(folder) / "large.jsonl", Path(folder) / "large"
            generate(large, medquad, options.large)
            start = time.monotonic()
            command = [sys.executable, "-m", "clients.cli", "data", "prepare", str(large), "--tokenizer",
                       "gpt2", "--out", str(out)]  # fmt: skip
            seconds, peak = run(command)
            wall = time.monotonic() - start
            manifest = json.loads((out / "manifest.json").read_text())
            text.append(
                f"A generated corpus of {large.stat().st_size / 1e9:.2f} GB, "
                f"{manifest['documents']['read']:,} documents, {manifest['tokens']:,} tokens kept (gpt2): "
                f"peak memory {peak:,.0f} MiB, {seconds:,.0f} CPU-seconds in {wall:,.0f} seconds, "
                f"{seconds / wall:.2f} cores busy."
            )
    text.append(__doc__ or "")
    print("\n\n".join(text))
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text("\n\n".join(text).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

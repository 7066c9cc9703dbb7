"""Checkpoint directories: the one format that training writes and Hugging Face and vLLM read.

config.json  model.safetensors  tokenizer.json  tokenizer_config.json  chat_template.jinja
generation_config.json  fingerprint.json
"""

import shutil
from pathlib import Path
from typing import Any

from modeling import fingerprint


def write(directory: Path, model: Any, tokenizer: Any, generation: dict[str, Any] | None = None) -> None:
    """Writes a checkpoint directory, atomically: either the whole of it appears under its name, or nothing.

    Args:
        directory: replaced if it is there.
        model: a ``PreTrainedModel`` of the registry; converted to float32, in which it is written.
        tokenizer: a Hugging Face fast tokenizer with a chat template.
        generation: sampling defaults, such as ``{"temperature": 0.2, "top_p": 0.95}``.

    Raises:
        OSError: there is no room, or no permission; ``directory`` is as it was.
    """
    from transformers import GenerationConfig

    temporary = directory.with_name(directory.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.float()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    ends = [end for end in (tokenizer.eos_token_id, tokenizer.pad_token_id) if end is not None]
    model.generation_config = GenerationConfig(
        eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id, do_sample=bool(generation), **(generation or {})
    )
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        fingerprint.record(model, temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if "(os error " in str(error):  # safetensors and tokenizers, written in Rust, raise their own
            raise OSError(f"{directory} could not be written: {error}") from error
        raise
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    temporary.rename(directory)
    shutil.rmtree(old, ignore_errors=True)

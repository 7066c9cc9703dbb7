"""What a model in training makes of fixed prompts."""

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """Continues each prompt, and leaves the run as it was: its mode, and every random state.

    One prompt after the other, without padding and without a cache, so that every architecture does it alike. Under
    FSDP all ranks must call it, with the same arguments.

    Args:
        model: a causal language model of the registry.
        tokenizer: its fast tokenizer.
        prompts: texts, tokenised as they are.
        max_tokens: tokens to make at most; a continuation ends before at the tokenizer's end token.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.

    Returns:
        The continuations, without special tokens.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)  # its own: the global ones are the run's
    device = next(model.parameters()).device
    longest = model.config.max_position_embeddings
    try:
        texts = []
        for prompt in prompts:
            ids = list(tokenizer(prompt)["input_ids"]) or [tokenizer.eos_token_id]
            made: list[int] = []
            for _ in range(max_tokens):
                context = torch.tensor([(ids + made)[-longest:]], device=device)  # (1, T)
                logits = model(context, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()  # (V,)
                if temperature:
                    weights = (logits / temperature).softmax(-1)
                    token = int(torch.multinomial(weights, 1, generator=generator))
                else:
                    token = int(logits.argmax())
                if token == tokenizer.eos_token_id:
                    break
                made.append(token)
            texts.append(tokenizer.decode(made, skip_special_tokens=True))
    finally:
        model.train(was_training)
    return texts

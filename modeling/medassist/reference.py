"""What MedAssistGPT is checked against: Llama (per-head layout) and the published program's logits (flattened)."""

from typing import Any

from modeling.reference import Golden, Reference


def twin(model: Any) -> Any:
    """``LlamaForCausalLM`` with the same weights; it has no flattened layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    if c.rope_layout != "per_head":
        return None
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
            max_position_embeddings=c.max_position_embeddings, rope_parameters=c.rope_parameters,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=c.eos_token_id,
        )
    )  # fmt: skip
    llama.load_state_dict(model.state_dict())
    return llama


PUBLISHED = Golden(
    config=dict(
        vocab_size=11, d_model=16, n_heads=4, gqa_groups=2, max_len=8, d_ff=24, eps=1e-5, dropout_p=0.0, blocks=2,
    ),
    token_ids=(1, 5, 2, 9, 3),
    logits={
        1: (1.479633, 1.646784, 1.599095, 1.342788, 0.911301, 0.360926, -0.236536, -0.803139, -1.264965, -1.561763,
            -1.654814),
        4: (2.203747, 1.899746, 1.347904, 0.620214, -0.188389, -0.972414, -1.629579, -2.074148, -2.248124, -2.128810,
            -1.731771),
    },
    gains=r".*rms.*\.weight",
)  # fmt: skip

REFERENCE = Reference(
    variants=(
        {"rope_layout": "per_head"},
        {"rope_layout": "flattened"},
        # Neither vLLM's attention nor, in bfloat16, its rotary kernel for CPUs takes heads of this size.
        {"rope_layout": "per_head", "head_dim": 56},
    ),
    golden=(PUBLISHED,),
    twin=twin,
)

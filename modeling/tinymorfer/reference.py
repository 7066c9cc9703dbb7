"""What Tinymorfer is checked against: a GPT-2 whose blocks have the same LayerNorm twice."""

from typing import Any

from modeling.reference import Reference


def twin(model: Any) -> Any:
    """``GPT2LMHeadModel`` with the same weights, each block's LayerNorm in both places, and exact GELU."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.max_position_embeddings, n_embd=c.hidden_size,
            n_inner=c.intermediate_size, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
            layer_norm_epsilon=c.layer_norm_eps, activation_function="gelu", tie_word_embeddings=True,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=c.eos_token_id,
        )
    )  # fmt: skip
    ours = model.state_dict()
    theirs = {
        "transformer.wte.weight": ours["model.embed_tokens.weight"],
        "transformer.wpe.weight": ours["model.embed_positions.weight"],
        "transformer.ln_f.weight": ours["model.norm.weight"],
        "transformer.ln_f.bias": ours["model.norm.bias"],
        "lm_head.weight": ours["model.embed_tokens.weight"],
    }
    for n in range(c.num_hidden_layers):
        our, their = f"model.layers.{n}", f"transformer.h.{n}"
        theirs |= {
            f"{their}.attn.c_attn.weight": ours[f"{our}.self_attn.qkv_proj.weight"].T,  # GPT-2 stores (in, out)
            f"{their}.attn.c_attn.bias": torch.zeros(3 * c.hidden_size),
            f"{their}.attn.c_proj.weight": ours[f"{our}.self_attn.o_proj.weight"].T,
            f"{their}.attn.c_proj.bias": ours[f"{our}.self_attn.o_proj.bias"],
            f"{their}.mlp.c_fc.weight": ours[f"{our}.mlp.up_proj.weight"].T,
            f"{their}.mlp.c_fc.bias": ours[f"{our}.mlp.up_proj.bias"],
            f"{their}.mlp.c_proj.weight": ours[f"{our}.mlp.down_proj.weight"].T,
            f"{their}.mlp.c_proj.bias": ours[f"{our}.mlp.down_proj.bias"],
        }
        for name in ("ln_1", "ln_2"):
            theirs |= {f"{their}.{name}.{part}": ours[f"{our}.norm.{part}"] for part in ("weight", "bias")}
    gpt2.load_state_dict(theirs)
    return gpt2


REFERENCE = Reference(twin=twin)

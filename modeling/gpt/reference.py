"""What GPT is checked against: GPT-2 with identity output projections, and the published program's logits."""

from typing import Any

from modeling.reference import Golden, Reference


def twin(model: Any) -> Any:
    """``GPT2LMHeadModel`` with the same weights and identity output projections; under a full mask if not causal."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.max_position_embeddings, n_embd=c.hidden_size,
            n_inner=c.intermediate_size, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
            layer_norm_epsilon=c.layer_norm_eps, activation_function="gelu_new", tie_word_embeddings=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=c.eos_token_id,
        )
    )  # fmt: skip
    ours = model.state_dict()
    theirs = {
        "transformer.wte.weight": ours["model.embed_tokens.weight"],
        "transformer.wpe.weight": ours["model.embed_positions.weight"],
        "transformer.ln_f.weight": ours["model.norm.weight"],
        "transformer.ln_f.bias": ours["model.norm.bias"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    for n in range(c.num_hidden_layers):
        our, their = f"model.layers.{n}", f"transformer.h.{n}"
        qkv = [ours[f"{our}.self_attn.{name}_proj.weight"] for name in "qkv"]
        theirs |= {
            f"{their}.attn.c_attn.weight": torch.cat(qkv).T,  # GPT-2 stores matrices as (in, out)
            f"{their}.attn.c_attn.bias": torch.zeros(3 * c.hidden_size),
            f"{their}.attn.c_proj.weight": torch.eye(c.hidden_size),
            f"{their}.attn.c_proj.bias": torch.zeros(c.hidden_size),
            f"{their}.mlp.c_fc.weight": ours[f"{our}.mlp.up_proj.weight"].T,
            f"{their}.mlp.c_fc.bias": ours[f"{our}.mlp.up_proj.bias"],
            f"{their}.mlp.c_proj.weight": ours[f"{our}.mlp.down_proj.weight"].T,
            f"{their}.mlp.c_proj.bias": ours[f"{our}.mlp.down_proj.bias"],
        }
        for norm, name in (("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")):
            theirs |= {f"{their}.{name}.{part}": ours[f"{our}.{norm}.{part}"] for part in ("weight", "bias")}
    gpt2.load_state_dict(theirs)
    return gpt2 if c.causal else _unmasked(gpt2)


def _unmasked(gpt2: Any) -> Any:
    """GPT-2 under a four-dimensional mask in which every token sees every other."""
    import torch

    class Bidirectional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt2 = gpt2

        def forward(self, input_ids: Any) -> Any:
            rows, length = input_ids.shape
            mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
            return self.gpt2(input_ids, attention_mask=mask, use_cache=False)

    return Bidirectional()


# The published program builds a causal mask and drops it: its models are bidirectional.
PUBLISHED_CONFIG = dict(
    vocab_size=11, context_length=8, emb_dim=12, n_layers=2, n_heads=3, drop_rate=0.1, qkv_bias=False
)
GAINS = r".*norm.*\.scale"

BIDIRECTIONAL = Golden(
    config=PUBLISHED_CONFIG,
    token_ids=(1, 5, 2, 9, 3),
    logits={
        1: (0.419455, 0.271692, -0.565643, 0.032661, 0.548069, -0.327559, -0.371821, 0.527623, 0.087925, -0.574932,
            0.221427),
        4: (-0.204915, -0.093626, 0.255293, -0.043738, -0.231759, 0.168439, 0.141127, -0.244375, -0.009637, 0.249561,
            -0.124643),
    },
    gains=GAINS,
)  # fmt: skip
CAUSAL = Golden(
    config=PUBLISHED_CONFIG,
    token_ids=(1, 5, 2, 9, 3),
    logits={
        1: (0.298373, 0.211901, -0.412389, 0.009992, 0.407013, -0.228992, -0.283801, 0.381695, 0.078423, -0.423892,
            0.149659),
        4: (-0.203742, -0.093494, 0.254048, -0.043201, -0.230803, 0.167388, 0.140737, -0.243114, -0.009926, 0.248455,
            -0.123759),
    },
    gains=GAINS,
    settings={"causal": True},
)  # fmt: skip

REFERENCE = Reference(variants=({"causal": True}, {"causal": False}), golden=(BIDIRECTIONAL, CAUSAL), twin=twin)

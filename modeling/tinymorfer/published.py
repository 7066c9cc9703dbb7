"""What is published of Tinymorfer cannot be a language model: one block on continuous vectors.

Checkpoints of the language model that this project makes of it are in our own layout, which every architecture has.
"""

from modeling.importing.layout import Layout

LAYOUT = Layout(
    signature=r"attn\.qkv\.weight",
    tensors=lambda config: {},
    sizes=lambda shapes, known: {},
    model_types=("tinymorfer", "TinymorferForCausalLM"),
    refused={
        r"attn\.qkv\.weight": "this is Tinymorfer's published block: one layer on continuous vectors, without an "
        "embedding, positions and a head, so it cannot be a language model. A recipe with "
        'architecture = "tinymorfer" trains one that has embedding, positions and head around such blocks'
    },
)

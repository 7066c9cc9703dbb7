"""GPT: learned positions, LayerNorm and GELU, without an output projection after attention; causal or bidirectional."""

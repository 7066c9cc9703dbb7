"""Tinymorfer: one LayerNorm shared by both sublayers of a block, and a fused qkv projection."""

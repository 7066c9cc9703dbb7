"""Layers that two or more architectures share unchanged."""

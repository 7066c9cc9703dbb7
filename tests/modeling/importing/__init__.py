"""Importing foreign checkpoints."""

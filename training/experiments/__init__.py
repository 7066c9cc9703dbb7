"""Measurements of training methods, each a program that writes its report."""

"""Whole models: patterns of residual sublayers, and how they write text."""

"""Flax modules, thin over ops."""

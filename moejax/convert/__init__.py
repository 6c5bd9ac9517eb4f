"""Weights from Hugging Face into moejax models, one short mapping a family."""

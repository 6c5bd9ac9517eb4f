"""moejax: sparse experts and state space models in JAX, from a config file to a trained model."""

__version__ = "0.1.0"

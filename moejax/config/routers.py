"""The routers that a config may name, and what it may ask of each."""

import typing


class Router(typing.NamedTuple):
    """What a config may ask of a router."""

    losses: dict[str, float]  # the auxiliary losses that it can train with, and their weights by default
    top_k: int = 1  # experts a token by default
    fixed: bool = False  # top_k can't be chosen
    causal: bool = True  # False: what a token gets depends on later tokens
    sparse: bool = True  # False: every expert runs on every token, or on mixtures of tokens; nothing is dispatched
    dropless: bool = False  # dispatch=auto drops nothing, as in its paper


_ANY = dict.fromkeys(("balance", "importance", "z", "sequence"), 0.0)

# Weights: Switch section 2.2; GShard as GLaM; Shazeer 2017 appendix; DeepSeek-V2 section 3.1.2; DeepSeek-V3 section 4.2
ROUTERS = {
    "soft": Router(losses={"importance": 0.0, "z": 0.0}, fixed=True, sparse=False),
    "noisy_top_k": Router(top_k=2, losses=_ANY | {"importance": 0.1, "load": 0.1}),
    "switch": Router(losses=_ANY | {"balance": 0.01}, fixed=True),
    "gshard": Router(top_k=2, losses=_ANY | {"balance": 0.01}, fixed=True),
    "top_k": Router(losses=_ANY | {"balance": 0.01}),
    "group_limited": Router(top_k=2, losses=_ANY | {"balance": 0.003, "device": 0.05, "communication": 0.02}),
    "sigmoid_bias": Router(
        top_k=2, losses=_ANY | {"sequence": 1e-4, "device": 0.0, "communication": 0.0}, dropless=True
    ),
    "expert_choice": Router(losses={"z": 0.0}, causal=False),
    "hash": Router(losses={}, fixed=True, dropless=True),
    "sinkhorn": Router(losses={"z": 0.0}),
    "soft_moe": Router(losses={}, fixed=True, causal=False, sparse=False),
    "relu": Router(losses={"relu": 1.0, "z": 0.0}, dropless=True),  # its weight is the adaptive coefficient
    "label": Router(losses={}, fixed=True, dropless=True),
}

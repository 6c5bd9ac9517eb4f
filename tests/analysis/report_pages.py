"""Runs' folders made by hand for the report, and its page as a reader sees it."""

import html.parser
import json
import math
import pathlib
import re

import numpy as np

from moejax import config
from moejax.config import plain

NUM_LAYERS, NUM_EXPERTS = 2, 4
ATTACK = "<script>alert(1)</script>"
BASELINES = {"uniform": 8.3178, "unigram": 6.41, "bigram": 4.43}


def make_rows(num_steps: int, *, moe: bool = True, validate_every: int = 10) -> list[dict]:
    rng = np.random.default_rng(num_steps)
    rows = []
    for step in range(1, num_steps + 1):
        loss = 4.0 + 4.0 * math.exp(-step / 10) + 0.1 * rng.normal()
        row = {
            "step": step,
            "tokens": 1000 * step - step % 7,
            "loss": loss,
            "ema_loss": loss + 0.05,
            "learning_rate": 1e-3 / step,
            "grad_norm": 30.0 / step,
            "tokens_per_second": float(rng.uniform(1900, 2100)),
            "seconds": 1.5,
        }
        if moe:
            load = rng.dirichlet(np.full(NUM_EXPERTS, 20.0), NUM_LAYERS)
            row |= {
                "balance_loss": float(NUM_EXPERTS * (load**2).sum(1).mean()),
                "load": load.tolist(),
                "dropped": [0.25 / step] * NUM_LAYERS,
                "router_entropy": [1.2, 1.3],
            }
        if step % validate_every == 0:
            row["validation_loss"] = loss + 0.02
        rows.append(row)
    return rows


def make_run(
    folder: pathlib.Path, rows: list[dict], *, evaluation: bool = True, samples: tuple[dict, ...] = (), seed: int = 0
) -> pathlib.Path:
    settings = config.Config()
    settings.training.seed = seed
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(plain.to_dict(settings)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluation:
        result = {
            "step": rows[-1]["step"],
            "loss": 3.912,
            "perplexity": math.exp(3.912),
            "bits_per_byte": 1.534,
            "tokens": 61234,
            "documents": 501,
            "baselines": BASELINES,
        }
        (folder / "eval.json").write_text(json.dumps(result))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


class Page(html.parser.HTMLParser):
    """The page's ids, references, visible text, and what a browser would fetch."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self._pieces: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self._pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
            if name in ("href", "xlink:href", "src", "srcset", "data"):
                if (value or "").startswith("#"):
                    self.references.add((value or "")[1:])
                elif not (value or "").startswith("data:"):
                    self.fetched.append(value or "")

    def handle_data(self, data):
        self._pieces.append(data)


def first_result(output: pathlib.Path) -> dict:
    """The numbers of the page's first run."""
    return json.loads(output.with_suffix(".json").read_text())["runs"][0]

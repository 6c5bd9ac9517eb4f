"""Self-contained HTML pages from the templates beside this file."""

import pathlib
from typing import Any

import jinja2

from moejax.analysis import words


def render(template: str, **content: Any) -> str:
    """The page; what its template names and `content` lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in words.FILTERS:
        environment.filters[name] = getattr(words, name)
    return environment.get_template(template).render(**content)

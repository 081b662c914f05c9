"""Text from the jinja templates of a back end."""

from __future__ import annotations

import functools
from typing import Any

import jinja2


def render(package: str, template: str, **values: Any) -> str:
    """`template` of the folder `templates` of a package, filled in; a value that is missing is an error."""
    return _environment(package).get_template(template).render(**values)


@functools.cache
def _environment(package: str) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )

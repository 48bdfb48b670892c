"""Render the gallery's page: one file of HTML that holds its style and its script.

A browser runs this script and no other one: the page's policy names its hash, and so does the header of a server that
shows run folders. The template escapes every value.
"""

from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SCRIPTS = ("cards.js", "choose.js", "compare.js", "large.js", "keys.js")  # one script, in this order


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _script() -> str:
    return "".join(map(_read, SCRIPTS))


def source_of(text: str) -> str:
    """Return a script or a style as a content security policy names it."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


@cache
def script_source() -> str:
    """Return the gallery's script as a content security policy names it."""
    return source_of(_script())


@cache
def policy() -> str:
    """Return the page's content security policy: its own style and script, and media of the folder it lies in."""
    files = "'self' file:"
    return (
        f"default-src 'none'; media-src {files}; img-src {files} data:; style-src {source_of(_read('gallery.css'))}; "
        f"script-src {script_source()}; base-uri 'none'; form-action 'none'"
    )


@cache
def template_in(folder: Path, name: str) -> Any:
    """Return a template in a folder. It escapes every value, and refuses one that is missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(**facts: Any) -> str:
    """Return the page as text."""
    from markupsafe import Markup

    style, script = Markup(_read("gallery.css")), Markup(_script())  # noqa: S704
    return template_in(FOLDER, "gallery.html").render(policy=policy(), style=style, script=script, **facts)

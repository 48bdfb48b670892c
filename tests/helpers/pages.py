"""What a reader sees of markdown and HTML, and which tags a page has."""

from html.parser import HTMLParser

from markdown_it import MarkdownIt

from pusa.system.text import NOTHING

RENDERER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown_texts(markdown: str) -> list[list[str]]:
    """Return for each paragraph, item or cell the pieces of text that a page shows.

    Links, pictures, code, HTML and emphasis are refused, except `**names**` of ours.
    """
    found = []
    for block in RENDERER.parse(markdown):
        assert block.type not in ("html_block", "fence", "code_block", "heading_open", "hr"), block
        if block.type == "inline":
            kinds = {token.type for token in block.children if (token.type, token.content) != ("html_inline", NOTHING)}
            assert kinds <= {"text", "strong_open", "strong_close"}, block.content
            found.append([token.content for token in block.children if token.type == "text" and token.content])
    return found


def shown(markdown: str) -> list[str]:
    """Return the whole text of each paragraph, item or cell."""
    return ["".join(texts) for texts in shown_texts(markdown)]


class Page(HTMLParser):
    """The start tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, name: str) -> list[dict[str, str | None]]:
        """Return the attributes of each tag of a name."""
        return [attributes for tag, attributes in self.tags if tag == name]

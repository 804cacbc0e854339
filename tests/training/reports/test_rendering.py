"""Text of others in templates: it stays text in HTML and in Markdown."""

from html.parser import HTMLParser

import pytest

from exo_fast.training.reports.rendering import page, plain, render

TEXTS = (
    "</script><script>x</script><img src=x onerror=x> & \"quoted\" 'so'",
    "a | b || c",
    "&lt;i&gt; &amp; &copy",
    "back\\slash \\| \\\\ \\<i>",
    "*a* _b_ **c** `d` [e](f) ![g](h) # i ~~j~~ <i>k</i> <https://l>",
    "two\n\nlines\n# and a heading",
)


class Parsed(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_text_in_a_markdown_table(text: str) -> None:
    markdown_it = pytest.importorskip("markdown_it", reason="pip install markdown-it-py")
    markdown = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    parsed = Parsed(markdown.render(f"| {plain(text)} |\n|---|\n"))
    assert parsed.tags == {"table", "thead", "tr", "th"}
    assert parsed.text.strip() == " ".join(text.split())


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_text_in_html(text: str) -> None:
    stage = {"name": text, "section": text}
    body = render("recipe.html.j2", version=text, seconds=[[text]], variables=[], stages=[stage])
    parsed = Parsed(page(text, body).decode())
    shell = {"html", "head", "meta", "title", "style", "body", "h1", "script"}
    assert parsed.tags == shell | {"p", "nav", "a", "div", "table", "thead", "tr", "th", "td", "section", "h2"}
    assert parsed.text.count(text) == 7

"""A reply's markdown as lines for the terminal, block by block, with every word of it.

Link definitions, images and HTML stay text, an address is shown behind its link's text, nothing becomes a hyperlink.
A list item without text, such as the answer "23.", stays text as well, and so does an empty heading or quote.
Code is highlighted in the terminal's own palette, without a background, and its lines are not wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, ListItem, Markdown, TableElement
from rich.segment import Segment
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from koala_local.engine.text_stream import plain

# The terminal's own palette and no background: readable on light and dark.
_THEME = Theme(
    {
        "markdown.code": "bold cyan",
        "markdown.code_block": "none",
        "markdown.link": "underline",
        "markdown.link_url": "cyan",
    }
)
_CODE_THEME = ANSISyntaxTheme(
    {
        ("Comment",): Style(dim=True, italic=True),
        ("Keyword",): Style(color="magenta"),
        ("Operator", "Word"): Style(color="magenta"),
        ("Name", "Function"): Style(color="blue", bold=True),
        ("Name", "Class"): Style(color="blue", bold=True),
        ("Name", "Builtin"): Style(color="cyan"),
        ("Name", "Tag"): Style(color="magenta"),
        ("Literal", "String"): Style(color="green"),
        ("Literal", "Number"): Style(color="cyan"),
        ("Generic", "Deleted"): Style(color="red"),
        ("Generic", "Inserted"): Style(color="green"),
    }
)
_PIPE = re.compile(r"(?<!\\)\|")

Line = list[Segment]


class _Parser(MarkdownIt):
    """Markdown without what would vanish when rendered: that stays text, so every word of a reply is shown."""

    def __init__(self) -> None:
        super().__init__("commonmark")
        self.enable(["strikethrough", "table"]).disable(["html_block", "html_inline", "image", "reference"])

    def normalizeLink(self, url: str) -> str:
        return url

    def normalizeLinkText(self, link: str) -> str:
        return link  # decoding "%1B" would make an escape of it


_PARSER = _Parser()


class _Code(CodeBlock):
    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _Code:
        block = cls("", "")
        block.token = token
        return block

    token: Token

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n").join(_code_lines(self.token))


class _Heading(Heading):
    LEVEL_ALIGN = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Item(ListItem):
    """A list item with its number as the model wrote it: "007." or "7)", not the next one."""

    mark = ""

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _Item:
        item = cls()
        item.mark = _mark(token)
        return item

    def render_number(self, console: Console, options: ConsoleOptions, number: int, last_number: int) -> RenderResult:
        mark = f" {self.mark.rjust(len(str(last_number)) + 1)} "
        inner = options.update(width=options.max_width - len(mark))
        style = console.get_style("markdown.item.number", default="none")
        for n, line in enumerate(console.render_lines(self.elements, inner, style=self.style)):
            yield Segment(" " * len(mark) if n else mark, style)
            yield from line
            yield Segment.line()


class _Table(TableElement):
    """A table whose words are never cut: where they do not fit side by side, rows are lines of text."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heads = [self.header.row] if self.header and self.header.row else []
        rows = [[cell.content for cell in row.cells] for row in (*heads, *(self.body.rows if self.body else ()))]
        columns = list(zip(*rows, strict=True))
        least = [max(cell_len(word) for cell in column for word in ("", *cell.plain.split())) for column in columns]
        wanted = [max(cell_len(cell.plain) for cell in column) for column in columns]
        room = options.max_width - 3 * len(columns) - 1  # cells' padding, and what rich draws between and beside them
        if sum(least) > room:
            yield from (Text(" | ").join(row) for row in rows)
            return
        for table in super().__rich_console__(console, options):
            if isinstance(table, Table) and sum(wanted) > room:
                share = (room - sum(least)) / (sum(wanted) - sum(least))
                for column, low, high in zip(table.columns, least, wanted, strict=True):
                    column.width = low + int(share * (high - low))
            yield table


class _Markdown(Markdown):
    """Parsed markdown, to be rendered."""

    elements = Markdown.elements | {
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
        "list_item_open": _Item,
        "table_open": _Table,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = tokens


@dataclass(frozen=True, slots=True)
class Block:
    """A top-level block, or one item of a top-level list."""

    tokens: list[Token]
    source: list[str]
    start: int  # its first line
    after_blank: bool

    @property
    def kind(self) -> str:
        return self.tokens[0].type

    @property
    def settled(self) -> int:
        """How many of its lines stay as they are whatever is added: those of code that are complete."""
        return 1 + self.tokens[0].content.count("\n") if self.kind == "fence" else 0


def blocks(source: str) -> list[Block]:
    """The blocks of `source`. More text can change the last one only, so long as its last line is decided."""
    groups: list[tuple[int, list[Token]]] = []
    for token in _PARSER.parse(source):
        _show_links_and_line_ends(token)
        if token.level == 0 and token.nesting >= 0 and token.map:
            groups.append((token.map[0], []))
        groups[-1][1].append(token)
    groups = [item for start, tokens in groups for item in _items(start, tokens)]
    lines = source.split("\n")
    return [
        Block(tokens, lines[start:end], start, start > 0 and not lines[start - 1].strip())
        for (start, tokens), (end, _) in pairwise([*groups, (len(lines), [])])
    ]


def _items(start: int, tokens: list[Token]) -> Iterator[tuple[int, list[Token]]]:
    """A list as lists of one item each; any other block as it is."""
    first, last = tokens[0], tokens[-1]
    places = [i for i, token in enumerate(tokens) if token.type == "list_item_open" and token.level == 1]
    if not places:
        yield start, tokens
    for place, end in pairwise([*places, len(tokens) - 1]):
        item = tokens[place]
        head = first.copy(attrs={})  # else an item would be indented by the number that its list starts with
        yield item.map[0] if item.map else start, [head, *tokens[place:end], last]


def _show_links_and_line_ends(token: Token) -> None:
    """A title becomes part of the address that is shown, an address alone is shown once, a new line is one."""
    token.children = [child for child in token.children or [] if child.markup != "autolink"]
    for child in token.children:
        if child.type == "softbreak":
            child.type = "hardbreak"
        elif child.attrs.get("title"):
            child.attrs["href"] = f'{child.attrs["href"]} "{child.attrs["title"]}"'


def _code_lines(token: Token) -> list[Text]:
    """Highlighted code, one Text a line, between its fences as far as they were written."""
    code = token.content.expandtabs(4)
    count = code.count("\n") + (not code.endswith("\n") and code != "")
    language = (token.info.split() or ["text"])[0]
    text = Syntax("", language, theme=_CODE_THEME).highlight(code)
    if text.plain.rstrip("\n") != code.rstrip("\n"):
        text = Text(code)  # a lexer that does not give back what it was given
    lines = list(text.split("\n", allow_blank=True))[:count]
    if not token.markup or not token.map:
        return lines
    closed = token.map[1] - token.map[0] > count + 1
    opening, closing = (Text.assemble((token.markup + end, "dim")) for end in (token.info, ""))
    return [opening, *lines, *[closing] * closed]


def _mark(item: Token) -> str:
    return item.info + item.markup


def _is_empty(token: Token, following: Token) -> bool:
    """Whether `token` begins something that has only a mark, and would be drawn as nothing."""
    if token.type == "heading_open":
        return not following.content
    return token.type in ("list_item_open", "blockquote_open") and following.nesting < 0


def _fits(block: Block, width: int) -> bool:
    """Whether rendering `block` keeps its words: not where it nests too deep, has cells beyond its columns, or a part
    of it is empty."""
    marks = [len(_mark(token)) for token in block.tokens if token.type == "list_item_open"]
    step = max([4, *(2 + mark // 2 for mark in marks)])  # a list is two levels, and as wide as its numbers
    if max(token.level for token in block.tokens) * step + 12 > width:
        return False
    if any(_is_empty(*pair) for pair in pairwise(block.tokens)):
        return False
    columns = sum(token.type == "th_open" for token in block.tokens)
    return not columns or all(len(_PIPE.findall(line.strip().strip("|"))) < columns for line in block.source)


def render(block: Block, console: Console, width: int, skip: int = 0) -> list[Line]:
    """The lines of `block`, at most `width` cells each. Those of a code block are as long as they are, and the first
    `skip` of them are left out."""
    with console.use_theme(_THEME):
        if block.kind == "fence":
            return [_clean(line.render(console, end="")) for line in _code_lines(block.tokens[0])[skip:]]
        text = Text("\n".join(block.source), overflow="fold")
        renderable = _Markdown(block.tokens) if _fits(block, width) else text
        options = console.options.update(width=width, height=None)
        lines = [_clean(line) for line in console.render_lines(renderable, options, pad=False)]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        del lines[0]
    return lines


def _clean(line: Iterable[Segment]) -> Line:
    """A line without padding, and without what parsing made of escaped or encoded characters."""
    kept = [Segment(plain(text), style) for text, style, control in line if not control]
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style)
    return list(Segment.simplify(kept))

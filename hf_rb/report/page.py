"""Puts panels together and writes them, as HTML by a template and as Markdown."""

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hf_rb.report.blocks import Block, Figure, Heading, Table, Text, Tokens, Word
from hf_rb.report.panels import PANELS, environment, overview
from hf_rb.report.sources import Source, read_source
from hf_rb.utils.optional import import_optional


__all__ = ["Report", "make_report", "write_report"]

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """
    Attributes:
        title (`str`): What it is about.
        panels (`dict[str, list[Block]]`): Blocks of every panel that has something to show, by its title.
    """

    title: str
    panels: dict[str, list[Block]]

    def html(self) -> str:
        """Returns the page, which refers to nothing outside itself."""
        templates = Environment(
            loader=PackageLoader("hf_rb.report", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        templates.filters.update(data_uri=_data_uri, word=_word)
        kinds = {kind: kind.__name__ for kind in (Heading, Text, Table, Figure, Tokens)}
        panels = {title: [(kinds[type(block)], block) for block in blocks] for title, blocks in self.panels.items()}
        return templates.get_template("template.html.jinja").render(title=self.title, panels=panels)

    def markdown(self) -> str:
        """Returns the same without the drawings."""
        parts = [f"# {_inline(self.title)}"]
        for title, blocks in self.panels.items():
            parts += [f"## {title}", *filter(None, map(_markdown, blocks))]
        return "\n\n".join(parts) + "\n"


def make_report(sources: Sequence[Source]) -> Report:
    """
    Asks every panel what it has to show of the sources. One that has nothing to show is left out with a warning.

    Raises:
        ValueError: None of the sources has anything that a report could show.
        ImportError: matplotlib is missing.
    """
    panels = [import_module(f"hf_rb.report.panels.{name}") for name in PANELS]
    empty = [source for source in sources if not any(panel.shows(source) for panel in panels)]
    if empty:
        message = (
            f"There is nothing to report on in {', '.join(source.name for source in empty)}: no training log "
            "(trainer_state.json), no token samples, no completions and no JSON of `hf-rb quantize`, `eval` or "
            "`router-report`. Give the `output_dir` of a run, or what such a verb wrote with `--out`."
        )
        if len(empty) == len(sources):
            raise ValueError(message)
        logger.warning(f"{message} The report is about the others.")
        sources = [source for source in sources if source not in empty]
    matplotlib = import_optional("matplotlib", "A report")
    named = len(sources) > 1
    shown = {overview.TITLE: _built(overview, sources, named)}
    with matplotlib.rc_context({"text.parse_math": False}):  # a name with dollars is no formula
        for panel in panels:
            if found := list(filter(panel.shows, sources)):
                shown[panel.TITLE] = _built(panel, found, named)
    shown[environment.TITLE] = environment.build(sources, named)
    return Report(", ".join(source.name for source in sources), shown)


def _built(panel: ModuleType, sources: Sequence[Source], named: bool) -> list[Block]:
    try:
        return panel.build(sources, named)
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:  # a file of ours by its keys, and not by what is in it
        names = ", ".join(source.name for source in sources)
        raise ValueError(
            f"The panel {panel.TITLE!r} cannot read what it found in {names} ({error!r}): was it written by another "
            "version, or changed by hand? Remove the file, or report on the others alone."
        ) from error


def write_report(paths: Sequence[str | Path], destination: str | Path) -> tuple[Path, Path]:
    """
    Writes a report.

    Args:
        paths (`Sequence[str]`):
            Folders of runs and models, and JSON files; see [`read_source`].
        destination (`str` or `Path`):
            HTML file to write. The Markdown has the same name.

    Returns:
        `tuple[Path, Path]`: HTML and Markdown.

    Raises:
        FileNotFoundError, ValueError, ImportError: As [`read_source`] and [`make_report`].
    """
    sources, destination = [read_source(path) for path in paths], Path(destination)
    if len({source.name for source in sources}) < len(sources):
        for source, path in zip(sources, paths, strict=True):
            source.name = str(path)
    report = make_report(sources)
    markdown = destination.with_suffix(".md")
    destination.write_text(report.html(), encoding="utf-8")
    markdown.write_text(report.markdown(), encoding="utf-8")
    return destination, markdown


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _word(word: Word, hue: int) -> Markup:
    shown = escape(word.text.replace("\n", "⏎\n"))
    if word.shade is None:
        return shown
    kind = Markup(' class="d"') if word.dropped else ""
    style = f"background:hsl({hue} 85% {96 - 36 * word.shade:.0f}%)"
    return Markup('<span{} style="{}" title="{}">{}</span>').format(kind, style, word.note, shown)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"### {_inline(text)}"
        case Text(text):
            return _inline(text)
        case Figure(_, caption):
            return f"*Drawing in the HTML file: {_inline(caption)}*"
        case Table(headers, rows, caption, left):
            lines = [headers, ["---"] * left + ["---:"] * (len(headers) - left), *rows]
            table = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
            return f"{_inline(caption)}\n\n{table}" if caption else table
        case Tokens(parts, _, marked):
            return "\n\n".join([marked, *map(_sequences, parts, parts.values())]) if marked else ""


def _cell(text: str) -> str:
    return _inline(" ".join(text.split()).replace("|", "\\|"))


def _inline(text: str) -> str:
    """Text that is neither HTML nor an image, which a viewer would fetch."""
    return text.replace("<", "&lt;").replace("![", "!\\[")


def _sequences(when: str, sequences: Sequence[Sequence[Word]]) -> str:
    # As code: what a model writes may look like Markdown.
    code = ["    " + _plain(words).rstrip("\n").replace("\n", "\n    ") for words in sequences]
    return "\n\n".join([f"#### Sequences {when}", *code])


def _plain(words: Sequence[Word]) -> str:
    """Tokens as text: those that are struck out in double brackets, neighbours in the same ones."""
    return "".join(f"⟦{word.text}⟧" if word.dropped else word.text for word in words).replace("⟧⟦", "")

"""
The report on a run or a model: one HTML file that refers to nothing outside itself, and the same as Markdown.

A panel is one module of `panels`; [`panels.PANELS`] is the list that a new one enters.
"""

from hf_rb.report.blocks import Block, Figure, Heading, Table, Text, Tokens
from hf_rb.report.page import Report, make_report, write_report
from hf_rb.report.sources import Source, read_source


__all__ = [
    "Block",
    "Figure",
    "Heading",
    "Report",
    "Source",
    "Table",
    "Text",
    "Tokens",
    "make_report",
    "read_source",
    "write_report",
]

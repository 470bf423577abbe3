"""The methods of hf_rb and their papers: the one table that trainers, quantizers and cards read."""

from dataclasses import dataclass
from typing import Literal


__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A published method.

    Args:
        key (`str`):
            Short name: the recipe folder, the card's file name, the Hub tag.
        name (`str`):
            Name as the paper writes it.
        kind (`"trainer"` or `"quantizer"`):
            What implements it. A checkpoint of a quantizer loads only after `import hf_rb`.
        paper_id (`str`):
            arXiv identifier.
        title (`str`):
            Title of the paper.
        authors (`tuple[str, ...]`):
            Authors in the paper's order.
        summary (`str`):
            What it does, in one sentence.
    """

    key: str
    name: str
    kind: Literal["trainer", "quantizer"]
    paper_id: str
    title: str
    authors: tuple[str, ...]
    summary: str

    @property
    def paper_url(self) -> str:
        return f"https://huggingface.co/papers/{self.paper_id}"

    @property
    def citation(self) -> str:
        """BibTeX entry."""
        year = f"20{self.paper_id[:2]}"
        return "\n".join(
            (
                f"@misc{{{self.key}{year},",
                f"    title         = {{{self.title}}},",
                f"    author        = {{{' and '.join(self.authors)}}},",
                f"    year          = {{{year}}},",
                f"    eprint        = {{{self.paper_id}}},",
                "    archivePrefix = {arXiv},",
                f"    url           = {{{self.paper_url}}},",
                "}",
            )
        )

    @property
    def paper(self) -> dict[str, str]:
        """The form of the `_paper` attribute of TRL's trainers."""
        return {"title": self.title, "id": self.paper_id, "citation": self.citation}


METHODS = {
    method.key: method
    for method in (
        Method(
            key="profit",
            name="ProFit",
            kind="trainer",
            paper_id="2601.09195",
            title="ProFit: Leveraging High-Value Signals in SFT via Probability-Guided Token Selection",
            authors=("Tao Liu", "Taiqiang Wu", "Runming Yang", "Shaoning Sun", "Junjie Wang", "Yujiu Yang"),
            summary="Supervised fine-tuning that takes no gradient from target tokens to which the model being trained "
            "gives a probability of at most a threshold.",
        ),
        Method(
            key="ptqtp",
            name="PTQTP",
            kind="quantizer",
            paper_id="2509.16989",
            title="PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models",
            authors=(
                "He Xiao",
                "Runming Yang",
                "Qingyao Yang",
                "Wendong Xu",
                "Zhen Li",
                "Yupeng Su",
                "Zhengwu Liu",
                "Hongxia Yang",
                "Ngai Wong",
            ),
            summary="Post-training quantization, without calibration data, of every group of 128 weights to a sum of two "
            "ternary planes, each with its own scale.",
        ),
    )
}

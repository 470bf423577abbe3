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
        kind (`"trainer"`, `"quantizer"`, `"model"` or `"weights"`):
            What implements it. A checkpoint of a quantizer or of a model class loads only after `import hf_rb`.
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
    kind: Literal["trainer", "quantizer", "model", "weights"]
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
            key="akl",
            name="AKL",
            kind="trainer",
            paper_id="2404.02657",
            title="Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
            authors=("Taiqiang Wu", "Chaofan Tao", "Jiahao Wang", "Runming Yang", "Zhe Zhao", "Ngai Wong"),
            summary="Distillation that weighs forward and reverse KL at every token by where student and teacher "
            "differ: among the teacher's most probable tokens or in its tail.",
        ),
        Method(
            key="calibadv",
            name="CalibAdv",
            kind="trainer",
            paper_id="2604.18235",
            title="Negative Advantages Is a Double-Edged Sword: Calibrating advantages in GRPO for Search Agents",
            authors=(
                "Jiayi Wu",
                "Ruobing Xie",
                "Zeqian Huang",
                "Lei Jiang",
                "Can Xu",
                "Kangyang Luo",
                "Bochen Lin",
                "Ming Gao",
                "Xiang Li",
            ),
            summary="GRPO for search agents that spares the searches of a wrong rollout which found what the best "
            "rollouts found, and balances the right and the wrong answers of a group.",
        ),
        Method(
            key="edas",
            name="EDAS",
            kind="trainer",
            paper_id="2605.17333",
            title="Leveraging Error Diversity in Group Rollouts for Reinforcement Learning",
            authors=(
                "Wenpu Liu",
                "Yuqi Xu",
                "Weichu Xie",
                "Yongfu Zhu",
                "Shuai Dong",
                "Ziyue Wang",
                "Wenqi Shao",
                "Xiaoying Zhang",
                "Tong Yang",
                "Nan Duan",
                "Jiaqi Wang",
            ),
            summary="GRPO that, among the wrong completions of a prompt, punishes the error which most of them share "
            "harder and rare errors less.",
        ),
        Method(
            key="gopd",
            name="G-OPD",
            kind="trainer",
            paper_id="2602.12125",
            title="Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
            authors=("Wenkai Yang", "Weijie Liu", "Ruobing Xie", "Kai Yang", "Saiyong Yang", "Yankai Lin"),
            summary="On-policy distillation with a reference model and a scale of the reward log(teacher / "
            "reference); above 1 (ExOPD) the student extrapolates past the teacher.",
        ),
        Method(
            key="hidden_align",
            name="Hidden-Align",
            kind="trainer",
            paper_id="2606.03234",
            title="Right Makes Might: Aligning Verified Hidden States Empowers RL Reasoning",
            authors=(
                "Ziyue Wang",
                "Aomufei Yuan",
                "Yongfu Zhu",
                "Shuai Dong",
                "Wenpu Liu",
                "Yiran Yao",
                "Weichu Xie",
                "Yuqi Xu",
                "Caoyuan Ma",
                "Wenqi Shao",
                "Xiaoying Zhang",
                "Nan Duan",
                "Jiaqi Wang",
            ),
            summary="An auxiliary loss beside GRPO that pulls together the hidden states from which the correct "
            "completions of a prompt go on to their answer; reconstructed from the abstract.",
        ),
        Method(
            key="hpd",
            name="HPD",
            kind="trainer",
            paper_id="2604.20244",
            title="Hybrid Policy Distillation for LLMs",
            authors=("Wenhong Zhu", "Ruobing Xie", "Rui Wang", "Pengfei Liu"),
            summary="Distillation on fixed text that also draws one token from the student at every position and "
            "lowers it where the student overrates it.",
        ),
        Method(
            key="interpolation",
            name="Model interpolation",
            kind="weights",
            paper_id="2510.10977",
            title="Revisiting Model Interpolation for Efficient Reasoning",
            authors=("Taiqiang Wu", "Runming Yang", "Tao Liu", "Jiahao Wang", "Ngai Wong"),
            summary="Every weight on the straight line between two models, such as an Instruct and a Thinking model, "
            "whose place on it sets how long the result thinks.",
        ),
        Method(
            key="llm_neo",
            name="LLM-Neo",
            kind="trainer",
            paper_id="2411.06839",
            title="LLM-Neo: Parameter Efficient Knowledge Distillation for Large Language Models",
            authors=(
                "Runming Yang",
                "Taiqiang Wu",
                "Jiahao Wang",
                "Pengfei Hu",
                "Yik-Chung Wu",
                "Ngai Wong",
                "Yujiu Yang",
            ),
            summary="Distillation into LoRA: the mean of cross-entropy and forward KL from a larger teacher, with "
            "only the adapters trained.",
        ),
        Method(
            key="loca",
            name="LoCa",
            kind="trainer",
            paper_id="2409.04778",
            title="LoCa: Logit Calibration for Knowledge Distillation",
            authors=("Runming Yang", "Taiqiang Wu", "Yujiu Yang"),
            summary="Distillation from a teacher that is calibrated wherever it prefers another token to the label, "
            "so that the label wins by a small margin.",
        ),
        Method(
            key="mpi",
            name="MPI",
            kind="model",
            paper_id="2606.12397",
            title="Redesign Mixture-of-Experts Routers with Manifold Power Iteration",
            authors=("Songhao Wu", "Ang Lv", "Ruobing Xie", "Yankai Lin"),
            summary="Routers of a mixture of experts whose rows take one step of power iteration with the gate "
            "matrix of their expert, and a fixed length, in every forward pass.",
        ),
        Method(
            key="profit",
            name="ProFit",
            kind="trainer",
            paper_id="2601.09195",
            title="ProFit: Leveraging High-Value Signals in SFT via Probability-Guided Token Selection",
            authors=("Tao Liu", "Taiqiang Wu", "Runming Yang", "Shaoning Sun", "Junjie Wang", "Yujiu Yang"),
            summary="Supervised fine-tuning that takes no gradient from target tokens to which the model being "
            "trained gives a probability of at most a threshold.",
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
            summary="Post-training quantization, without calibration data, of every group of 128 weights to a sum of "
            "two ternary planes, each with its own scale.",
        ),
        Method(
            key="d2quant",
            name="D²Quant",
            kind="quantizer",
            paper_id="2602.02546",
            title="D²Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs",
            authors=(
                "Xianglong Yan",
                "Chengzhu Bao",
                "Zhiteng Li",
                "Tianao Zhang",
                "Shaoqiu Zhang",
                "Ruobing Xie",
                "Xingwu Sun",
                "Yulun Zhang",
            ),
            summary="Quantization to 2 or 3 bits, with a second, absorbed scale for the columns of down projections "
            "and, where it is calibrated on text, a correction of the mean shift behind attention.",
        ),
        Method(
            key="recover",
            name="Quantization Meets Reasoning",
            kind="trainer",
            paper_id="2501.03035",
            title="Quantization Meets Reasoning: Exploring LLM Low-Bit Quantization Degradation for Mathematical "
            "Reasoning",
            authors=(
                "Zhen Li",
                "Yupeng Su",
                "Runming Yang",
                "Congkai Xie",
                "Zheng Wang",
                "Zhongwei Xie",
                "Ngai Wong",
                "Hongxia Yang",
            ),
            summary="A small repair set from the problems that quantization has broken; here the full-precision "
            "model's own solutions, towards which an adapter on the packed weights is trained.",
        ),
        Method(
            key="shadow_ft",
            name="Shadow-FT",
            kind="weights",
            paper_id="2505.12716",
            title="Shadow-FT: Tuning Instruct Model via Training on Paired Base Model",
            authors=(
                "Taiqiang Wu",
                "Runming Yang",
                "Jiayi Li",
                "Pengfei Hu",
                "Yik-Chung Wu",
                "Ngai Wong",
                "Yujiu Yang",
            ),
            summary="Fine-tunes the Base model and adds what its weights have learned to those of the Instruct model.",
        ),
        Method(
            key="srar",
            name="SRaR",
            kind="trainer",
            paper_id="2605.17291",
            title="Step-wise Rubric Rewards for LLM Reasoning",
            authors=(
                "Weichu Xie",
                "Haozhe Zhao",
                "Wenpu Liu",
                "Yongfu Zhu",
                "Liang Chen",
                "Minghao Ye",
                "Zirong Chen",
                "Yuqi Xu",
                "Shuai Dong",
                "Ziyue Wang",
                "Xinbo Xu",
                "Kean Shi",
                "Ruoyu Wu",
                "Xiaoying Zhang",
                "Wenqi Shao",
                "Baobao Chang",
                "Nan Duan",
                "Jiaqi Wang",
            ),
            summary="GRPO with a judge that finds the items of a rubric in the steps of a solution; steps better than "
            "the same step of the other completions gain, worse ones lose.",
        ),
        Method(
            key="timber",
            name="Timber",
            kind="weights",
            paper_id="2509.23595",
            title="Timber: Training-free Instruct Model Refining with Base via Effective Rank",
            authors=("Taiqiang Wu", "Runming Yang", "Tao Liu", "Jiahao Wang", "Zenan Xu", "Ngai Wong"),
            summary="Weakens, in every weight matrix of an Instruct model, the part of its difference from Base that "
            "lies behind the difference's effective rank; without training.",
        ),
    )
}

"""Rows of GRPO: shapers on given completions, some of them of an agent with a tool."""

import random
from functools import partial

import torch
import trl
from datasets import Dataset, IterableDataset
from described import Described, Row, batch, variants
from helpers.random_models import save_qwen3
from peft import LoraConfig

from hf_rb import GRPOConfig, GRPOTrainer, tiny
from hf_rb.advantages import CalibAdvShaper, EdasShaper, Shaped, SrarShaper, TokenShaper
from hf_rb.methods.registry import methods
from hf_rb.rl.agents.rewards import search_f1
from hf_rb.rl.rewards import exact_answer_reward


GROUP = 4
# Three groups a step, whose rollouts are shuffled over the micro-batches: in two processes the second straddles them.
BATCHES = {
    "whole": batch(12), "3 x 4": batch(3, 4), "6 x 2": batch(6, 2), "2 processes": batch(6), "2 processes x 3": batch(2, 3)
}  # fmt: skip
EXACT = {"correct_reward": "exact_answer_reward"}
EDAS = {"advantage_shapers": ["edas"], **EXACT}


def letters(completions, **kwargs):
    """A reward that sampled completions differ in."""
    return [float(len(set(completion[-1]["content"]))) for completion in completions]


OFF = {
    "plain": {},
    "adam, accumulation, two iterations": {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "shuffle_dataset": True,
    },
    "bf16, checkpointing, reference": {"bf16": True, "gradient_checkpointing": True, "beta": 0.1, "loss_type": "grpo"},
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "learning_rate": 1.0, "beta": 0.1},
}
SAMPLED = {"per_device_train_batch_size": 8, "max_steps": 4, "reward": letters, "max_completion_length": 8}
OFF = {name: SAMPLED | keys for name, keys in OFF.items()}


class Ramp(TokenShaper):
    """Weighs tokens by their place, and by how many rollouts of all processes are correct."""

    name = "ramp"

    def shape(self, ctx, advantages):
        share = sum(ctx.gather(ctx.correct[ctx.local].tolist())) / len(ctx.base)
        place = torch.arange(advantages.shape[1]) / 10
        return Shaped(advantages * (1 + share * place), columns={"rows": [ctx.local.start] * len(advantages)})


def judge(requests):
    """Verdicts that differ between rollouts and between their steps."""
    return [
        [
            {"id": 1, "satisfied": "7" in request.solution, "step": 1},
            {"id": 2, "satisfied": "12" in request.solution, "step": len(request.steps)},
        ]
        for request in requests
    ]


class Shelf:
    """An environment with a tool that finds one of three documents, or two."""

    def reset(self, **row):
        self.retrieved = {}

    def search(self, query: str) -> str:
        """
        Finds documents.

        Args:
            query: Letters of documents.
        """
        text = "\n".join(f"document {letter}" for letter in query if letter in "abc")
        self.retrieved[text] = [letter for letter in query if letter in "abc"]
        return text


# What our own shapers read beside the answers, and k for groups of four. One that reads no more has its row by its record.
READS = {
    "srar": {"judge": judge, "srar_step_pattern": "First|Then|Now|So"},
    "calibadv": {"calibadv_soft": False},
    "pass_at_k": {"pass_at_k_k": 2},
}
# Whether a shaper compares answers by mathematics, which an optional package does.
LEFT_OUT = ("edas_equivalence", "calibadv_soft")


def rows():
    """Every shaper as its record says, with every other choice of its flags, and several together."""
    for name, entry in methods("shaper").items():
        base = {"advantage_shapers": [name], **EXACT, **READS.get(name, {})}
        yield Row(name, base, (name,))
        for label, flags in variants(entry.method):
            if not flags.keys() & {*LEFT_OUT}:
                yield Row(f"{name}, {label}", base | flags, (name,), minor=True)
    unlike = EdasShaper(equivalent=lambda first, second: len(first) != len(second))
    yield Row("edas, equivalence", {**EXACT, "shapers": [unlike]}, ("edas",), group="equivalence")
    yield Row("edas, grpo loss", {**EDAS, "loss_type": "grpo", "edas_no_answer": "singleton"}, ("edas",))
    yield Row("tokens", {**EXACT, "shapers": [Ramp()]})
    both = [CalibAdvShaper(soft=False), SrarShaper(judge, step_pattern="First|Then|Now|So")]
    yield Row("answers balanced, steps judged", {**EXACT, "shapers": both}, ("calibadv", "srar"), group="several")
    agent = {
        "advantage_shapers": ["calibadv"],
        "reward": search_f1,
        "environment_factory": Shelf,
        "max_completion_length": 256,
        "max_tool_calling_iterations": 2,
    }
    yield Row("searches", agent, ("calibadv",), group="searches")
    yield Row("hidden-align", {**EXACT, "hidden_align_coef": 5.0}, ("hidden_align",))
    yield Row("both", {**EDAS, "hidden_align_coef": 5.0}, ("edas", "hidden_align"))
    warming = {
        "edas_warmup_steps": 3,
        "hidden_align_coef": 0.5,
        "log_completions": True,
        "num_completions_to_print": 1,
    }
    yield Row("both, warming up", EDAS | warming, ("edas", "hidden_align"))


def prompts(count=12):
    rows = tiny.load_dataset("math", config="prompt_only", size=count).to_list()
    return [{"prompt": row["prompt"], "answer": "7", "rubric": "<SUGGEST> 7\n<PITFALL> 12"} for row in rows]


def completion_of(prompt, index, tokenizer):
    """A completion that follows from the ids of the prompt and its place in the group: right, wrong, without an answer, or cut."""
    draw = random.Random(f"{prompt} {index}")
    words = " ".join(draw.choice("First Then Now So 12 + = 7".split()) for _ in range(draw.randrange(1, 9)))
    answer = draw.choice([" #### 7", " #### 7", " #### 12", " #### 12", " #### 5", ""])
    ids = tokenizer(words + answer)["input_ids"]
    return ids + [tokenizer.eos_token_id] * draw.randrange(2)


def turn_of(history, index, tokenizer):
    """A turn of an agent, which follows from all before it and, in the first, from its place in the group: a search, or an answer."""
    draw = random.Random(f"{history} {index}")
    texts = [
        f'<tool_call>\n{{"name": "search", "arguments": {{"query": "{query}"}}}}\n</tool_call>'
        for query in ("a", "b", "ab", "c")
    ]
    text = draw.choice([*texts, "#### 7", "So #### 7", "#### 5", "Then 12 #### 12"] if index is None else texts)
    return tokenizer(f"{'' if index is None else f'Rollout {index}. '}{text}<|im_end|>")["input_ids"]


class Injected(GRPOTrainer):
    """Takes the completions above in place of sampling any. Keeps the advantages of the last generation before and after the shapers."""

    kept = None

    def _shape(self, output, context):
        before = output["advantages"].clone()
        super()._shape(output, context)
        self.kept = (before, output["advantages"], context)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.environments is not None:
            # TRL asks for first turns of all rollouts, then for the next ones of those that called a tool.
            first = self.accelerator.process_index * len(prompt_ids)
            later = any("<tool_response>" in self.processing_class.decode(ids) for ids in prompt_ids)
            return [
                turn_of(ids, None if later else (first + row) % GROUP, self.processing_class)
                for row, ids in enumerate(prompt_ids)
            ], None
        first = self.accelerator.process_index * len(prompt_ids)
        ids = [
            completion_of(prompt, (first + row) % GROUP, self.processing_class)
            for row, prompt in enumerate(prompt_ids)
        ]
        return ids, None


class GRPO(Described):
    def save_models(self, folder):
        """A random policy."""
        save_qwen3(folder / "policy", initializer_range=0.05)

    def data(self):
        return Dataset.from_list(prompts())

    def make(self, trainer_class, config_class, config, objects):
        if config_class is GRPOConfig:
            config = {"answer_extractor": "hashes", **config}
        given = objects.get("rows") or prompts()
        return trainer_class(
            str(self.models / "policy"),
            objects.get("reward") or partial(exact_answer_reward, answer_extractor=tiny.extract_answer),
            config_class(
                **{"shuffle_dataset": False, "num_generations": GROUP, "max_completion_length": 24, **config}
            ),
            given if isinstance(given, Dataset | IterableDataset) else Dataset.from_list(given),
            peft_config=objects.get("peft_config"),
            **{key: objects[key] for key in ("shapers", "judge", "environment_factory") if key in objects},
        )


TRAINER = GRPO(
    "grpo", GRPOTrainer, GRPOConfig, trl.GRPOTrainer, trl.GRPOConfig, BATCHES, Injected, {row.name: row for row in rows()}, OFF,
    also=("reward",),
)  # fmt: skip

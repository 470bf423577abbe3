"""Short GRPO runs with given completions that the equivalence tests compare, in one process and in two."""

import random
import tempfile
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from helpers.random_models import save_qwen3
from helpers.seeded_runs import ARGUMENTS, logs_and_weights

from hf_rb import GRPOConfig, GRPOTrainer, tiny
from hf_rb.advantages import CalibAdvShaper, EdasShaper, Shaped, SrarShaper, TokenShaper
from hf_rb.rl.agents.rewards import search_f1
from hf_rb.rl.rewards import exact_answer_reward


STEPS = 2
GROUP = 4
ROLLOUTS = 12  # three groups a step: in two processes the second straddles them
EDAS = {"advantage_shapers": ["edas"], "correct_reward": "exact_answer_reward"}


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


CASES = {
    "edas": EDAS,
    "edas, equivalence": {
        "correct_reward": "exact_answer_reward",
        "shapers": [EdasShaper(equivalent=lambda first, second: len(first) != len(second))],
    },
    "edas, grpo loss": {**EDAS, "loss_type": "grpo", "edas_no_answer": "singleton"},
    "tokens": {"correct_reward": "exact_answer_reward", "shapers": [Ramp()]},
    "answers balanced, steps judged": {
        "correct_reward": "exact_answer_reward",
        "shapers": [CalibAdvShaper(soft=False), SrarShaper(judge, step_pattern="First|Then|Now|So")],
    },
    "searches": {
        "advantage_shapers": ["calibadv"],
        "reward": search_f1,
        "environment": Shelf,
        "max_completion_length": 256,
        "max_tool_calling_iterations": 2,
    },
    "hidden-align": {"correct_reward": "exact_answer_reward", "hidden_align_coef": 5.0},
    "both": {**EDAS, "hidden_align_coef": 5.0},
}


def save_models(folder):
    """A random policy."""
    save_qwen3(Path(folder, "policy"), initializer_range=0.05)


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


class Trainer(GRPOTrainer):
    """Takes the completions above in place of sampling any."""

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


def train(
    models,
    trainer_class=Trainer,
    config_class=GRPOConfig,
    peft=None,
    reward=None,
    shapers=None,
    environment=None,
    **config,
):
    """Trains the saved policy; returns what was logged at each step, the weights at the end, and the trainer."""
    ours = {} if shapers is None else {"shapers": shapers}
    if environment is not None:
        ours["environment_factory"] = environment
    if config_class is GRPOConfig:
        config = {"answer_extractor": "hashes", **config}
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            **{
                **ARGUMENTS,
                "output_dir": folder,
                "shuffle_dataset": False,
                "num_generations": GROUP,
                "max_completion_length": 24,
                "max_steps": STEPS,
                **config,
            }
        )
        trainer = trainer_class(
            str(Path(models, "policy")),
            reward or partial(exact_answer_reward, answer_extractor=tiny.extract_answer),
            args,
            Dataset.from_list(prompts()),
            peft_config=peft,
            **ours,
        )
        trainer.train()
    return *logs_and_weights(trainer), trainer


def two_processes(models, folder):
    """Every case on both processes, in half the batch."""
    results = {name: train(models, per_device_train_batch_size=6, **case)[:2] for name, case in CASES.items()}
    results["accumulated"] = train(
        models, per_device_train_batch_size=2, gradient_accumulation_steps=3, **CASES["both"]
    )[:2]
    return results

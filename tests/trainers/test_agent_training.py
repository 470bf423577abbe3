"""A policy that acts: the tiny teacher searches its fact base, and what CalibAdv and SRaR make of its rollouts reaches the loss."""

import json
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset

import hf_rb
from hf_rb import GRPOConfig, GRPOTrainer, tiny
from hf_rb.advantages.calibadv import model_runs
from hf_rb.rl.agents.rewards import is_tool_error, is_well_formed, search_f1
from hf_rb.rl.judges import Judge
from hf_rb.rl.rewards import exact_answer_reward


GROUP = 8


class Recorder(GRPOTrainer):
    """Keeps what the loss is given, and TRL's advantages before they are shaped."""

    def _shape(self, output, context):
        self.base, self.context = output["advantages"].clone(), context
        super()._shape(output, context)

    def _generate_and_score_completions(self, inputs):
        self.output = super()._generate_and_score_completions(inputs)
        return self.output


def arguments(folder, **fields):
    return GRPOConfig(
        str(folder),
        **{
            "per_device_train_batch_size": 4 * GROUP,
            "num_generations": GROUP,
            "max_steps": 1,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "answer_extractor": "hashes",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "seed": 0,
        }
        | fields,
    )


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def trained(trainer):
    """Trains and returns what was logged. A run in which no shaper acted is a failure, whatever else it is."""
    before = weights(trainer)
    trainer.train()
    logged = trainer.state.log_history[0]
    for shaper in trainer.shapers:
        assert logged[f"shaping/{shaper.name}/changed"] > 0, f"{shaper.name} did not act"
    assert not torch.equal(before, weights(trainer))
    return logged


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    pytest.importorskip("bm25s")
    # Questions that the tiny teacher answers in about two of five rollouts.
    towns = ("Ilford", "Bordale", "Tarford", "Orford")
    wanted = [f"In which town was the mayor of {town} born?" for town in towns]
    questions = tiny.load_dataset(config="tools").filter(lambda row: row["prompt"][0]["content"] in wanted)
    assert len(questions) == 4
    args = arguments(
        tmp_path_factory.mktemp("agent"),
        advantage_shapers=["calibadv"],
        environment="search",
        max_tool_calling_iterations=3,
        max_completion_length=200,
        temperature=0.6,
        log_completions=True,
    )
    trainer = Recorder(str(tiny.path("teacher")), search_f1, args=args, train_dataset=questions)
    return trainer, trained(trainer)


def test_the_agent_acts(searched):
    trainer, logged = searched
    rollouts = trainer.context.completions
    searches = [[message for message in rollout if message["role"] == "tool"] for rollout in rollouts]
    valid = [bool(found) and not any(map(is_tool_error, found)) for found in searches]
    assert sum(valid) / len(valid) >= 0.3
    assert logged["tools/call_frequency"] > 0.3 and logged["search/well_formed"] >= 0.3
    # What the tools return is the fact base's, and no token of it is trained on.
    assert all(message["content"].count("\n") <= 1 for found in searches for message in found)
    assert not trainer.output["advantages"][trainer.output["tool_mask"] == 0].any()


def test_some_group_is_mixed_and_its_advantages_are_calibrated(searched):
    trainer, logged = searched
    ctx, advantages, base = trainer.context, trainer.output["advantages"], trainer.base
    rewards = ctx.rewards_per_func[:, 0].view(-1, GROUP)
    mixed = (rewards.amax(1) >= 0.7) & (rewards.amin(1) == 0)
    assert mixed.any()
    assert not torch.equal(advantages, base[:, None] * ctx.mask)

    relieved = 0
    for row, (spans, rollout) in enumerate(zip(model_runs(ctx.mask), ctx.completions, strict=True)):
        steps = spans[:-1] if is_well_formed(rollout) else []
        for start, stop in steps:
            (value,) = advantages[row, start:stop].unique().tolist()  # one number a step
            if base[row] >= 0:
                assert value == pytest.approx(base[row].item(), abs=1e-6)
            else:
                assert base[row] - 1e-6 <= value <= 0
                relieved += value > base[row] + 1e-6
    assert relieved and logged["shaping/calibadv/steps_relieved"] > 0

    for group in mixed.nonzero().flatten().tolist():
        answers = [
            advantages[row, start:stop].sum().item()
            for row in range(group * GROUP, (group + 1) * GROUP)
            for start, stop in model_runs(ctx.mask[row : row + 1])[0][-1:]
            if ctx.completions[row][-1]["role"] == "assistant" and not ctx.completions[row][-1].get("tool_calls")
        ]
        assert sum(a for a in answers if a > 0) == pytest.approx(-sum(a for a in answers if a < 0), rel=1e-4)


def test_the_table_of_completions_shows_it(searched):
    trainer, _ = searched
    (path,) = Path(trainer.args.output_dir, "completions").glob("*.parquet")
    table = pandas.read_parquet(path)
    assert (table["shaped_advantage"] - table["advantage"]).abs().max() > 1e-3
    assert table["step_quality"].str.contains("1.00").any()


DATA = Path(hf_rb.__file__).parents[2] / "shared/data"

# What four rollouts of one question write, turn by turn: two good searches and the answer; a good and a useless one; none; the
# same one twice.
SONG, ALBUM = (
    "Nobody Loves You song John Lennon 1974 album",
    "Walls and Bridges Apple Records separation from Yoko Ono",
)
SCRIPT = [
    [SONG, ALBUM, "#### Walls and Bridges"],
    [SONG, "highway in Missouri between Route 13", "#### Imagine"],
    ["#### Imagine"],
    [SONG, SONG, "#### Imagine"],
]


class Scripted(Recorder):
    """Writes what `SCRIPT` says in place of what the model would. The tools, their results and the loss are real."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if len(prompt_ids) == len(SCRIPT):
            self.turns = [iter(turns) for turns in SCRIPT]
            self.active = list(range(len(SCRIPT)))
        texts = [next(self.turns[i]) for i in self.active]
        self.active = [i for i, text in zip(self.active, texts, strict=True) if not text.startswith("####")]
        calls = [
            text
            if text.startswith("####")
            else f'<tool_call>\n{{"name": "search", "arguments": {json.dumps({"query": text})}}}\n</tool_call>'
            for text in texts
        ]
        return [self.processing_class(f"{call}<|im_end|>")["input_ids"] for call in calls], None


def test_an_agent_over_passages_of_wikipedia(tmp_path):
    pytest.importorskip("bm25s")
    if not DATA.exists():
        pytest.skip("needs the multi-hop corpus")
    questions = Dataset.from_json(str(DATA / "multihop_questions.jsonl"), cache_dir=str(tmp_path)).select(range(1))
    args = arguments(
        tmp_path,
        advantage_shapers=["calibadv"],
        environment="search",
        environment_kwargs={"corpus": str(DATA / "multihop_passages.jsonl"), "top_k": 2},
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4000,
        model_init_kwargs={"max_position_embeddings": 8192},
    )
    trainer = Scripted(str(tiny.path("student")), search_f1, args=args, train_dataset=questions)
    logged = trained(trainer)

    ctx, advantages, base = trainer.context, trainer.output["advantages"], trainer.base.tolist()
    assert "Nobody Loves You was written by John Lennon" in ctx.prompts[0][0]["content"]  # asked by the environment
    assert ctx.rewards_per_func[:, 0].tolist() == [1, 0, 0, 0]
    found = {identifier for ids in ctx.environments[0].retrieved.values() for identifier in ids}
    assert {"p0002", "p0004"} <= found  # the gold passages
    values = [[advantages[row, start].item() for start, _ in spans] for row, spans in enumerate(model_runs(ctx.mask))]
    good, bad = base[0], base[1]
    assert values[0][:2] == [pytest.approx(good)] * 2
    assert values[1] == [0, pytest.approx(bad), pytest.approx(bad)]
    assert values[2] == [pytest.approx(bad)]
    assert values[3] == [0, pytest.approx(bad), pytest.approx(bad)]
    assert logged["shaping/calibadv/steps_relieved"] == pytest.approx(2 / 6)


def test_scores_of_a_rollout_func(tmp_path):
    """An agent loop of one's own: two searches and an answer, and the quality of the searches in a field."""

    def rollout(prompts, trainer):
        count = len(prompts)
        answers = trainer.processing_class([" #### 1" if i % 2 else " #### 2" for i in range(count)])["input_ids"]
        return {
            "prompt_ids": [[5, 6]] * count,
            "completion_ids": [[7, 8, 9, 10, 11, *answer] for answer in answers],
            "logprobs": None,
            "env_mask": [[1, 1, 0, 1, 0, *[1] * len(answer)] for answer in answers],
            "turn_scores": [[1.0, 0.25]] * count,
        }

    rows = tiny.load_dataset(config="prompt_only", size=4).map(lambda row: {"answer": "1"})
    args = arguments(tmp_path, advantage_shapers=["calibadv"], calibadv_step_field="turn_scores")
    trainer = Recorder(
        str(tiny.path("student")), exact_answer_reward_of_hashes, args=args, train_dataset=rows, rollout_func=rollout
    )
    trained(trainer)
    wrong = trainer.base < 0
    assert wrong.sum() == 2 * GROUP
    a = trainer.base[wrong]
    shaped = trainer.output["advantages"][wrong]
    assert not shaped[:, [2, 4]].any()
    assert torch.allclose(shaped[:, 0], 0 * a) and torch.allclose(shaped[:, 3], 0.75 * a)
    assert torch.allclose(shaped[:, 5], a)


def exact_answer_reward_of_hashes(completions, answer, **kwargs):
    return exact_answer_reward(completions, answer, answer_extractor=tiny.extract_answer)


def steps_trainer(folder, judge=None):
    args = arguments(
        folder,
        advantage_shapers=["srar"],
        correct_reward="exact_answer_reward_of_hashes",
        srar_judge=None if judge else "tiny",
        srar_step_pattern=r"(?m)(?:^|(?<=\. ))(?=[A-Z])",
        max_completion_length=96,
    )
    rows = tiny.load_dataset(config="rubric", size=4)
    return Recorder(
        str(tiny.path("student")), exact_answer_reward_of_hashes, args=args, train_dataset=rows, judge=judge
    )


def test_steps_are_judged_and_their_tokens_credited(tmp_path):
    trainer = steps_trainer(tmp_path)
    logged = trained(trainer)
    assert logged["shaping/srar/judged"] > 0 and logged["shaping/srar/judge_failed"] == 0
    assert logged["shaping/srar/judged"] % GROUP == 0 and logged["shaping/srar/steps_per_rollout"] > 1.5
    offsets = (trainer.output["advantages"] - trainer.base[:, None]) * trainer.context.mask
    tokenizer, checked = trainer.processing_class, 0
    for row in offsets.abs().sum(1).nonzero().flatten().tolist():
        ids = trainer.context.completion_ids[row]
        for t in (
            (offsets[row, 1 : len(ids)] - offsets[row, : len(ids) - 1]).abs().gt(1e-6).nonzero().flatten().tolist()
        ):
            # An offset changes where a sentence begins, to the token.
            before, after = tokenizer.decode(ids[: t + 1]), tokenizer.decode(ids[t + 1 :])
            assert before.endswith(".") and after[:2].strip().isupper(), (before, after)
            checked += 1
    assert checked


@pytest.mark.parametrize(
    "reply", ["[]]", json.dumps([{"id": 1, "satisfied": True, "step": 0, "note": "!"}]), None, ZeroDivisionError]
)
def test_training_goes_on_without_a_judge(tmp_path, reply):
    def ask(request):
        if reply is ZeroDivisionError:
            raise reply
        return reply

    trainer = steps_trainer(tmp_path, Judge(ask, retries=0))
    before = weights(trainer)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["shaping/srar/judge_failed"] == logged["shaping/srar/judged"] > 0
    assert logged["shaping/srar/changed"] == 0 and torch.isfinite(torch.tensor(float(logged["loss"])))
    assert not torch.equal(before, weights(trainer))

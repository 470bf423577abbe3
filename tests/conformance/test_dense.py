"""Losses, gradients and numbers in the logs by their formulas on all logits, one unpadded sequence at a time."""

from collections import Counter
from itertools import permutations
from math import comb

import pytest
import torch
from described import STEPS
from distillation_cases import completion_of, prompts
from gkd_cases import Injected, documents
from helpers.records import names_of
from test_conformance import OURS, ROWS, row_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb.methods.metrics import SHAPING_METRICS
from hf_rb.methods.registry import catalog
from hf_rb.objectives import adaptive_kl, forward_kl, jsd, loca_calibrate, reverse_kl
from hf_rb.objectives.hpd import hpd_loss, hpd_weights, inverse_cdf_sample
from hf_rb.ops.sequences import Sequences
from hf_rb.tiny import extract_answer
from hf_rb.trainers.common.distilling import dense_stats


DISTILLED = [
    key
    for key in ROWS  # of halves a step is a part of the rows; there the splits agree
    if key[0] in ("gkd", "distillation") and not row_of(key).group.startswith("nothing")
]


# Sequences of the first step


def given(one, row):
    """Yields ids, where the trained ones begin, labels (which may lie outside the teacher's vocabulary), and the teacher's folder."""
    if one.name == "gkd":
        for document in row.keys.get("rows") or documents():
            ids, labels = document["input_ids"], document["labels"]
            if row.keys["lmbda"] == 1:
                start = sum(label == -100 for label in labels)
                (completion,) = Injected._sample(Stub, None, [torch.tensor(ids[:start])])
                ids = ids[:start] + completion.tolist()
                labels = [-100] * start + completion.tolist()
            yield ids, labels, "teacher"
        return
    tokenizer = AutoTokenizer.from_pretrained(one.models / "student")
    for example in prompts(4):
        template = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=True)
        prompt, completion = template["input_ids"], completion_of(template["input_ids"])
        is_code = "gopd_teacher_column" in row.keys and example["domain"] == "code"
        yield prompt + completion, [-100] * len(prompt) + completion, "other" if is_code else "teacher"


class Stub:
    """Stands for the trainer in a function of the prompt and of the first step."""

    class state:
        global_step = 0


class Dense:
    """The first step of a row: token losses of each sequence, and the mean of every number over all tokens."""

    def __init__(self, one, row, trainer):
        self.one, self.row, self.keys, self.objective = one, row, row.keys, trainer.objective
        student, teacher = row.keys.get("folders", ("student", "teacher"))
        folders = {"student": student, "start": student, "teacher": teacher}
        folders |= {"other": "other"} if one.name == "distillation" else {}
        self.models = {name: AutoModelForCausalLM.from_pretrained(one.models / at) for name, at in folders.items()}
        self.losses, self.parts, self.tokens, self.labels, self.outside = [], [], 0, 0, 0
        for ids, labels, teacher in given(one, row):
            self.tokens += len(ids)
            self.add(ids, torch.tensor(labels), teacher)
        self.values = {name: torch.cat([part[name] for part in self.parts]).double() for name in self.parts[0]}
        self.loss = self.total()

    def add(self, ids, labels, teacher):
        names = ("student", teacher, "start")
        logits = [self.models[name](torch.tensor([ids])).logits[0, :-1] for name in names]
        width = min(part.shape[-1] for part in logits)
        keep = (labels[1:] != -100) & (labels[1:] < width)
        self.labels += int((labels[1:] != -100).sum())
        self.outside += int((labels[1:] >= width).sum())
        temperature = self.keys.get("temperature", 1.0) if self.one.name == "distillation" else 1.0
        z, z_t, z_r = (part[keep][:, :width] / temperature for part in logits)
        row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        uniforms = Sequences(row).uniforms(42, 0)[0, 1:][keep]
        losses, values = self.formulas(z, z_t.detach(), z_r.detach(), labels[1:][keep], uniforms, ids, keep)
        self.losses.append(losses)
        self.parts.append({name: value.detach() for name, value in values.items()})

    def formulas(self, z, z_t, z_r, labels, uniforms, ids, keep):
        """Losses (n,) and numbers (n,) by the papers' formulas; of an objective that has none here, by its own on all logits."""
        keys, name = self.keys, self.objective.method.key
        log_q, log_t, log_r = (part.log_softmax(-1) for part in (z, z_t, z_r))
        q, p = log_q.exp(), log_t.exp()
        at = torch.arange(len(labels))
        picked = [part[at, labels] for part in (log_q, log_t, log_r)]
        values = {"entropy": -(q * log_q).sum(-1), "ce": -picked[0]}
        if name == "gopd" and not keys.get("gopd_full_vocab"):
            losses, more = self.sampled(*picked, ids, keep)
            return losses, {"entropy": values["entropy"]} | more
        scale = keys.get("reward_scale", 1.0)
        target = scale * z_t + (1 - scale) * z_r
        log_m = target.log_softmax(-1)
        values |= {"forward_kl": (log_m.exp() * (log_m - log_q)).sum(-1), "reverse_kl": (q * (log_q - log_m)).sum(-1)}
        if name == "hpd":
            return self.hpd(z, z_t, log_q, log_t, labels, uniforms, values)
        if keys.get("loca_alpha") is not None:
            calibrated = loca_calibrate(p, labels, keys["loca_alpha"])
            top, own = p.amax(-1), picked[1].exp()
            factor = torch.where(top > own, keys["loca_alpha"] / (1 - own + top), 1.0)
            values |= {"loca/scale": factor, "loca/corrected_fraction": (top > own).float()}
            target = calibrated.log()
        flags = (keys.get("akl_mu", 0.5), keys.get("akl_head_rule", "paper"))
        beta = keys.get("beta", 0.5 if self.one.name == "gkd" else 1.0)
        known = {
            "jsd": lambda: jsd(z, target, beta),
            "forward_kl": lambda: forward_kl(z, target),
            "reverse_kl": lambda: reverse_kl(z, target),
            "gopd": lambda: reverse_kl(z, target),
            "akl": lambda: adaptive_kl(z, target, *flags),
        }
        losses = known.get(name, lambda: self.objective.alone().dense(z, target, {"labels": labels}))()
        if name == "akl":
            values |= self.head(target.softmax(-1), q, *flags)
        elif name not in known:  # another package's
            found = dense_stats(self.objective, z, target, {"labels": labels})
            values |= {one.name: found[one.stat or one.name] for one in self.objective.method.metrics}
        values["kd"] = losses
        share = keys.get("kd_alpha", 1.0)
        return share * losses + (1 - share) * values["ce"], values

    def head(self, p, q, mu, rule):
        """Weight and size of the head of adaptive KL, by sorting."""
        mass, order = p.sort(dim=-1, descending=True, stable=True)
        before = mass.cumsum(-1) - mass
        member = before < mu - 1e-6 if rule == "paper" else mass.cumsum(-1) < mu + 1e-6
        member[:, 0] = True
        gap = (p - q).abs().gather(-1, order)
        return {"akl/weight": (gap * member).sum(-1) / gap.sum(-1), "akl/head_size": member.sum(-1).float()}

    def hpd(self, z, z_t, log_q, log_t, labels, uniforms, values):
        sample, reinforce = self.keys.get("hpd_sample", True), self.keys.get("hpd_reinforce", True)
        drawn, at = inverse_cdf_sample(log_q.exp().detach(), uniforms), torch.arange(len(labels))
        pairs = [part[at, ids] for ids in (labels, drawn) for part in (log_q, log_t)]
        label, draw = hpd_weights(*pairs, labels == drawn, sample, reinforce)
        values |= {
            "hpd/label_weight": label, "hpd/sample_weight": draw, "hpd/overestimated_fraction": (label < 0).float()
        }  # fmt: skip
        if sample:
            values["hpd/suppressed_fraction"] = (draw < 0).float()
        if sample and reinforce:
            values["hpd/reinforced_fraction"] = ((label > 0) & (draw < 0)).float()
        return hpd_loss(z, z_t, labels, drawn, sample, reinforce), values

    def sampled(self, log_q, log_t, log_r, ids, keep):
        """G-OPD on the labels."""
        keys, scale = self.keys, self.keys.get("reward_scale", 1.0)
        bound = keys.get("gopd_logratio_clamp", torch.inf)
        gap, reward = ((a - b).detach().clamp(-bound, bound) for a, b in ((log_t, log_q), (log_t, log_r)))
        advantage = gap + (scale - 1) * reward
        values = {"gopd/advantage": advantage, "gopd/teacher_log_ratio": -gap}
        if scale != 1:
            values |= {"gopd/reward": reward, "gopd/reference_log_ratio": reward - gap}
        losses = -advantage * (log_q - log_q.detach()).exp()
        if "gopd_tis_cap" in keys:  # the sampler's are half a nat below, and one is not known
            weight = torch.full_like(gap, 0.5).exp().clamp(max=keys["gopd_tis_cap"])
            if sum(ids[: 1 + int(keep.nonzero()[0])]) % 3 == 0:
                weight[0] = 1
            values["gopd/tis_weight"], losses = weight, weight * losses
        return losses, values

    def total(self):
        aggregation = "token-mean"
        if self.objective.method.key == "gopd":
            aggregation = self.keys.get("gopd_aggregation", "seq-mean-token-mean")
        means, sums = zip(*((one.mean(), one.sum()) for one in self.losses if len(one)), strict=True)
        if aggregation == "token-mean":
            return torch.stack(sums).sum() / sum(map(len, self.losses))
        return torch.stack(means if aggregation == "seq-mean-token-mean" else sums).mean()


@pytest.mark.parametrize("key", DISTILLED, ids="-".join)
def test_first_step_is_that_of_dense_logits(trainers, whole, key):
    """Its loss, its gradient, and every number of a method in the logs."""
    one, row, run = trainers[key[0]], row_of(key), whole[key]
    dense = Dense(one, row, run.trainer)
    dense.loss.backward()
    gradients = [parameter.grad for parameter in dense.models["student"].parameters()]
    log = run.logs[0]
    assert log["loss"] == pytest.approx(dense.loss.item(), rel=1e-4, abs=2e-6)
    assert log["grad_norm"] == pytest.approx(torch.stack([one.norm() for one in gradients]).norm().item(), rel=1e-4)
    if one.name == "distillation":
        weights = one.train_row(row, max_steps=1).weights
        for name, parameter in dense.models["student"].named_parameters():
            torch.testing.assert_close(weights[name], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=2e-6)
        if run.trainer.teacher_model is not None:  # TRL's loss, which logs no number of ours
            return
    dense.values["kept_fraction"] = torch.tensor([len(dense.values["entropy"]) / dense.tokens])
    if "outside_vocabulary_fraction" in log:
        dense.values["outside_vocabulary_fraction"] = torch.tensor([dense.outside / dense.labels])
    theirs, unlabelled = {"loss", "grad_norm", *one.theirs}, {"ce", "kd"}
    extremes = {metric.name for name in row.methods for metric in catalog()[name].metrics if metric.extremes}
    ends = {f"{name}_{end}" for name in extremes for end in ("min", "max")}
    assert (OURS & log.keys()) - theirs <= dense.values.keys() | ends
    assert dense.values.keys() - theirs - log.keys() <= unlabelled
    for name in dense.values.keys() & log.keys() - theirs:
        values = dense.values[name]
        assert log[name] == pytest.approx(values.mean().item(), rel=1e-4, abs=2e-6), name
        if name in extremes:
            found = [log[f"{name}_{end}"] for end in ("min", "max")]
            assert found == pytest.approx([values.min().item(), values.max().item()], rel=1e-4, abs=2e-6), name


# Shapers


def statistics(before, after):
    moved = (after - before).abs()
    return {
        "mean": after.mean(),
        "std": after.std(correction=0),
        "changed": (moved > 0).double().mean(),
        "delta_abs": moved.mean(),
        "flipped": (before * after < 0).double().mean(),
    }


ONE_SHAPER = [key for key in ROWS if key[0] == "grpo" and row_of(key).methods[:1] not in ((), ("hidden_align",))]
ONE_SHAPER = [key for key in ONE_SHAPER if row_of(key).group != "several"]


@pytest.mark.parametrize("key", ONE_SHAPER, ids="-".join)
def test_numbers_of_a_shaper_are_those_of_its_advantages(whole, key):
    """Of the last step, over rollouts or over the tokens in the loss; and of some, what they say of answers."""
    run = whole[key]
    (shaper,), log, (before, after, context) = run.trainer.shapers, run.logs[STEPS - 1], run.trainer.kept
    assert names_of(SHAPING_METRICS, f"shaping/{shaper.name}/") <= log.keys()
    if shaper.level == "token":
        before, after = before[:, None].expand_as(after)[context.mask], after[context.mask]
    expected = statistics(before.double(), after.double())
    texts, right = [completion[-1]["content"] for completion in context.completions], context.correct
    answers = [extract_answer(text) for text in texts]
    groups = [slice(start, start + 4) for start in range(0, len(texts), 4)]
    if shaper.name == "pass_at_k":
        rewards = [1 - comb(4 - int(right[group].sum()), 2) / comb(4, 2) for group in groups]
        silent = [reward in (0, 1) for reward in rewards]
        expected |= {"reward": sum(rewards) / len(groups), "groups_silent": sum(silent) / len(groups)}
    if key[1] == "edas":
        kinds = [Counter(a for a, ok in zip(answers[g], right[g].tolist(), strict=True) if not ok) for g in groups]
        expected |= {
            "groups_diverse": sum(len(kind) > 1 for kind in kinds),
            "groups_collapsed": sum(len(kind) == 1 and kind.total() > 1 for kind in kinds),
            "groups_skipped": sum(kind.total() <= 1 for kind in kinds),
            "wrong_per_group": sum(kind.total() for kind in kinds) / len(kinds),
            "classes_per_group": sum(map(len, kinds)) / len(kinds),
            "warmup": 1.0,
        }
    if "shaping/answered" in log:
        assert log["shaping/answered"] == pytest.approx(sum(one is not None for one in answers) / len(answers))
    for name, value in expected.items():
        assert log[f"shaping/{shaper.name}/{name}"] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


def test_cosines_of_hidden_align_are_those_of_the_states(trainers):
    """At the last token before each right answer, in groups that have a wrong one too."""
    one = trainers["grpo"]
    run = one.train_row(one.rows["hidden-align"], learning_rate=0.0, max_steps=1)
    log, (batch,) = run.logs[0], run.trainer._buffered_inputs
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    model = AutoModelForCausalLM.from_pretrained(one.models / "policy")
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    states = torch.nn.functional.normalize(hidden[torch.arange(len(ids)), batch["align_position"]], dim=-1)
    aligned = [index for index, weight in enumerate(batch["align_weight"].tolist()) if weight > 0]
    assert log["hidden_align/aligned"] == pytest.approx(len(aligned) / len(ids))
    within, across = {}, []
    for first, second in permutations(aligned, 2):
        prompts_of = [tuple(batch["prompt_ids"][index].tolist()) for index in (first, second)]
        cosines = within.setdefault(prompts_of[0], []) if prompts_of[0] == prompts_of[1] else across
        cosines.append(float(states[first] @ states[second]))
    means = [sum(cosines) / len(cosines) for cosines in within.values()]
    assert log["hidden_align/cosine"] == pytest.approx(sum(means) / len(means), abs=1e-5)
    assert log["hidden_align/cosine_across"] == pytest.approx(sum(across) / len(across), abs=1e-5)

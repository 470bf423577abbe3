"""The first step of a distillation by the formulas on all logits, one unpadded sequence at a time."""

import torch
from distillation_cases import completion_of, prompts
from gkd_cases import Injected, documents
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb.objectives import adaptive_kl, forward_kl, jsd, loca_calibrate, reverse_kl
from hf_rb.objectives.hpd import hpd_loss, hpd_weights, inverse_cdf_sample
from hf_rb.ops.sequences import Sequences
from hf_rb.trainers.common.distilling import dense_stats


__all__ = ["Dense"]


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

"""Plan of a merge for every tensor, decided from the headers of the files before anything is written."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from hf_rb import __version__
from hf_rb.io.model_folder import companions
from hf_rb.io.resumable import file_stamps
from hf_rb.io.safetensors import Entry, standard_names
from hf_rb.io.skeleton import loading_problem
from hf_rb.weights.operation import Job, Operation
from hf_rb.weights.options import Options
from hf_rb.weights.patterns import matcher, select
from hf_rb.weights.reasons import difference, padding
from hf_rb.weights.source import EMBEDDINGS, HEADS, TIE, Source, content, some, vocabulary_problem, with_ties_of


__all__ = ["MergePlan"]

SKIP = '`mismatch="skip"` (`--mismatch skip`)'
CHOOSE = "Give models of one shape, choose tensors with `include` (`--include`)"
# Keys of a configuration that change nothing in what the model computes.
SILENT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


class MergePlan:
    """Plan for every tensor, decided from the headers of the files before anything is written."""

    def __init__(self, operation: Operation, sources: Sequence[Source], options: Options):
        self.operation, self.sources, self.options = operation, sources, options
        self.receiver, self.others = sources[0], sources[1:]
        self.include: str = options.include or operation.include
        self.notes: list[str] = []
        self.untied = False
        operation.check(self.receiver.entries)
        self._check_architecture()
        self._give_head()
        included = select(self.include, self.receiver.entries)
        self.dropped = self._extra()
        kept = self._kept(included)
        self.shards = [
            [self._job(name, entry, kept) for name, entry in shard.items()] for shard in self.receiver.shards
        ]
        self.names = standard_names(len(self.shards))
        self.files_from = self._files_from()
        self.giver = self._source(self.files_from)
        self._check_loading()

    def _source(self, role: str) -> Source:
        """Returns the model of a role, the first one of several."""
        return next(source for source in self.sources if source.role in (role, f"{role} 1"))

    def _refuse(self, problem: str, remedy: str, other: Source | None = None) -> None:
        """Raises, or notes the problem; `other` is a model in which the receiving one does not find its tensors, or
        the other way round.
        """
        if self.options.mismatch == "refuse":
            raise ValueError(other and difference(self.receiver, other) or f"{problem}. {remedy}")
        self.notes.append(f"{problem}.")

    def _check_architecture(self) -> None:
        ours = self.receiver.config
        for other in self.others:
            if (theirs := other.config.get("model_type")) != ours.get("model_type"):
                self._refuse(
                    f"{self.receiver.role} is a {ours.get('model_type')} model and {other.role} a {theirs} model",
                    f"Give models of one architecture, or {SKIP} to merge the tensors that fit.",
                )

    def _give_head(self) -> None:
        """Gives a receiving model that ties its head a head of its own, where another model has one that is merged."""
        for other in self.others:
            for name in filter(matcher(self.include), list(other.entries)):
                ours = self.receiver.name_of(name) if name.endswith(HEADS) else None
                if ours and ours.endswith(EMBEDDINGS) and other.own_head(name, ours):
                    self.receiver.untie(name)
                    self.untied = True
                    self.notes.append(
                        f"{self.receiver.role} ties its head to the embedding, {other.role} does not: the result has "
                        f"{name} for a head of its own, and {self.receiver.role} puts {ours} into it."
                    )

    def _extra(self) -> list[str]:
        """Names that only other models have."""
        extra = []
        for other in self.others:
            known = filter(matcher(self.include), other.entries)
            names = [name for name in known if self.receiver.name_of(name) is None]
            if names:
                self._refuse(
                    f"{self.receiver.role} has no {some(names)}, which {other.role} has",
                    f"{CHOOSE}, or leave these out with {SKIP}.",
                    other,
                )
            extra += names
        return sorted(set(extra))

    def _kept(self, included: set[str]) -> dict[str, str]:
        """Why tensors are copied from the receiving model."""
        kept = {name: "not included" for name in self.receiver.entries if name not in included}
        for name in included:
            if reason := self.operation.keeps(name, self.receiver.entries[name]):
                kept[name] = reason
        own = set(kept.values())
        vocabulary = next(filter(None, (vocabulary_problem(self.receiver, other) for other in self.others)), None)
        embeddings = {name for name in included - kept.keys() if name.endswith(EMBEDDINGS + HEADS)}
        if vocabulary and embeddings:
            self._refuse(
                vocabulary,
                f"Their rows would mix different tokens. Give models with one tokenizer, or {SKIP} to keep the "
                f"embeddings of {self.receiver.role}.",
            )
            kept |= dict.fromkeys(embeddings, "another vocabulary")
        for other in self.others:
            wanted = sorted(included - kept.keys())
            missing = [name for name in wanted if other.find(name) is None]
            shapes = {
                name: entry.shape
                for name in wanted
                if (entry := other.find(name)) and entry.shape != self.receiver.entries[name].shape
            }
            if missing:
                self._refuse(
                    f"{other.role} has no {some(missing)}, which {self.receiver.role} has",
                    f"{CHOOSE}, or keep these of {self.receiver.role} with {SKIP}.",
                    other,
                )
                kept |= dict.fromkeys(missing, f"not in {other.role}")
            if shapes:
                name = next(iter(shapes))
                self._refuse(
                    f"{some([*shapes])} differs in shape: {self.receiver.entries[name].shape} in "
                    f"{self.receiver.role}, {shapes[name]} in {other.role}",
                    padding(self.receiver, other, name)
                    or f"Give models of one shape, or keep what differs with {SKIP}.",
                )
                kept |= dict.fromkeys(shapes, f"another shape in {other.role}")
        if included <= kept.keys():
            raise ValueError(f"Nothing is left to merge: {'; '.join(sorted(set(kept.values())))}.")
        self.skipped = bool(set(kept.values()) - own)
        return kept

    def _job(self, name: str, entry: Entry, kept: dict[str, str]) -> Job:
        others = {other.role: found for other in self.others if (found := other.find(name))}
        reason = kept.get(name)
        if reason is None and not entry.dtype.is_floating_point:
            for other in self.others:
                if any(
                    not torch.equal(*pair) for pair in zip(entry.chunks(), others[other.role].chunks(), strict=True)
                ):
                    raise ValueError(
                        f"{name} holds integers that differ between {self.receiver.role} and {other.role}."
                    )
            reason = "integers"
        dtype = entry.dtype
        if entry.dtype.is_floating_point:
            if self.options.dtype:
                dtype = getattr(torch, self.options.dtype)
            elif reason is None:
                dtype = self.operation.dtype(entry, others)
        return Job(name, entry, {} if reason else others, dtype, reason)

    def _files_from(self) -> str:
        """Role of the model that everything but the weights comes from."""
        receiver = self.receiver.role
        chosen, choices = self.options.files_from, self.operation.method.files_from
        if len(choices) == 1:
            return choices[0]
        if chosen is not None and chosen not in choices:
            raise ValueError(f"`files_from` cannot be {chosen!r}; write {' or '.join(map(repr, choices))}.")
        if chosen is None and (different := self._different_files()):
            raise ValueError(
                f"{' and '.join(choices)} have different {', '.join(different)}. Say whose configuration, tokenizer, "
                "chat template and generation config the result gets: "
                f'`files_from="{choices[-1]}"` (`--files-from {choices[-1]}`) or `{choices[0]}`.'
            )
        chosen = chosen or choices[0]
        if self.skipped and chosen != receiver:
            raise ValueError(
                f"The result has the shapes of {receiver}, since tensors that do not fit are skipped; it cannot have "
                f'the files of {chosen}. Write `files_from="{receiver}"` (`--files-from {receiver}`).'
            )
        return chosen

    def _different_files(self) -> list[str]:
        sources = [self._source(role) for role in self.operation.method.files_from]
        found = [{file.name: file for file in companions(source.folder)} for source in sources]
        names = [name for name in sorted({*found[0]}.union(*found)) if not name.startswith(("LICENSE", "NOTICE"))]
        texts = {name: [content(files[name]) if name in files else None for files in found] for name in names}
        different = [name for name in names if not _same(texts[name])]
        configs = [{k: v for k, v in source.config.items() if k not in SILENT} for source in sources]
        return ([] if _same(configs) else ["config.json"]) + different

    def _check_loading(self) -> None:
        """Refuses a result that lacks a parameter: where no model has its configuration and its tensors, transformers
        is asked.
        """
        config = self.config(untied=self.untied)
        for source in self.sources:
            alike = _telling(source.config) == _telling(config)
            if alike and source.entries.keys() == self.receiver.entries.keys():
                return
        if problem := loading_problem(config, self.receiver.entries):
            raise ValueError(
                f"The result, with the tensors of {self.receiver.role} and the configuration of {self.files_from}, "
                f"would be no whole model: {problem}. Write "
                f'`files_from="{self.receiver.role}"` (`--files-from {self.receiver.role}`), or save both models '
                "with one version of transformers (`save_pretrained`)."
            )

    def state(self) -> dict[str, dict[str, Any]]:
        """State that must not change between two parts of a run."""
        files = {}
        for source in self.sources:
            stamps = file_stamps([source.folder / "config.json", *source.files])
            files |= {f"{source.role}/{name}": stamp for name, stamp in stamps.items()}
        asked = {k: v for k, v in asdict(self.options).items() if k not in ("overwrite", "resume", "progress")}
        models = {source.role: str(source.folder) for source in self.sources}
        made = {"method": self.operation.method.key, "hf_rb": __version__, "include": self.include}
        return {"files": files, "options": asked | models | made | self.operation.options()}

    def config(self, untied: bool) -> dict[str, Any]:
        """The configuration of the result, which ties its head as the receiving model does unless it holds a head of
        its own.
        """
        counts = Counter()
        for job in (job for jobs in self.shards for job in jobs if job.dtype.is_floating_point):
            counts[job.dtype] += torch.Size(job.entry.shape).numel()
        dtype = str(counts.most_common(1)[0][0]).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in self.giver.config else "dtype"
        config = with_ties_of(self.giver.config, None if untied else self.receiver.config) | {key: dtype}
        config.pop("transformers_weights", None)  # the files of the result have the usual names
        return config


def _same(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


def _telling(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a configuration that says which tensors the model needs. A head that is not tied needs no
    mention.
    """
    silent = SILENT - {"architectures"}
    return {key: value for key, value in config.items() if key not in silent and (key, value) != (TIE, False)}

"""A teacher that was run once and is read from disk: nothing of it is in memory while the student trains."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import Trainer

from hf_rb.io.files import sha256_file
from hf_rb.ops.backbone import width_of
from hf_rb.ops.lm_head import CachedLogits
from hf_rb.ops.sequences import Sequences
from hf_rb.teachers.cache_format import (
    REMEDY,
    VOCABULARY,
    Identity,
    Manifest,
    check_shard,
    normalized,
    sequence_key,
    sha256_json,
    unpack_ids,
)
from hf_rb.teachers.local import tokenizer_of
from hf_rb.teachers.vocabulary import shared_vocabulary


__all__ = ["CachedTeacher"]


class CachedTeacher:
    """
    The teacher's most probable tokens, captured by `hf-rb cache-teacher`.

    A prediction is found by the token ids of its sequence and its place in it, so that shuffling, padding and packing
    the data otherwise than for the capture does not matter. Cutting the sequences elsewhere or rendering them
    otherwise does.

    Args:
        folder (`str` or `os.PathLike`):
            The cache.

    Attributes:
        model_name (`str`):
            What the captured model was loaded as. Known after `prepare`.
    """

    vocabulary: int | None = None

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def prepare(self, trainer: Trainer) -> None:
        """
        Reads the whole cache once and checks it.

        Raises:
            FileNotFoundError: There is no cache in the folder.
            ValueError: The cache is unfinished, damaged or edited, or was captured for another vocabulary or
                `max_length`.
        """
        manifest = Manifest.read(self.folder)
        identity = manifest.identity
        if not manifest.is_complete:
            raise ValueError(
                f"The capture in {self.folder} was interrupted after {len(manifest.shards)} of "
                f"{manifest.number_of_shards} shards. Run the same `hf-rb cache-teacher` command again: it goes on "
                "from there."
            )
        self._check_student(trainer, identity)
        for shard in tqdm(
            manifest.shards.values(), desc="Checking the teacher cache", disable=trainer.args.disable_tqdm
        ):
            check_shard(self.folder, shard, identity)
        self.vocabulary, self.model_name = identity.vocabulary, identity.model_name
        processing_class: Any = trainer.processing_class  # of text, so it has a template or `None`
        self._template_differs = identity.template != sha256_json(processing_class.chat_template)
        self._open = lru_cache(maxsize=256)(lambda file: safe_open(self.folder / file, framework="pt"))
        self._nothing = (
            torch.empty(0, identity.width, dtype=torch.int32),
            torch.empty(0, identity.width),
            torch.empty(0),
        )
        self._index([shard.file for shard in manifest.shards.values()])

    def _check_student(self, trainer: Trainer, identity: Identity) -> None:
        path = self.folder / VOCABULARY
        if not path.is_file():
            raise ValueError(f"The teacher cache misses {path}. {REMEDY}")
        if sha256_file(path) != identity.tokenizer:
            raise ValueError(f"{path} has been edited since the capture: its SHA-256 differs. {REMEDY}")
        student: Any = trainer.accelerator.unwrap_model(trainer.model)
        width = width_of(student)
        tokenizer = tokenizer_of(trainer.processing_class)
        shared = shared_vocabulary(tokenizer, json.loads(path.read_bytes()), width, identity.vocabulary)
        if shared < identity.vocabulary:
            raise ValueError(
                f"The teacher cache in {self.folder} holds probabilities over {identity.vocabulary:,} ids, and this "
                f"student has {width:,}. Capture it again with this student as `model_name_or_path`."
            )
        max_length = getattr(trainer.args, "max_length", None)
        if max_length != identity.max_length:
            raise ValueError(
                f"The teacher cache in {self.folder} was captured with `max_length: {identity.max_length}`, and "
                f"training has `max_length: {max_length}`, which cuts sequences elsewhere. Set the same, or capture "
                "again."
            )

    def _index(self, files: list[str]) -> None:
        """Keeps, of every sequence in order of its key: the key, its file, and where its predictions start and end
        there.
        """
        self._files = files
        keys, counts = ([self._open(file).get_tensor(name) for file in files] for name in ("keys", "counts"))
        shards = torch.cat([torch.full_like(part, number) for number, part in enumerate(keys)])
        stops = torch.cat([part.long().cumsum(0) for part in counts])
        self._keys, order = torch.cat(keys).sort(stable=True)
        self._shards, self._stops, self._counts = shards[order], stops[order], torch.cat(counts)[order]

    def score(self, inputs: Mapping[str, Any], keep: torch.Tensor) -> CachedLogits:
        """
        Returns the stored predictions, each a distribution again, which rounding to the stored type has made of it
        only nearly.

        Raises:
            ValueError: One of them is not in the cache.
        """
        token_ids = inputs["input_ids"].flatten().cpu()
        is_kept = pad(keep, (0, 1)).flatten().cpu()
        rows = [
            self._rows(token_ids[start:stop], is_kept[start:stop].nonzero().flatten())
            for start, stop in Sequences(inputs).spans()
            if is_kept[start:stop].any()
        ]
        ids, log_probs, rest = map(torch.cat, zip(*rows, strict=True)) if rows else self._nothing
        log_probs, rest = normalized(log_probs, rest)
        return CachedLogits(*(tensor.to(keep.device) for tensor in (ids, log_probs, rest)))

    def _rows(self, token_ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns ids, their log-probabilities and that of the rest, at some positions of one sequence."""
        key = torch.tensor(sequence_key(token_ids))
        first, last = (
            int(torch.searchsorted(self._keys, key)),
            int(torch.searchsorted(self._keys, key, right=True)),
        )
        for entry in range(first, last):  # several when the data holds a sequence more than once, labelled otherwise
            file = self._open(self._files[self._shards[entry]])
            stop = self._stops[entry].item()
            stored = slice(stop - self._counts[entry].item(), stop)
            known = file.get_slice("positions")[stored]
            places = torch.searchsorted(known, positions.int()).clamp(max=len(known) - 1)
            if torch.equal(known[places].long(), positions):
                high = file.get_slice("ids_high")[stored] if (self.vocabulary or 0) > 1 << 16 else None
                ids = unpack_ids(file.get_slice("ids")[stored], high)
                # As float32 from here on: autocast on a CPU cannot put tensors of float16 together.
                values = [file.get_slice(name)[stored][places].float() for name in ("log_probs", "rest")]
                return ids[places], *values
        raise ValueError(self._missing(token_ids, found=first < last))

    def _missing(self, token_ids: torch.Tensor, found: bool) -> str:
        beginning = ", ".join(map(str, token_ids[:8].tolist()))
        what = f"the sequence of {len(token_ids)} tokens that begins with the ids {beginning}"
        if found:
            return (
                f"The teacher cache in {self.folder} has {what}, but not all predictions trained on: it was captured "
                "with fewer labels. Run `hf-rb cache-teacher` with this recipe, its `completion_only_loss` and "
                "`assistant_only_loss` included."
            )
        template = " The chat template is another one than at the capture." if self._template_differs else ""
        return (
            f"The teacher cache in {self.folder} does not have {what}.{template} Run `hf-rb cache-teacher` with the "
            "data, `max_length`, chat template and packing of this recipe."
        )

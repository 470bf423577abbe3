"""Runs a teacher once over the training data and keeps its most probable tokens. See `cache_format` for the files."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_rb.io.files import MANIFEST, sha256_file
from hf_rb.io.model_folder import public_name
from hf_rb.ops.lm_head_queries import TopK, lm_head_top_k
from hf_rb.ops.sequences import Sequences
from hf_rb.teachers.cache_format import (
    CACHE_DTYPES,
    VOCABULARY,
    Identity,
    Manifest,
    Shard,
    check_shard,
    normalized,
    pack_ids,
    put_in_place,
    sequence_key,
    sha256_json,
    write_file,
)
from hf_rb.teachers.capture_plan import CapturePlan
from hf_rb.teachers.local import LocalTeacher, tokenizer_of
from hf_rb.teachers.protocol import TrainerWithTeacher


__all__ = ["CacheReport", "cache_teacher"]


@dataclass(frozen=True)
class CacheReport:
    """Report of a capture.

    Attributes:
        folder (`str`): The cache.
        sequences, tokens (`int`): Sequences, and predictions in them.
        shards, shards_kept (`int`): Shards, and how many of them an earlier, interrupted run had written.
        file_bytes (`int`): Size of all files.
        bytes_per_token (`float`): The same for each prediction.
        truncation_kl (`float`): Mean KL divergence, in nats, from the teacher to what the cache keeps of it: the
            stored ids, with the rest of the mass spread evenly over the rest of the vocabulary. The rounding of the
            log-probabilities is part of it.
        tail_mass (`float`): Mean probability of the tokens that are not stored.
        seconds (`float`): Time of this run.
    """

    folder: str
    sequences: int
    tokens: int
    shards: int
    shards_kept: int
    file_bytes: int
    bytes_per_token: float
    truncation_kl: float
    tail_mass: float
    seconds: float


def cache_teacher(
    trainer: TrainerWithTeacher,
    folder: str | Path,
    *,
    k: int = 64,
    dtype: str = "float16",
    batch_tokens: int = 8192,
    shard_tokens: int = 131_072,
    overwrite: bool = False,
) -> CacheReport:
    """
    Captures a trainer's teacher on the trainer's data, so that [`CachedTeacher`] can stand in for it.

    Shards are written one after the other, each in one step. A run that was interrupted goes on behind the last whole
    one when it is called again with the same arguments.

    Args:
        trainer ([`~hf_rb.teachers.TrainerWithTeacher`]):
            Trainer with the data prepared, on one process. Its `teacher` is a [`LocalTeacher`]. Not trained.
        folder (`str` or `os.PathLike`):
            Where the cache goes.
        k (`int`, *optional*, defaults to `64`):
            Number of most probable tokens to keep. One more is kept: the label, or the next most probable token.
        dtype (`str`, *optional*, defaults to `"float16"`):
            Type of the stored log-probabilities, or `"float32"`.
        batch_tokens (`int`, *optional*, defaults to `8192`):
            Tokens of a teacher's batch, padding included. A longer sequence is a batch by itself.
        shard_tokens (`int`, *optional*, defaults to `131072`):
            Predictions of a shard: what an interrupted run may lose.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace another cache in `folder`.

    Returns:
        [`CacheReport`]: Sizes, and what the truncation costs.

    Raises:
        FileExistsError: `folder` holds something else, or another cache and `overwrite` is `False`.
        ValueError: An argument is out of range, the data is streamed, or the teacher is not a local one, gives NaN or
            lets packed sequences see each other.

    Example:

    ```python
    >>> trainer = GKDTrainer("tiny:student", "tiny:teacher", GKDConfig("run", lmbda=0.0), train_dataset=dataset)
    >>> cache_teacher(trainer, "teacher-cache", k=64)
    >>> config = GKDConfig("run", objective="forward_kl", lmbda=0.0, teacher_cache="teacher-cache")
    >>> GKDTrainer("tiny:student", args=config, train_dataset=dataset).train()
    ```
    """
    start, folder = time.perf_counter(), Path(folder)
    _check_arguments(trainer, k, dtype, batch_tokens, shard_tokens)
    plan = CapturePlan(trainer, shard_tokens)
    identity, vocabulary = _identify(trainer, plan, k, dtype, shard_tokens)
    manifest = _open(folder, identity, len(plan.shards), overwrite)
    write_file(folder / VOCABULARY, vocabulary)
    manifest.write(folder)
    kept = len(manifest.shards)
    done = sum(shard.tokens for shard in manifest.shards.values())
    with tqdm(
        total=plan.tokens, initial=done, unit="token", desc="Capturing the teacher", disable=trainer.args.disable_tqdm
    ) as bar:
        for number, rows in enumerate(plan.shards):
            if number not in manifest.shards:
                manifest.shards[number] = _write_shard(
                    trainer, plan, rows, number, folder, identity, batch_tokens, bar
                )
                manifest.write(folder)
    return _report(folder, manifest, kept, time.perf_counter() - start)


def _check_arguments(trainer: TrainerWithTeacher, k: int, dtype: str, batch_tokens: int, shard_tokens: int) -> None:
    for name, value in {"k": k, "batch_tokens": batch_tokens, "shard_tokens": shard_tokens}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number from 1; got {value!r}.")
    if dtype not in CACHE_DTYPES:
        raise ValueError(f"`dtype` cannot be {dtype!r}; it must be one of {', '.join(map(repr, CACHE_DTYPES))}.")
    teacher = getattr(trainer, "teacher", None)
    if not isinstance(teacher, LocalTeacher):
        raise ValueError(
            f"A teacher of type {type(teacher).__name__} cannot be captured. Set `teacher_model_name_or_path` and no "
            "`teacher_cache`."
        )
    if trainer.accelerator.num_processes > 1:
        raise ValueError(
            "The teacher is captured by one process. To use several GPUs, split it over them: "
            "`teacher_model_init_kwargs: {device_map: auto}`."
        )


def _identify(
    trainer: TrainerWithTeacher, plan: CapturePlan, k: int, dtype: str, shard_tokens: int
) -> tuple[Identity, bytes]:
    teacher, model = trainer.teacher, trainer.teacher.model
    tokenizer = tokenizer_of(teacher.tokenizer or trainer.processing_class)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    identity = Identity(
        model=_fingerprint(model),
        model_name=public_name(model.config._name_or_path),
        tokenizer=hashlib.sha256(vocabulary).hexdigest(),
        template=sha256_json(trainer.processing_class.chat_template),
        data=plan.data,
        vocabulary=teacher.vocabulary,
        max_length=getattr(trainer.args, "max_length", None),
        k=k,
        dtype=dtype,
        shard_tokens=shard_tokens,
    )
    return identity, vocabulary


def _fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of every weight's name, type and shape with 256 of its values: another checkpoint differs in some, in
    seconds.
    """
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        values = weight.flatten()[:: max(1, weight.numel() // 256)].float().cpu()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _open(folder: Path, identity: Identity, number_of_shards: int, overwrite: bool) -> Manifest:
    """Returns the manifest to go on with: a new one, or the folder's with those of its shards that are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    if MANIFEST not in names:
        if not all(_is_ours(name) for name in names):
            raise FileExistsError(f"{folder} is not empty, and holds no teacher cache. Choose another folder.")
        return Manifest(identity, number_of_shards)
    found, different = None, []
    try:
        found = Manifest.read(folder)
        # Not the name, which was once a path: `model` is a fingerprint of the weights.
        compared = [name for name in vars(identity) if name != "model_name"]
        different = [name for name in compared if getattr(identity, name) != getattr(found.identity, name)]
    except ValueError:
        if not overwrite or not all(_is_ours(name) for name in names):
            raise
    if found and different and not overwrite:
        raise FileExistsError(_other_cache(folder, found.identity, identity, different))
    if not found or different:
        for path in folder.iterdir():
            if _is_ours(path.name):
                path.unlink()
        return Manifest(identity, number_of_shards)
    for number, shard in list(found.shards.items()):
        try:
            check_shard(folder, shard, identity)
        except ValueError:
            del found.shards[number]  # written again
    found.identity = identity
    return found


def _is_ours(name: str) -> bool:
    return name.removesuffix(".tmp") in (MANIFEST, VOCABULARY) or name.startswith("shard-")


def _other_cache(folder: Path, found: Identity, wanted: Identity, different: list[str]) -> str:
    name = "model_name" if "model" in different and found.model_name != wanted.model_name else different[0]
    values = f"`{name}: {getattr(found, name)}` where this one has `{name}: {getattr(wanted, name)}`"
    return (
        f"{folder} holds a teacher cache with {values}. Choose another folder, or pass `--overwrite` to replace the "
        "cache."
    )


@torch.no_grad()
def _write_shard(
    trainer: TrainerWithTeacher,
    plan: CapturePlan,
    rows: np.ndarray,
    number: int,
    folder: Path,
    identity: Identity,
    batch_tokens: int,
    bar: tqdm,
) -> Shard:
    parts: list[dict[str, torch.Tensor]] = []
    truncation_kl, tail_mass, device = 0.0, 0.0, trainer.accelerator.device
    for batch in plan.batches(rows, batch_tokens):
        keep = plan.kept(batch)
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        with trainer.accelerator.autocast():
            plan.check_packing(trainer, batch)
            (teacher,) = trainer.teacher.score(batch, keep)
        labels = batch["input_ids"][:, 1:][keep.to(device)].to(teacher.hidden.device)
        top = lm_head_top_k(teacher.hidden, teacher.head, identity.k, labels, identity.vocabulary)
        if not top.entropy.isfinite().all():
            raise ValueError(
                "The teacher's logits are not numbers (NaN). Load it with another type: `teacher_model_init_kwargs: "
                "{dtype: float32}`."
            )
        dtype = CACHE_DTYPES[identity.dtype]
        # A probability of 0 is stored as the smallest there is: exp gives 0 again, and no infinity gets into a loss.
        log_probs, rest = (x.to(dtype).clamp(min=torch.finfo(dtype).min) for x in (top.log_probs, top.rest))
        divergence = _truncation(top, *normalized(log_probs.float(), rest.float()), identity.vocabulary)
        truncation_kl, tail_mass = truncation_kl + divergence.sum().item(), tail_mass + top.rest.exp().sum().item()
        parts.append(
            {
                **_addresses(batch, keep),
                **pack_ids(top.ids.cpu(), identity.vocabulary),
                "log_probs": log_probs.cpu(),
                "rest": rest.cpu(),
            }
        )
        bar.update(len(labels))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    path = folder / f"shard-{number:05d}.safetensors"
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(tensors, temporary)
    checksum = sha256_file(temporary)
    put_in_place(temporary, path)
    return Shard(
        path.name, checksum, path.stat().st_size, len(tensors["keys"]), len(tensors["ids"]), truncation_kl, tail_mass
    )


def _addresses(batch: dict[str, Any], keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where the predictions of a batch are found again: key and count of every sequence, position of every
    prediction.
    """
    token_ids, is_kept = batch["input_ids"].flatten().cpu(), pad(keep, (0, 1)).flatten().cpu()
    keys, counts, positions = [], [], []
    for start, stop in Sequences(batch).spans():
        places = is_kept[start:stop].nonzero().flatten()
        if len(places):
            keys.append(sequence_key(token_ids[start:stop]))
            counts.append(len(places))
            positions.append(places.int())
    return {
        "keys": torch.tensor(keys),
        "counts": torch.tensor(counts, dtype=torch.int32),
        "positions": torch.cat(positions),
    }


def _truncation(top: TopK, log_probs: torch.Tensor, rest: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """KL divergence from the teacher to the stored distribution with its rest spread evenly."""
    others = max(1, vocabulary - log_probs.shape[-1])
    known = (top.log_probs.exp() * log_probs).sum(-1)
    return -top.entropy - known - top.rest.exp() * (rest - np.log(others))


def _report(folder: Path, manifest: Manifest, kept: int, seconds: float) -> CacheReport:
    shards = list(manifest.shards.values())
    tokens = sum(shard.tokens for shard in shards)
    size = sum(shard.size for shard in shards) + sum((folder / name).stat().st_size for name in (MANIFEST, VOCABULARY))
    return CacheReport(
        folder=str(folder),
        sequences=sum(shard.sequences for shard in shards),
        tokens=tokens,
        shards=len(shards),
        shards_kept=kept,
        file_bytes=size,
        bytes_per_token=size / tokens,
        truncation_kl=max(0.0, sum(shard.truncation_kl for shard in shards) / tokens),
        tail_mass=sum(shard.tail_mass for shard in shards) / tokens,
        seconds=seconds,
    )

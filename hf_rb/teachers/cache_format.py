"""The files of a teacher cache: what a folder holds, how a sequence is found in it, and what makes a shard unfit to
train from.

manifest.json            what was captured, and name, size and SHA-256 of every shard
vocabulary.json          the teacher's tokens, {token: id}
shard-00000.safetensors  S sequences with R predictions in all
    keys        int64 (S,)      hash of a sequence's token ids
    counts      int32 (S,)      predictions stored of it
    positions   int32 (R,)      position t of the token after which each was made, ascending in a sequence
    ids         uint16 (R, m)   m = min(k + 1, V) distinct token ids, their low 16 bits
    ids_high    uint8 (R, m)    the bits above, where V exceeds 65,536
    log_probs   float (R, m)    their log-probabilities at temperature 1, float16 or float32
    rest        float (R,)      log-probability of all other ids together
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_rb.io.files import MANIFEST, fsync_file, sha256_file


__all__ = [
    "CACHE_DTYPES",
    "REMEDY",
    "VOCABULARY",
    "Identity",
    "Manifest",
    "Shard",
    "bytes_per_token",
    "check_shard",
    "normalized",
    "pack_ids",
    "put_in_place",
    "sequence_key",
    "sha256_json",
    "unpack_ids",
    "write_file",
]

FORMAT = "hf_rb teacher cache"
FORMAT_VERSION = 1
VOCABULARY = "vocabulary.json"
CACHE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
# How far from 1 rounding may take the sum of the stored probabilities of one prediction: each by half a unit in the
# last place of its logarithm.
MASS_TOLERANCE = {"float16": 6e-3, "float32": 1e-4}
REMEDY = "Capture it again with `hf-rb cache-teacher` and the `--overwrite` flag."


def sequence_key(token_ids: torch.Tensor) -> int:
    """Returns a 64-bit hash of the token ids of one sequence, the same on every machine."""
    data = token_ids.to(torch.int32).cpu().numpy().astype("<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def sha256_json(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def pack_ids(ids: torch.Tensor, vocabulary: int) -> dict[str, torch.Tensor]:
    """Returns the tensors that hold token ids of any integer type."""
    packed = {"ids": (ids & 0xFFFF).to(torch.uint16)}
    return packed if vocabulary <= 1 << 16 else packed | {"ids_high": (ids >> 16).to(torch.uint8)}


def unpack_ids(low: torch.Tensor, high: torch.Tensor | None) -> torch.Tensor:
    """Returns token ids as int32."""
    return low.int() if high is None else low.int() | (high.int() << 16)


def normalized(log_probs: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log-probabilities `(N, m)` and that of the rest `(N,)` such that they sum to 1."""
    total = torch.logaddexp(log_probs.logsumexp(-1), rest)
    return log_probs - total.unsqueeze(-1), rest - total


def bytes_per_token(k: int, vocabulary: int, dtype: str = "float16") -> int:
    """
    Returns the bytes that a cache takes for each token that is trained on, keys and counts of sequences apart.

    Args:
        k (`int`):
            Number of most probable tokens.
        vocabulary (`int`):
            Number of ids of the teacher.
        dtype (`str`, *optional*, defaults to `"float16"`):
            Type of the log-probabilities.
    """
    id_bytes = 2 if vocabulary <= 1 << 16 else 3
    value_bytes = CACHE_DTYPES[dtype].itemsize
    return 4 + value_bytes + min(k + 1, vocabulary) * (id_bytes + value_bytes)


@dataclass(frozen=True)
class Identity:
    """Sources of a capture. One that was interrupted goes on only where all of them are the same.

    Attributes:
        model, tokenizer, template, data (`str`): SHA-256 of the weights' fingerprint, the vocabulary, the chat
            template, the data.
        model_name (`str`): What the teacher was loaded as.
        vocabulary (`int`): Leading ids over which the probabilities sum to 1.
        max_length (`int`, *optional*): Where sequences were cut.
        k (`int`): Most probable tokens stored.
        dtype (`str`): Type of the log-probabilities.
        shard_tokens (`int`): Predictions after which a shard ends.
    """

    model: str
    model_name: str
    tokenizer: str
    template: str
    data: str
    vocabulary: int
    max_length: int | None
    k: int
    dtype: str
    shard_tokens: int
    temperature: float = 1.0

    def __post_init__(self):
        if self.dtype not in CACHE_DTYPES or self.k < 1 or self.vocabulary < 1 or self.temperature != 1:
            raise ValueError(
                f"no cache has `dtype: {self.dtype}`, `k: {self.k}`, `vocabulary: {self.vocabulary}`, `temperature: "
                f"{self.temperature}`"
            )

    @property
    def width(self) -> int:
        """m, the ids stored for each prediction."""
        return min(self.k + 1, self.vocabulary)


@dataclass(frozen=True)
class Shard:
    """A file of the cache.

    Attributes:
        file, sha256 (`str`): Name and checksum.
        size (`int`): Bytes.
        sequences, tokens (`int`): S and R.
        truncation_kl, tail_mass (`float`): Sums over the predictions, see [`CacheReport`].
    """

    file: str
    sha256: str
    size: int
    sequences: int
    tokens: int
    truncation_kl: float
    tail_mass: float

    def __post_init__(self):
        if Path(self.file).name != self.file:  # nothing outside the folder is read
            raise ValueError(f"`file` is {self.file!r}, which is not the name of a file in the folder")


@dataclass
class Manifest:
    """`manifest.json`."""

    identity: Identity
    number_of_shards: int
    shards: dict[int, Shard] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.shards) == self.number_of_shards

    def write(self, folder: Path) -> None:
        """Replaces the folder's manifest in one step."""
        contents = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "identity": asdict(self.identity),
            "number_of_shards": self.number_of_shards,
            "shards": {str(number): asdict(shard) for number, shard in sorted(self.shards.items())},
        }
        write_file(folder / MANIFEST, (json.dumps(contents, indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """
        Reads a folder's manifest.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, of something else, or of another version of the format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no teacher cache in {folder}: it has no {MANIFEST}. Make one with `hf-rb cache-teacher`."
            )
        try:
            contents = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: it is not JSON. {REMEDY}") from error
        if not isinstance(contents, dict) or contents.get("format") != FORMAT:
            raise ValueError(f"{folder} is not a teacher cache: its {MANIFEST} belongs to something else.")
        if contents.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {contents.get('format_version')}, this hf_rb reads {FORMAT_VERSION}. "
                f"{REMEDY}"
            )
        try:
            shards = {int(number): _build(Shard, values) for number, values in contents["shards"].items()}
            return cls(_build(Identity, contents["identity"]), int(contents["number_of_shards"]), shards)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}. {REMEDY}") from error


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    names = {item.name for item in fields(kind)}
    if set(values) != names:
        raise ValueError(f"it should have {', '.join(sorted(names ^ set(values)))}")
    for item in fields(kind):
        kind_of: Any = item.type
        if not isinstance(values[item.name], kind_of):
            raise ValueError(f"`{item.name}` is {values[item.name]!r}")
    return kind(**values)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file that is on disk, whole, once it has its name."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Gives a written file its final name, on disk."""
    fsync_file(temporary)
    os.replace(temporary, path)
    fsync_file(path.parent)


def check_shard(folder: Path, shard: Shard, identity: Identity) -> None:
    """
    Reads a shard and refuses it unless one can train from it.

    Raises:
        ValueError: The file is missing, truncated or edited, or its values are not what a cache holds.
    """
    path = folder / shard.file
    if not path.is_file():
        raise ValueError(f"The teacher cache misses {path}. {REMEDY}")
    size = path.stat().st_size
    if size != shard.size:
        raise ValueError(f"{path} is truncated or edited: it has {size:,} bytes instead of {shard.size:,}. {REMEDY}")
    if sha256_file(path) != shard.sha256:
        raise ValueError(f"{path} has been edited since it was captured: its SHA-256 differs. {REMEDY}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}. {REMEDY}") from error
    problem = _problem(tensors, shard, identity)
    if problem:
        raise ValueError(f"{path} {problem}. {REMEDY}")


def _problem(tensors: dict[str, torch.Tensor], shard: Shard, identity: Identity) -> str | None:
    expected = {
        "keys": ((shard.sequences,), torch.int64),
        "counts": ((shard.sequences,), torch.int32),
        "positions": ((shard.tokens,), torch.int32),
        "ids": ((shard.tokens, identity.width), torch.uint16),
        "log_probs": ((shard.tokens, identity.width), CACHE_DTYPES[identity.dtype]),
        "rest": ((shard.tokens,), CACHE_DTYPES[identity.dtype]),
    }
    if identity.vocabulary > 1 << 16:
        expected["ids_high"] = ((shard.tokens, identity.width), torch.uint8)
    for name, (shape, dtype) in expected.items():
        if name not in tensors:
            return f"has no tensor `{name}`"
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
            found = f"{tuple(tensors[name].shape)} of {tensors[name].dtype}"
            return f"holds `{name}` as {found}, where the manifest (k={identity.k}) says {shape} of {dtype}"
    ids, counts = unpack_ids(tensors["ids"], tensors.get("ids_high")), tensors["counts"]
    if counts.sum() != shard.tokens or (counts < 0).any():
        return "counts other predictions than it holds"
    if len(ids) and ids.max() >= identity.vocabulary:
        return f"holds the token id {ids.max()}, outside the teacher's {identity.vocabulary:,}"
    ordered = np.sort(ids.numpy(), axis=-1)  # ten times as fast as torch's on a CPU
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return "holds a token id twice for one prediction"
    log_probs, rest = tensors["log_probs"], tensors["rest"]
    if not (log_probs.isfinite().all() and rest.isfinite().all()):
        return "holds log-probabilities that are not finite"
    mass = log_probs.float().exp_().sum(-1) + rest.float().exp()
    worst = (mass - 1).abs().max() if len(mass) else 0
    if worst > MASS_TOLERANCE[identity.dtype]:
        return f"holds probabilities that sum to {mass[(mass - 1).abs().argmax()]:.4f} for one prediction"
    return None

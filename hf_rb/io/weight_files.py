"""Files of a folder that are the model: those that `from_pretrained` loads, and no others that lie there.

A folder that was saved in shards and again in one file keeps the old index; one that was saved the other way round
keeps the old file; and files of other programs or precisions may lie beside them. `from_pretrained` takes the first of
these that is there:

    the file or index that `config.json` names as `transformers_weights`
    model.safetensors
    model.safetensors.index.json, for the shards it names
    pytorch_model.bin
    pytorch_model.bin.index.json, for the shards it names

With `variant="fp16"` the names have `.fp16` before their last suffix. Only the standard library is imported.
"""

import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


__all__ = ["INDEX", "SINGLE", "WeightFiles", "find_weights", "published_names", "weight_bytes", "weight_files"]

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
VARIANT = re.compile(r"model\.(?:safetensors\.index\.([^.]+)\.json|(?!safetensors)([^.]+)\.safetensors)")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model.

    Attributes:
        files (`list[Path]`): The files in the order in which they are loaded: of a tensor that two of them hold, the
            last one counts.
        index (`Path`, *optional*): The index that names them.
    """

    files: list[Path]
    index: Path | None = None


def find_weights(folder: str | Path, variant: str | None = None, subfolder: str = "") -> WeightFiles:
    """
    Returns the weight files that `from_pretrained(folder, variant=variant, subfolder=subfolder)` loads.

    Args:
        folder (`str` or `Path`):
            Model folder.
        variant (`str`, *optional*):
            Which of several files of the same model, such as `"fp16"`.
        subfolder (`str`, *optional*, defaults to `""`):
            Where in the folder the model is.

    Raises:
        FileNotFoundError: There is no config, there are no weights, or a shard that the index names is missing.
        ValueError: The index is damaged, or `config.json` names a file outside the folder.
    """
    folder = Path(folder, subfolder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json.")
    chosen = index = _chosen(folder, variant)
    if chosen.suffix != ".json":
        return WeightFiles([chosen])
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}). Copy or download it again.") from error
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}, which {index.name} names. Copy or download what is missing, or "
            "save the model once more in a new folder."
        )
    return WeightFiles([folder / name for name in shards], index)


def weight_files(folder: str | Path, variant: str | None = None, subfolder: str = "") -> WeightFiles:
    """As [`find_weights`], for a reader of safetensors files.

    Raises:
        FileNotFoundError, ValueError: As [`find_weights`], or the weights are in pickles.
    """
    found = find_weights(folder, variant, subfolder)
    if pickle := next((file for file in found.files if file.suffix != ".safetensors"), None):
        raise ValueError(
            f"{pickle.parent} has its weights in {pickle.name}, a pickle, of which hf_rb reads no tensor. Load the "
            "model with transformers' `from_pretrained` and write it with `save_pretrained` to another folder."
        )
    return found


def weight_bytes(folder: str | Path, variant: str | None = None, subfolder: str = "") -> int:
    """Returns the bytes of a model's weight files, of either format."""
    return sum(file.stat().st_size for file in find_weights(folder, variant, subfolder).files)


def published_names(folder: Path) -> set[str]:
    """Returns the names of all weight files and indices that somebody can load from the folder: those of each variant
    it has.

    Raises:
        FileNotFoundError, ValueError: As [`weight_files`], where a variant is not whole; there is at least one.
    """
    matches = filter(None, (VARIANT.fullmatch(path.name) for path in sorted(folder.iterdir())))
    variants: set[str | None] = {match[1] or match[2] for match in matches}
    if not variants or any((folder / name).is_file() for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX)):
        variants.add(None)
    found = [weight_files(folder, variant) for variant in variants]
    paths = [path for one in found for path in (*one.files, one.index) if path]
    return {path.relative_to(folder).as_posix() for path in paths}


def _chosen(folder: Path, variant: str | None) -> Path:
    """Returns the only weight file, or else the index of several, which ends in `.json`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if named := config.get("transformers_weights"):
        path = folder / named
        if not path.resolve().is_relative_to(folder.resolve()) or not named.endswith((".safetensors", INDEX_SUFFIX)):
            raise ValueError(
                f"{folder / 'config.json'} names {named!r} as `transformers_weights`: write a safetensors file in "
                "the folder, or remove it."
            )
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {named}, which its config.json names as `transformers_weights`.")
        return path
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        alone, of_shards = folder / _of_variant(single, variant), folder / _of_variant(index, variant)
        if alone.is_file() and of_shards.is_file():
            _say_what_is_left(alone, of_shards.name)
        if alone.is_file():
            return alone
        if of_shards.is_file():
            return of_shards
    raise FileNotFoundError(_nothing(folder, variant))


@cache
def _say_what_is_left(alone: Path, index: str) -> None:
    """Warns, once a folder, of weights that nobody loads: the model in shards may be the newer one."""
    logger.warning(
        f"{alone.parent} holds a model in one file ({alone.name}) and one in shards ({index}). The one file is "
        "taken, as `from_pretrained` does. Remove what is old, or save the model to a new folder."
    )


def _of_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _nothing(folder: Path, variant: str | None) -> str:
    """Says which weights a folder lacks, and what its owner may have meant."""
    lacks = f"{folder} has no {_of_variant(SINGLE, variant)} and no {_of_variant(INDEX, variant)}"
    names = sorted(path.name for path in folder.iterdir())
    others = [match[1] or match[2] for match in filter(None, map(VARIANT.fullmatch, names))]
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        others.append(None)
    if others:
        meant = f"variant={others[0]!r}" if others[0] else "no variant"
        return (
            f"{lacks}; it holds the weights of {meant}. Load the model with that (`from_pretrained(..., "
            "variant=...)`) and save it to another folder."
        )
    if shards := [name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]:
        return (
            f"{lacks}, which says how {shards[0]} and the other shards belong together. Copy or download it as well."
        )
    return (
        f"{lacks}: its weights are missing, or are pickles that were not downloaded. Copy or download them; of a "
        "model of the Hub that has only pickles, write another one with `from_pretrained` and `save_pretrained`."
    )

"""Rules for a recipe that grafts. Standard library only: `hf-rb check` runs this without torch."""

from collections.abc import Iterator
from typing import Any

from hf_rb import tiny


__all__ = ["graft_rules"]


def graft_rules(args: Any) -> Iterator[str]:
    """Yields what is wrong with the keys of a recipe for `hf-rb sft` that make it Shadow-FT."""
    if args.graft_onto is None:
        for name in ("graft_output_dir", "graft_include", "graft_dtype"):
            if getattr(args, name) is not None:
                yield f"`{name}` has no effect without `graft_onto`. Set it to the Instruct model, or remove `{name}`."
        return
    try:
        tiny.resolve(args.graft_onto)
    except ValueError as error:
        yield f"`graft_onto`: {error}"
    for name in ("chat_template_path", "eos_token"):
        if getattr(args, name) is not None:
            yield (
                f"`{name}` does not go with `graft_onto`, with whose tokenizer and chat template Base is trained: it "
                f"could add tokens that {args.graft_onto} does not have. Remove `{name}`."
            )
    if not args.use_peft:
        return
    if args.use_dora:
        yield (
            "`use_dora: true` does not go with `graft_onto`: a DoRA is another delta on another model. Remove "
            "`use_dora`."
        )
    if args.lora_modules_to_save:
        yield (
            "`lora_modules_to_save` does not go with `graft_onto`: whole modules of Base would replace the Instruct "
            "model's. Remove it, or tune all weights."
        )
    if args.lora_target_parameters:
        yield (
            "`lora_target_parameters` does not go with `graft_onto`: such adapters are merged in memory only. Use "
            "`lora_target_modules`."
        )

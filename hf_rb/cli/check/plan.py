"""Plan of a recipe on this machine: device and precision, steps and tokens, memory. Standard library only."""

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_rb.cli import schemas
from hf_rb.cli.check.memory import WEIGHT_BYTES, Architecture, Run, estimate, estimate_audit, peak
from hf_rb.io import data_files as data
from hf_rb.io.model_folder import local_folder
from hf_rb.methods.registry import methods
from hf_rb.recover.config import TRAINING
from hf_rb.utils.devices import cpu_arguments


__all__ = ["Plan", "make_plan", "recover_lines"]

# Tokens of a prompt where a recipe bounds the completion alone.
PROMPT_TOKENS = 256


@dataclass
class Plan:
    """A run before it starts, for one process.

    Attributes:
        device (`str`): `"cpu"`, `"cuda"` or `"mps"`.
        cpu_arguments (`list[str]`): What must be added to run on the CPU because no GPU was found.
        precision (`str`): `"float32"`, or the type of mixed precision.
        steps (`int`, *optional*): Optimizer steps; `None` where the data is not on this machine.
        sequences (`int`): Sequences of a step.
        length (`int`, *optional*): Tokens of a sequence at most; in on-policy training those of a completion.
        tokens (`int`, *optional*): Tokens of the run at most.
        memory (`dict[str, int]`, *optional*): Bytes by what they are for, where the model is on this machine.
        peak (`int`, *optional*): Highest sum of what is there at one moment, in bytes.
        missing (`list[str]`): Models without which memory cannot be estimated.
        estimated (`tuple`, *optional*): What the memory was estimated from, the arguments of [`estimate`].
    """

    device: str
    cpu_arguments: list[str]
    precision: str
    steps: int | None
    sequences: int
    length: int | None
    tokens: int | None
    memory: dict[str, int] | None
    peak: int | None
    missing: list[str]
    estimated: tuple[Architecture, Run, list] | None = None

    def as_dict(self) -> dict[str, Any]:
        shown = asdict(self) | {"largest": self.largest}
        del shown["estimated"]
        return shown

    def audit(self) -> "Plan":
        """Returns the plan of `hf-rb audit` for the same recipe."""
        if self.estimated is None:
            return self
        parts = estimate_audit(*self.estimated)
        return replace(self, memory=parts, peak=peak(parts, accumulates=False))

    @property
    def largest(self) -> str | None:
        return max(self.memory, key=self.memory.__getitem__) if self.memory else None

    def lines(self) -> Iterator[str]:
        """The plan for a reader."""
        why = f" (no GPU was found: the run gets `{' '.join(self.cpu_arguments)}`)" if self.cpu_arguments else ""
        yield f"device: {self.device}, {self.precision}{why}"
        steps = "as many steps as the data gives" if self.steps is None else f"{self.steps:,} steps"
        bound = "" if self.length is None else f" of at most {self.length:,} tokens"
        whole = "" if self.tokens is None else f": at most {self.tokens:,} tokens"
        yield f"plan: {steps} of {self.sequences:,} sequences{bound}{whole} (one process)"
        yield from self.memory_lines()

    def memory_lines(self) -> Iterator[str]:
        """Yields the lines about memory."""
        if self.memory:
            parts = sorted(self.memory, key=self.memory.__getitem__, reverse=True)
            listed = ", ".join(f"{part} {_size(self.memory[part])}" for part in parts if self.memory[part])
            yield (
                f"memory: about {_size(self.peak or 0)} a process, without sharding; the largest part is "
                f"{self.largest} ({listed})"
            )
        elif self.missing:
            verb = "is" if len(self.missing) == 1 else "are"
            yield f"memory: not estimated, as {' and '.join(self.missing)} {verb} not on this machine"

    def problems(self) -> Iterator[str]:
        """Yields the problems that may stop the run on this machine."""
        memory = _machine_memory()
        if self.device == "cpu" and not self.cpu_arguments and self.peak and memory and self.peak > memory:
            parts = self.memory or {}
            part = max(_REMEDIES, key=lambda name: parts.get(name, 0))
            yield (
                f"the run needs about {_size(self.peak)} and this machine has {_size(memory)}. The largest part that "
                f"a recipe decides is {part}: {_REMEDIES[part]}."
            )


_REMEDIES = {
    "weights": "write `dtype: bfloat16`, or take a smaller model",
    "gradients": "train adapters with `use_peft: true`",
    "optimizer": "train adapters with `use_peft: true`, or write `optim: adafactor`",
    "activations": "lower `per_device_train_batch_size` or `max_length`, or write `gradient_checkpointing: true`",
    "logits": "lower `per_device_train_batch_size`",
    "teacher": "write `teacher_model_init_kwargs: {dtype: bfloat16}`, or train from `hf-rb cache-teacher`",
    "cache": "lower `per_device_train_batch_size` or `max_completion_length`",
    "loading": "save the model once in the type that the run loads it in",
    "comparison": "lower `--batch_size`, or audit a smaller student",
}


def make_plan(args: Any, verb: str) -> Plan:
    """Plans a run.

    Args:
        args (`Any`): The recipe's values over their defaults, as attributes.
        verb (`str`): `"sft"`, `"gkd"`, `"distillation"` or `"grpo"`.
    """
    device = "cpu" if args.use_cpu else _device()
    added = cpu_arguments(args.use_cpu, args.fp16, args.bf16) if device == "cpu" else []
    fp16, bf16 = args.fp16, not args.fp16 if args.bf16 is None else args.bf16  # bfloat16 is TRL's default
    if "--bf16" in added:
        fp16 = bf16 = False
    half = fp16 or bf16
    precision = "float16 autocast" if fp16 else "bfloat16 autocast" if bf16 else "float32"

    generates = verb in ("grpo", "distillation")
    length = args.max_completion_length if generates else args.max_length
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = _steps(args, verb, sequences)
    tokens = None if steps is None or length is None else steps * sequences * length

    frozen_names = _frozen(args, verb)
    names = [args.model_name_or_path, *(name for name, _ in frozen_names)]
    folders = [local_folder(name) for name in names]
    plan = Plan(device, added, precision, steps, sequences, length, tokens, None, None, [])
    plan.missing = [name for name, folder in dict(zip(names, folders, strict=True)).items() if folder is None]
    if not plan.missing:
        model, *frozen = (Architecture.read(folder) for folder in folders if folder)
        run = _run(args, verb, "cpu" if device == "cpu" else "cuda", half, model)
        sizes = [
            WEIGHT_BYTES.get(_dtype(kwargs, one), 4) for one, (_, kwargs) in zip(frozen, frozen_names, strict=True)
        ]
        plan.estimated = model, run, list(zip(frozen, sizes, strict=True))
        plan.memory = estimate(*plan.estimated)
        plan.peak = peak(plan.memory, run.accumulates)
    return plan


def recover_lines(args: Any) -> Iterator[str]:
    """Returns the plan of a recipe for `hf-rb recover` on this machine, as lines for a reader."""
    given = {"gradient_accumulation_steps": 1, "max_steps": -1} | TRAINING | args.training
    device = _device()
    half = "float16" if given.get("fp16") else "bfloat16" if given.get("bf16", device != "cpu") else None
    where = "cpu (no GPU was found)" if device == "cpu" else device
    yield f"device: {where}; adapters are trained in {half + ' autocast' if half else 'float32'}"
    batch = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    for size in args.examples:
        steps = given["max_steps"] if given["max_steps"] > 0 else math.ceil(size / batch) * given["num_train_epochs"]
        bases = " on both bases, quantized and 3 bits" if args.baseline else ""
        yield (
            f"plan: {' and '.join(args.objectives)} on {size:,} examples, {math.ceil(steps):,} steps of {batch:,} "
            f"sequences each{bases}"
        )


def _run(args: Any, verb: str, device: str, half: bool, model: Architecture) -> Run:
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    size = WEIGHT_BYTES.get(_dtype({"dtype": args.dtype} | kwargs, model), 4)
    length = (
        (args.max_completion_length or 1024) + PROMPT_TOKENS
        if verb in ("grpo", "distillation")
        else args.max_length or 1024
    )
    generated = 0
    if verb in ("grpo", "distillation") and not args.use_vllm:
        generated = args.per_device_train_batch_size * (
            getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps
        )
    elif getattr(args, "lmbda", 0) > 0 or getattr(args, "seq_kd", False):
        generated = args.per_device_train_batch_size
    head = "trl" if verb in ("sft", "grpo") else "dense" if getattr(args, "loss_impl", None) == "dense" else "tiled"
    return Run(
        device=device,
        tokens=args.per_device_train_batch_size * length,
        length=length,
        weight_bytes=size,
        compute_bytes=2 if half else size,
        checkpointing=bool(args.gradient_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        optimizer=str(args.optim),
        targets=_targets(args, model) if args.use_peft else None,
        rank=args.lora_r,
        dropout=args.lora_dropout,
        eager="eager" in (args.attn_implementation, kwargs.get("attn_implementation")),
        head=head,
        quantized_bits=_quantized_bits(args, kwargs.get("quantization_config")),
        generated=generated,
    )


def _targets(args: Any, model: Architecture) -> list[str]:
    every = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")] + [
        "gate_proj"
    ] * model.gated
    names = args.lora_target_modules or ["q_proj", "v_proj"]
    return every if "all-linear" in names else list(names)


def _quantized_bits(args: Any, config: Any) -> float | None:
    """Bits of a weight in memory, scales included."""
    config = config if isinstance(config, dict) else {}
    if args.load_in_4bit or config.get("load_in_4bit"):
        return 4.5
    if args.load_in_8bit or config.get("load_in_8bit"):
        return 8.5
    method = str(config.get("quant_method"))
    if method not in methods("quantizer"):
        return None
    defaults = {key: entry.get("default") for key, entry in schemas.load(method).items()}
    return methods("quantizer")[method].method.memory_bits(SimpleNamespace(**defaults | config))


def _frozen(args: Any, verb: str) -> list[tuple[str, dict]]:
    """Names of teachers and references, with what they are loaded with."""
    found = []
    if verb in ("gkd", "distillation") and getattr(args, "teacher_cache", None) is None:
        teacher = args.teacher_model_name_or_path
        kwargs = args.teacher_model_init_kwargs if isinstance(args.teacher_model_init_kwargs, dict) else {}
        found += [(name, kwargs) for name in (teacher.values() if isinstance(teacher, dict) else [teacher])]
    if verb in ("gkd", "distillation") and args.objective == "gopd" and args.reward_scale != 1:
        # Without a name it is the student at its start; adapters that are switched off are one for free.
        if args.reference_model_name_or_path or not args.use_peft:
            found.append((args.reference_model_name_or_path or args.model_name_or_path, {}))
    if verb == "grpo" and args.beta and not args.use_peft:
        found.append((args.model_name_or_path, {"dtype": args.dtype}))
    return found


def _dtype(kwargs: dict, model: Architecture) -> str:
    name = str(kwargs.get("dtype") or "auto")
    return model.dtype if name == "auto" else name


def _steps(args: Any, verb: str, sequences: int) -> int | None:
    if args.max_steps > 0:
        return args.max_steps
    count = data.rows(args)
    if count is None or getattr(args, "packing", False):
        return None
    if verb == "grpo":
        count *= (args.num_generations or 1) * args.num_iterations
    return math.ceil(math.ceil(count / sequences) * args.num_train_epochs)


def _device() -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")):
        return "cuda"
    return "mps" if (platform.system(), platform.machine()) == ("Darwin", "arm64") else "cpu"


def _machine_memory() -> int | None:
    """Returns the bytes of memory, or `None` where Python cannot ask for them, as on Windows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"

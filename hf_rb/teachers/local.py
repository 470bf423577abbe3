"""Teachers that are models on this machine: one of its own, or the student without its adapters."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_rb import tiny
from hf_rb.ops.backbone import evaluating, model_inputs, width_of
from hf_rb.ops.lm_head import Head, TeacherLogits
from hf_rb.ops.lm_head_queries import lm_head_log_probs
from hf_rb.ops.logit_source import LogitSource
from hf_rb.ops.packing import Leak, measure_leak
from hf_rb.teachers.vocabulary import shared_vocabulary
from hf_rb.utils import compat


__all__ = ["AdapterOffTeacher", "LocalTeacher", "tokenizer_of"]

logger = logging.getLogger(__name__)


class _ModelTeacher:
    """Scores with a model; says in `_run` how a function of the unwrapped model gets called."""

    vocabulary: int | None = None

    def __init__(self) -> None:
        self._source = LogitSource()

    def _run(self, function: Callable[[PreTrainedModel], Any]) -> Any:
        raise NotImplementedError

    def is_head(self) -> bool:
        """Returns whether the model's logits are its last hidden states through its LM head. See
        [`~hf_rb.ops.logit_source.LogitSource`].
        """
        return self._run(self._source.is_head) if self._source.outcome is None else self._source.outcome

    def score(self, inputs: Mapping[str, Any], keep: torch.Tensor) -> list[TeacherLogits]:
        return self._run(lambda model: [TeacherLogits(*self._hidden_and_head(model, inputs, keep))])

    def log_probs(self, inputs: Mapping[str, Any], keep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        def score(model: PreTrainedModel) -> torch.Tensor:
            hidden, head = self._hidden_and_head(model, inputs, keep)
            return lm_head_log_probs(hidden, head, ids.to(hidden.device), vocabulary=self.vocabulary)

        return self._run(score)

    def logits(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return self._run(lambda model: model(**model_inputs(inputs), use_cache=False).logits)

    def _hidden_and_head(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], keep: torch.Tensor
    ) -> tuple[torch.Tensor, Head]:
        hidden = self._source.output(model, inputs)[0][:, :-1]
        with self._source.head(model) as head:
            if (
                is_deepspeed_zero3_enabled() and head.weight is not None
            ):  # it takes the whole head away when the context ends
                bias = None if head.bias is None else head.bias.clone()
                head = replace(head, weight=head.weight.clone(), bias=bias)
        # A model split by `device_map` may end on another device than the one the batch is on.
        return hidden[keep.to(hidden.device)].to(head.device), head


class LocalTeacher(_ModelTeacher):
    """
    A model of its own, of any width and type.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, folder, embedded model (`tiny:teacher`) or the model itself. It is frozen and put into evaluation
            mode.
        init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` when `model` is a name. `dtype` defaults to that of the checkpoint.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The teacher's tokenizer, which must give every id the meaning that the student's gives it. Defaults to the
            one saved with the model.

    Raises:
        ValueError: `init_kwargs` for a model that is loaded already.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        init_kwargs: dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if init_kwargs and not isinstance(model, str):
            raise ValueError(
                "The teacher is loaded already, so that its init kwargs cannot act. Pass its name, or no kwargs."
            )
        super().__init__()
        self.model: Any = tiny.resolve(model) if isinstance(model, str) else model  # a name until `prepare`
        self._init_kwargs: dict[str, Any] = {"dtype": "auto"} | (init_kwargs or {})
        self.tokenizer = tokenizer

    def prepare(self, trainer: Trainer) -> None:
        """
        Compares the vocabularies, loads the model if it was given by name, freezes it and places it as the student is.

        Raises:
            ValueError: The model is the student itself, or has another tokenizer.
        """
        student: Any = trainer.accelerator.unwrap_model(trainer.model)
        if self.model is student:
            raise ValueError(
                "Teacher and student are the same object. Load the teacher separately, or pass a deep copy."
            )
        # Before the weights are read, which may take minutes.
        self.vocabulary = self._shared_vocabulary(trainer.processing_class, width_of(student))
        if isinstance(self.model, str):
            # Between processes a model is not split by a device map; the wrapper places it.
            placement: dict[str, Any] = {"device_map": None} if trainer.accelerator.num_processes > 1 else {}
            self.model = compat.create_model_from_path(self.model, **self._init_kwargs | placement)
        self.model.requires_grad_(False).eval()
        if trainer.is_deepspeed_enabled:
            self.wrapped = compat.prepare_deepspeed(self.model, trainer.accelerator)
        else:
            self.wrapped = trainer.accelerator.prepare_model(self.model, evaluation_mode=True)
        self._unwrapped = trainer.accelerator.unwrap_model(self.wrapped)
        self._redirected = compat.ForwardRedirection()

    def _shared_vocabulary(self, processing_class: Any, student_width: int) -> int:
        hub = {key: self._init_kwargs[key] for key in ("revision", "trust_remote_code") if key in self._init_kwargs}
        if isinstance(self.model, str):
            name, width = self.model, AutoConfig.from_pretrained(self.model, **hub).get_text_config().vocab_size
        else:
            name, width = self.model.config._name_or_path, width_of(self.model)
        if self.tokenizer is None and name:
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(name, **hub)
            except (OSError, ValueError):
                pass
        if self.tokenizer is not None:
            return shared_vocabulary(
                tokenizer_of(processing_class), tokenizer_of(self.tokenizer), student_width, width
            )
        if width != student_width:
            raise ValueError(
                f"The teacher has {width:,} logits, the student {student_width:,}, and no tokenizer is saved with "
                "the teacher that could tell whether the ids agree. Pass `teacher=LocalTeacher(model, "
                "tokenizer=...)`."
            )
        logger.warning(
            "No tokenizer is saved with the teacher. It is taken to be the student's; pass "
            "`teacher=LocalTeacher(model, tokenizer=...)` to have the two compared."
        )
        return width

    def measure_leak(self, inputs: Mapping[str, Any]) -> Leak:
        """Returns how far the model keeps the sequences of a packed batch apart
        ([`~hf_rb.ops.packing.measure_leak`]).
        """
        return self._run(lambda model: measure_leak(model, inputs))

    @torch.no_grad()
    def _run(self, function: Callable[[PreTrainedModel], Any]) -> Any:
        self.wrapped.eval()
        # Through the wrapper's forward, which is where FSDP and DeepSpeed gather the parameters.
        return self._redirected(self.wrapped, self._unwrapped, function, self._unwrapped)


class AdapterOffTeacher(_ModelTeacher):
    """
    The student's own base model: the student with its adapters switched off, in evaluation mode. It needs no memory.

    Under FSDP or DeepSpeed, score inside the forward of the student's wrapper.
    """

    def prepare(self, trainer: Trainer) -> None:
        """
        Takes the trainer's model.

        Raises:
            ValueError: The model has no adapter that could be switched off.
        """
        self._student: Any = trainer.accelerator.unwrap_model(trainer.model)
        if not is_peft_model(self._student):
            raise ValueError(
                "The student has no adapters, so that without them it is its own teacher. Pass a `peft_config`, or "
                "another teacher."
            )

    @torch.no_grad()
    def _run(self, function: Callable[[PreTrainedModel], Any]) -> Any:
        with evaluating(self._student), self._student.disable_adapter():
            return function(self._student)


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class

"""What the mixins expect of the trainer that they are mixed into. Type checkers read it; at run time it is `object`."""

from typing import TYPE_CHECKING


__all__ = ["TrainerBelow"]

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainingArguments

    class TrainerBelow(Trainer):
        """A TRL trainer after its construction."""

        args: TrainingArguments
        model: PreTrainedModel
        accelerator: Accelerator
        processing_class: PreTrainedTokenizerBase | ProcessorMixin

        @property
        def _tag_names(self) -> list[str]: ...

        @property
        def _name(self) -> str: ...

        @property
        def _paper(self) -> dict[str, str]: ...

else:
    TrainerBelow = object

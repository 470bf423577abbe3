"""Classes below the mixins, as these expect them. Type checkers read it; at run time both are `object`."""

from typing import TYPE_CHECKING, Any


__all__ = ["ConfigBelow", "TrainerBelow"]

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
    from transformers.trainer_utils import TrainOutput

    class ConfigBelow(TrainingArguments):
        """A config of TRL after its construction."""

        output_dir: str  # pyrefly: ignore[bad-override-mutable-attribute]

        def __post_init__(self) -> None: ...

    class TrainerBelow:
        """A trainer of TRL after its construction."""

        accelerator: Accelerator
        args: ConfigBelow
        callback_handler: CallbackHandler
        control: TrainerControl
        hub_model_id: str | None
        model: PreTrainedModel
        processing_class: Any
        push_in_progress: Any
        state: TrainerState
        _fused_head_is_checked: bool
        _packing_is_checked: bool

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        @property
        def _tag_names(self) -> list[str]: ...

        @property
        def _name(self) -> str: ...

        @property
        def _paper(self) -> dict[str, str]: ...

        def add_callback(self, callback: TrainerCallback) -> None: ...

        def is_world_process_zero(self) -> bool: ...

        def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None: ...

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...

        def train(self, *args: Any, **kwargs: Any) -> TrainOutput: ...

        def _finish_current_push(self) -> None: ...

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any: ...

        def _get_output_dir(self, trial: Any) -> str: ...

        def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None: ...

else:
    ConfigBelow = TrainerBelow = object

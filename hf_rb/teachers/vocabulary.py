"""Compares the meaning of two models' token ids."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase


__all__ = ["shared_vocabulary"]


def shared_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase | Mapping[str, int],
    teacher_tokenizer: PreTrainedTokenizerBase | Mapping[str, int],
    student_width: int,
    teacher_width: int,
) -> int:
    """
    Compares two vocabularies token by token and returns the number of leading ids on which the models can be compared.

    Models of one family often pad the same vocabulary to different widths, and a newer member may name ids that an
    older one leaves empty. Neither matters. An id that has two names does, whatever the sizes.

    Args:
        student_tokenizer, teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `Mapping[str, int]`):
            Tokenizers, or what their `get_vocab()` returns.
        student_width, teacher_width (`int`):
            Number of logits of each model.

    Returns:
        `int`: The smaller width.

    Raises:
        ValueError: An id stands for two different tokens, or the student's tokenizer makes ids that the teacher does
            not have.
    """
    student, teacher = _tokens(student_tokenizer), _tokens(teacher_tokenizer)
    width = min(student_width, teacher_width)
    conflicts = [id for id, token in student.items() if id < width and teacher.get(id, token) != token]
    if conflicts:
        first = min(conflicts)
        raise ValueError(
            f"Student and teacher have different tokenizers: id {first} is {student[first]!r} to the student and "
            f"{teacher[first]!r} to the teacher ({len(conflicts):,} ids differ). Distillation compares probabilities "
            "id by id; take a teacher of the student's family, or TRL's GOLD trainer, which works across tokenizers."
        )
    beyond = [id for id in student if width <= id < student_width]
    if beyond:
        first = min(beyond)
        raise ValueError(
            f"The student's tokenizer has the token {student[first]!r} with id {first}, and the teacher ends at id "
            f"{width - 1}. Remove the tokens that were added to the student's tokenizer, or add them to the teacher "
            "(`teacher.resize_token_embeddings`)."
        )
    return width


def _tokens(tokenizer: PreTrainedTokenizerBase | Mapping[str, int]) -> dict[int, str]:
    vocabulary = tokenizer if isinstance(tokenizer, Mapping) else tokenizer.get_vocab()
    return {id: token for token, id in vocabulary.items()}

import pytest
from transformers import PreTrainedTokenizerFast

from hf_rb.teachers import shared_vocabulary


FAMILY = {"a": 0, "b": 1, "c": 2, "d": 3}


def test_padding_does_not_matter():
    assert shared_vocabulary(FAMILY, FAMILY, 8, 16) == 8
    assert shared_vocabulary(FAMILY, FAMILY, 16, 8) == 8


def test_an_id_that_one_leaves_empty_does_not_matter():
    assert shared_vocabulary(FAMILY, FAMILY | {"<think>": 4}, 8, 8) == 8
    assert shared_vocabulary(FAMILY | {"<think>": 4}, FAMILY, 8, 8) == 8


def test_tokenizers_of_equal_size_can_differ():
    other = {"a": 0, "b": 1, "d": 2, "c": 3}
    with pytest.raises(ValueError, match=r"id 2 is 'c' to the student and 'd' to the teacher \(2 ids differ\).*GOLD"):
        shared_vocabulary(FAMILY, other, 4, 4)


def test_tokens_added_to_the_student_alone():
    with pytest.raises(ValueError, match="the token '<new>' with id 4, and the teacher ends at id 3"):
        shared_vocabulary(FAMILY | {"<new>": 4}, FAMILY, 5, 4)


def test_reads_tokenizers(tokenizer):
    assert shared_vocabulary(tokenizer, tokenizer, len(tokenizer), len(tokenizer) + 5) == len(tokenizer)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    vocabulary = other.get_vocab()
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    with pytest.raises(ValueError, match="different tokenizers: id 300 is"):
        shared_vocabulary(tokenizer, vocabulary, len(tokenizer), len(tokenizer))

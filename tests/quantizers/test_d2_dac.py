import pytest
import torch
from helpers.tensors import gaussian

from hf_rb.quantizers.d2quant.maths.dac import MeanShift, fold


@pytest.fixture
def streams():
    student = gaussian(3, 20, 8)
    return student + 0.5 * gaussian(3, 20, 8, seed=1) + gaussian(8, seed=2), student


def gathered(teacher, student):
    shift = MeanShift(8)
    for teacher_batch, student_batch in zip(teacher, student, strict=True):
        shift.add(teacher_batch, student_batch)
    return shift


def test_bias_is_the_mean_of_what_was_lost(streams):
    teacher, student = streams
    shift = gathered(teacher, student)
    torch.testing.assert_close(shift.bias(), (teacher - student).mean((0, 1)))
    assert shift.tokens == 60


def test_every_channel_loses_exactly_the_square_of_its_mean(streams):
    teacher, student = (stream.double() for stream in streams)
    shift = gathered(teacher, student)
    corrected = gathered(teacher, student + shift.mean)
    torch.testing.assert_close(corrected.mean_square, shift.mean_square - shift.mean.square(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(shift.mean_square_with(shift.mean), corrected.mean_square, rtol=1e-12, atol=1e-15)


def test_clipped_bias(streams):
    teacher, student = (stream.double() for stream in streams)
    shift = gathered(teacher, student)
    bias = shift.bias(clip=0.25)
    assert bias.abs().max() == 0.25
    clipped = gathered(teacher, student + bias)
    torch.testing.assert_close(shift.mean_square_with(bias), clipped.mean_square)


def test_nothing_lost_is_nothing_corrected(streams):
    shift = gathered(streams[0], streams[0])
    assert not shift.bias().any() and not shift.mean_square.any()


def test_fold_is_the_bias_of_the_norm(streams):
    weight, bias, shift = gaussian(5, 8, dtype=torch.float64), gaussian(5, seed=1).double(), gaussian(8, seed=2)
    hidden = streams[0].double()
    expected = torch.nn.functional.linear(hidden + shift, weight, bias)
    got = torch.nn.functional.linear(hidden, weight, fold(weight, bias, shift))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert fold(weight.bfloat16(), None, shift).dtype == torch.float32

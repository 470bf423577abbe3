import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from hf_rb.methods.registry import find
from hf_rb.objectives.akl import AKL
from hf_rb.objectives.standard import ForwardKL
from hf_rb.ops.lm_head import Head, TeacherLogits, lm_head_loss
from hf_rb.ops.lm_head_queries import lm_head_top_k
from hf_rb.teachers import CachedTeacher, TrainerWithTeacher, bytes_per_token, cache_teacher


@pytest.fixture(scope="module")
def capturing(make_trainer):
    return make_trainer()


@pytest.fixture(scope="module")
def cache(capturing, tmp_path_factory):
    """A cache of several shards."""
    folder = tmp_path_factory.mktemp("cache") / "top8"
    cache_teacher(capturing, folder, k=8, dtype="float32", shard_tokens=100, batch_tokens=200)
    return folder


@pytest.fixture
def copied(cache, tmp_path):
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def test_cache_teacher_says_what_it_reads_of_a_trainer(capturing):
    assert get_type_hints(cache_teacher)["trainer"] is TrainerWithTeacher
    read = [name for name in vars(TrainerWithTeacher) if not name.startswith("_")]
    assert {"teacher", "train_dataset"} < set(read) and all(hasattr(capturing, name) for name in read)


def losses(trainer, teacher, batches, rule=None):
    """Losses and gradients of all batches under a teacher, by the token ids of the sequence's beginning up to the label."""
    rule, found = rule or ForwardKL(), {}
    torch.manual_seed(0)
    weight = torch.randn(trainer.model.config.vocab_size, 16)
    for batch, keep in batches(trainer):
        # Stands in for the student's backbone; the same for the same token, wherever it is.
        hidden = torch.nn.functional.embedding(batch["input_ids"][:, :-1][keep], weight).requires_grad_()
        scored = lm_head_loss(
            hidden, Head(weight), rule, {}, teacher.score(batch, keep), vocabulary=teacher.vocabulary
        )
        scored.loss.backward()
        positions = batch.get("position_ids", torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]))
        for index, loss, grad in zip(keep.nonzero(), scored.stats["loss"], hidden.grad, strict=True):
            row, place = index.tolist()
            start = place - positions[row, place].item()
            found[tuple(batch["input_ids"][row, start : place + 2].tolist())] = torch.cat([loss[None], grad])
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


# What it is for


@pytest.mark.parametrize("objective", ["forward_kl", "akl"])
def test_all_tokens_cached_is_the_teacher(capturing, batches, tmp_path, objective):
    report = cache_teacher(capturing, tmp_path, k=capturing.teacher.vocabulary, dtype="float32")
    assert report.truncation_kl == pytest.approx(0, abs=1e-5) and report.tail_mass == 0
    teacher, rule = CachedTeacher(tmp_path), find("objective", objective).load()()
    teacher.prepare(capturing)
    assert_same(losses(capturing, teacher, batches, rule), losses(capturing, capturing.teacher, batches, rule))


def test_shuffled_and_packed_batches_find_their_rows(capturing, make_trainer, cache, batches):
    teacher = CachedTeacher(cache)
    teacher.prepare(capturing)
    assert teacher.vocabulary == 1024
    expected = losses(capturing, teacher, batches)
    assert len(expected) > 200
    for config in (
        {"per_device_train_batch_size": 3, "seed": 5, "pad_to_multiple_of": 7},
        {"packing": True, "max_length": 96, "per_device_train_batch_size": 2},
    ):
        trainer = make_trainer(teacher=None, **config)
        teacher = CachedTeacher(cache)
        teacher.prepare(trainer)
        assert_same(losses(trainer, teacher, batches), expected)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_packing_that_cuts_sequences_is_captured_as_it_trains(make_trainer, batches, tmp_path, strategy):
    trainer = make_trainer(packing=True, packing_strategy=strategy)
    cache_teacher(trainer, tmp_path, k=1024, dtype="float32")
    teacher = CachedTeacher(tmp_path)
    teacher.prepare(trainer)
    assert_same(losses(trainer, teacher, batches), losses(trainer, trainer.teacher, batches))


def test_keeps_the_top_k_and_the_label(capturing, cache, batches):
    cached = CachedTeacher(cache)
    cached.prepare(capturing)
    for batch, keep in batches(capturing):
        events, labels = cached.score(batch, keep), batch["labels"][:, 1:][keep]
        log_probs = capturing.teacher.logits(batch)[:, :-1][keep][:, :1024].log_softmax(-1)
        assert events.ids.shape == (keep.sum(), 9) and events.ids.dtype == torch.int32
        assert (events.ids == labels[:, None]).any(-1).all()
        assert_close(log_probs.gather(-1, events.ids.long()), events.log_probs)
        assert_close(events.log_probs[:, :8], log_probs.topk(8).values)
        is_outside = (events.ids[:, :8] != labels[:, None]).all(-1)
        assert 0 < is_outside.sum() < len(is_outside)
        assert_close(events.log_probs[~is_outside], log_probs.topk(9).values[~is_outside])


def test_top_k_takes_temperatures_widths_and_nothing():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4), torch.randn(12, 4)
    top = lm_head_top_k(hidden, Head(weight, softcap=3.0), 3, torch.arange(5), vocabulary=10)
    logits = (3 * torch.tanh(hidden @ weight.T / 3))[:, :10]
    assert_close(top.log_probs, logits.log_softmax(-1).gather(-1, top.ids))
    assert_close(top.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert (
        lm_head_top_k(hidden, Head(weight), 40, torch.arange(5)).ids.sort(-1).values.tolist() == [list(range(12))] * 5
    )
    assert lm_head_top_k(hidden[:0], Head(weight), 3, torch.arange(0)).ids.shape == (0, 4)


def test_a_batch_without_labels(capturing, cache):
    teacher = CachedTeacher(cache)
    teacher.prepare(capturing)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    events = teacher.score(batch, torch.zeros(1, 2, dtype=torch.bool))
    assert events.ids.shape == (0, 9)
    hidden = torch.zeros(0, 4, requires_grad=True)
    loss = lm_head_loss(hidden, Head(torch.randn(1024, 4)), ForwardKL(), {}, events).loss
    loss.backward()
    assert loss == 0


def test_report_says_the_true_size_and_what_is_lost(capturing, batches, tmp_path):
    report = cache_teacher(capturing, tmp_path, k=8)
    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.file_bytes == files and report.bytes_per_token == files / report.tokens
    assert bytes_per_token(8, 1024) == 6 + 9 * 4 and bytes_per_token(64, 151_936, "float32") == 8 + 65 * 7
    divergences = []
    teacher = CachedTeacher(tmp_path)
    teacher.prepare(capturing)
    for batch, keep in batches(capturing):
        probs = capturing.teacher.logits(batch)[:, :-1][keep][:, :1024].double().softmax(-1)
        events = teacher.score(batch, keep)
        known = events.log_probs.double().exp()
        spread = (events.rest.double().exp() / (1024 - 9)).unsqueeze(-1).expand_as(probs)
        stored = spread.scatter(-1, events.ids.long(), known)
        divergences.append((probs * (probs / stored).log()).sum(-1))
    assert report.truncation_kl == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-3)
    assert report.tokens == sum(len(part) for part in divergences)


def test_vocabularies_of_more_than_16_bits(capturing, batches, tmp_path, monkeypatch):
    wide = 70_000
    head = Head(torch.randn(wide, 4))

    def score(inputs, keep):
        return [TeacherLogits(torch.nn.functional.one_hot(inputs["input_ids"][:, :-1][keep] % 4, 4).float(), head)]

    monkeypatch.setattr(capturing.teacher, "score", score)
    monkeypatch.setattr(capturing.teacher, "vocabulary", wide)
    monkeypatch.setattr(capturing.model.config, "vocab_size", wide)
    cache_teacher(capturing, tmp_path, k=8, dtype="float32")
    teacher = CachedTeacher(tmp_path)
    teacher.prepare(capturing)
    for batch, keep in batches(capturing):
        (part,), events = score(batch, keep), teacher.score(batch, keep)
        top = lm_head_top_k(part.hidden, part.head, 8, batch["labels"][:, 1:][keep])
        assert torch.equal(events.ids.long(), top.ids)
        assert_close(events.log_probs, top.log_probs)
        assert events.ids.max() > 1 << 16
    edit(tmp_path, ids_high=lambda high: high.fill_(1))
    refused(tmp_path, capturing, r"holds the token id \d+, outside the teacher's 70,000")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_teacher_that_is_sure(make_trainer, batches, tmp_path, dtype):
    """What it gives to the tokens that are not stored is less than the rounding of those that are."""
    trainer = make_trainer()
    with torch.no_grad():
        trainer.teacher.model.model.norm.weight.mul_(4.0)
    cache_teacher(trainer, tmp_path, k=24, dtype=dtype)
    teacher, rule = CachedTeacher(tmp_path), AKL()
    teacher.prepare(trainer)
    for batch, keep in batches(trainer):
        events, log_probs = (
            teacher.score(batch, keep),
            trainer.teacher.logits(batch)[:, :-1][keep][:, :1024].log_softmax(-1),
        )
        expected = log_probs.scatter(-1, events.ids.long(), -torch.inf).logsumexp(-1)
        assert expected.min() < -17
        assert_close(events.rest.float(), expected, rtol=1e-3, atol=1e-3)
    found = losses(trainer, teacher, batches, rule)
    assert all(values.isfinite().all() for values in found.values())


def test_evaluation_data_is_captured_too(make_trainer, data, tmp_path):
    other = data.select(range(6, 12))
    trainer = make_trainer(dataset=data.select(range(6)), eval_dataset={"one": other})
    cache_teacher(trainer, tmp_path, k=4)
    teacher = CachedTeacher(tmp_path)
    teacher.prepare(trainer)
    for batch in trainer.get_eval_dataloader("one"):
        keep = batch["labels"][:, 1:] != -100
        assert len(teacher.score(batch, keep).ids) == keep.sum()


def test_equal_sequences_with_equal_labels_are_stored_once(make_trainer, tmp_path):
    ids = [5, 6, 7, 8]
    rows = [{"input_ids": ids, "labels": [-100, -100, 7, 8]}] * 3 + [
        {"input_ids": ids, "labels": [-100, 6, -100, -100]}
    ]
    rows += [{"input_ids": [9, 10], "labels": [9, -100]}]
    trainer = make_trainer(dataset=Dataset.from_list(rows))
    report = cache_teacher(trainer, tmp_path, k=4)
    assert (report.sequences, report.tokens) == (2, 3)
    teacher = CachedTeacher(tmp_path)
    teacher.prepare(trainer)
    batch = {"input_ids": torch.tensor([ids, ids])}
    keep = torch.tensor([[True, False, False], [False, True, True]])
    local = trainer.teacher.log_probs(batch, keep, torch.tensor([6, 7, 8]))
    events = teacher.score(batch, keep)
    picked = events.log_probs[events.ids == torch.tensor([[6], [7], [8]])]
    assert_close(picked.float(), local, rtol=2e-3, atol=1e-3)


# Interrupted captures


def test_an_interrupted_capture_goes_on(capturing, cache, tmp_path, monkeypatch):
    settings = {"k": 8, "dtype": "float32", "shard_tokens": 100, "batch_tokens": 200}
    whole = json.loads((cache / "manifest.json").read_text())
    assert whole["number_of_shards"] >= 3
    calls, score = [], capturing.teacher.score

    def interrupted(inputs, keep):
        calls.append(keep.sum())
        if sum(calls) > 150:
            raise KeyboardInterrupt
        return score(inputs, keep)

    monkeypatch.setattr(capturing.teacher, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(capturing, tmp_path, **settings)
    monkeypatch.setattr(capturing.teacher, "score", score)
    with pytest.raises(ValueError, match=r"interrupted after \d of \d shards. Run the same `hf-rb cache-teacher`"):
        CachedTeacher(tmp_path).prepare(capturing)
    report = cache_teacher(capturing, tmp_path, **settings)
    assert 0 < report.shards_kept < report.shards
    assert json.loads((tmp_path / "manifest.json").read_text()) == whole
    older = whole | {"identity": whole["identity"] | {"model_name": "/of/an/earlier/version"}}
    (tmp_path / "manifest.json").write_text(json.dumps(older))
    again = cache_teacher(capturing, tmp_path, **settings)
    assert again.shards_kept == again.shards and again.truncation_kl == report.truncation_kl
    assert json.loads((tmp_path / "manifest.json").read_text()) == whole


def test_a_damaged_shard_is_captured_again(capturing, copied):
    damaged = copied / "shard-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    report = cache_teacher(capturing, copied, k=8, dtype="float32", shard_tokens=100, batch_tokens=200)
    assert report.shards_kept == report.shards - 1
    CachedTeacher(copied).prepare(capturing)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import time
from datasets import Dataset
from hf_rb import SFTConfig, SFTTrainer, tiny
from hf_rb.teachers import LocalTeacher, cache_teacher
data = tiny.load_dataset("math", config="prompt_completion", size=12)
config = SFTConfig({run!r}, use_cpu=True, bf16=False, report_to="none", max_length=96, disable_tqdm=True)
trainer = SFTTrainer({student!r}, config, train_dataset=data)
trainer.teacher = LocalTeacher({teacher!r})
trainer.teacher.prepare(trainer)
score = trainer.teacher.score
def slowly(*args):
    time.sleep(0.2)
    return score(*args)
trainer.teacher.score = slowly
cache_teacher(trainer, {folder!r}, k=8, dtype="float32", shard_tokens=100, batch_tokens=200)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_whole_shards(capturing, cache, models, tmp_path):
    folder = tmp_path / "cache"
    code = KILLED.format(tests=str(Path(__file__).parent), run=str(tmp_path / "run"), folder=str(folder), **models)
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (folder / "shard-00000.safetensors").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    report = cache_teacher(capturing, folder, k=8, dtype="float32", shard_tokens=100, batch_tokens=200)
    assert 0 < report.shards_kept < report.shards
    teacher = CachedTeacher(folder)
    teacher.prepare(capturing)
    assert json.loads((folder / "manifest.json").read_text()) == json.loads((cache / "manifest.json").read_text())


# What is refused


def refused(folder, trainer, match, kind=ValueError):
    with pytest.raises(kind, match=match):
        CachedTeacher(folder).prepare(trainer)


def edit(folder, number=0, checksum=True, **tensors):
    """Changes tensors of a shard, and its checksum so that only the values can give the change away."""
    path = folder / f"shard-{number:05d}.safetensors"
    found = load_file(path)
    save_file(found | {name: change(found[name].clone()) for name, change in tensors.items()}, path)
    if checksum:
        edit_manifest(
            folder,
            lambda contents: contents["shards"][str(number)].update(
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size
            ),
        )


def edit_manifest(folder, change):
    contents = json.loads((folder / "manifest.json").read_text())
    change(contents)
    (folder / "manifest.json").write_text(json.dumps(contents))


def at(value, row=3, column=2):
    def change(tensor):
        tensor[row, column] = value
        return tensor

    return change


def test_no_cache(capturing, tmp_path):
    refused(tmp_path, capturing, "There is no teacher cache in .*: it has no manifest.json", FileNotFoundError)


def test_something_else_s_manifest(capturing, tmp_path):
    (tmp_path / "manifest.json").write_text('{"format_version": 1, "files": {}}')
    refused(tmp_path, capturing, "is not a teacher cache: its manifest.json belongs to something else")


def test_a_truncated_manifest(capturing, copied):
    path = copied / "manifest.json"
    path.write_text(path.read_text()[:200])
    refused(copied, capturing, "manifest.json is damaged: it is not JSON. Capture it again")


def test_a_manifest_without_a_field(capturing, copied):
    edit_manifest(copied, lambda contents: contents["identity"].pop("k"))
    refused(copied, capturing, "manifest.json is damaged: it should have k")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("identity", {"k": "8"}, "`k` is '8'"),
        ("identity", {"dtype": "bfloat16"}, "no cache has `dtype: bfloat16`"),
        ("identity", {"temperature": 2.0}, "no cache has .*`temperature: 2.0`"),
        ("shard", {"tokens": None}, "`tokens` is None"),
        ("shard", {"file": "../shard-00000.safetensors"}, ".*is not the name of a file in the folder"),
    ],
)
def test_a_manifest_of_wrong_values(capturing, copied, part, values, message):
    def change(contents):
        (contents["identity"] if part == "identity" else contents["shards"]["0"]).update(values)

    edit_manifest(copied, change)
    refused(copied, capturing, f"manifest.json is damaged: {message}")


def test_another_format_version(capturing, copied):
    edit_manifest(copied, lambda contents: contents.update(format_version=2))
    refused(copied, capturing, "has format version 2, this hf_rb reads 1")


def test_a_truncated_shard(capturing, copied):
    path = copied / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(copied, capturing, r"shard-00001.safetensors is truncated or edited: it has [\d,]+ bytes instead of")


def test_an_edited_shard(capturing, copied):
    edit(copied, checksum=False, log_probs=at(-1.0))
    refused(copied, capturing, "shard-00000.safetensors has been edited since it was captured: its SHA-256 differs")


def test_a_missing_shard(capturing, copied):
    (copied / "shard-00002.safetensors").unlink()
    refused(copied, capturing, "The teacher cache misses .*shard-00002.safetensors")


def test_not_a_safetensors_file(capturing, copied):
    path = copied / "shard-00000.safetensors"
    path.write_bytes(b"\xff" * 100)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(copied, lambda contents: contents["shards"]["0"].update(sha256=checksum, size=100))
    refused(copied, capturing, "is not a safetensors file")


VALUES = {
    "id too large": ({"ids": at(1024)}, "holds the token id 1024, outside the teacher's 1,024"),
    "id twice": (
        {"ids": lambda ids: torch.cat([ids[:, :1], ids[:, :1], ids[:, 2:]], dim=1)},
        "holds a token id twice",
    ),
    "mass": ({"log_probs": at(0.0)}, r"holds probabilities that sum to [12]\.\d+ for one prediction"),
    "too little mass": ({"rest": lambda rest: rest.fill_(-9.0)}, r"holds probabilities that sum to 0\.\d+ for one"),
    "nan": ({"log_probs": at(float("nan"))}, "holds log-probabilities that are not finite"),
    "infinite": ({"log_probs": at(float("-inf"))}, "holds log-probabilities that are not finite"),
    "width": (
        {"ids": lambda ids: ids[:, :5].contiguous()},
        r"holds `ids` as \(\d+, 5\) of torch.uint16, where the manifest",
    ),
    "dtype": ({"log_probs": lambda x: x.half()}, r"holds `log_probs` as .* of torch.float16, where the manifest"),
    "counts": ({"counts": lambda counts: counts + 1}, "counts other predictions than it holds"),
}


@pytest.mark.parametrize("case", VALUES)
def test_wrong_values(capturing, copied, case):
    change, message = VALUES[case]
    edit(copied, **change)
    refused(copied, capturing, message)


def test_another_k_in_the_manifest(capturing, copied):
    edit_manifest(copied, lambda contents: contents["identity"].update(k=16))
    refused(
        copied, capturing, r"holds `ids` as \(\d+, 9\) of torch.uint16, where the manifest \(k=16\) says \(\d+, 17\)"
    )


def test_another_max_length(make_trainer, cache):
    trainer = make_trainer(teacher=None, max_length=64)
    refused(cache, trainer, "captured with `max_length: 96`, and training has `max_length: 64`")


def test_an_edited_vocabulary(capturing, copied):
    (copied / "vocabulary.json").write_text("{}")
    refused(copied, capturing, "vocabulary.json has been edited since the capture")


def test_another_tokenizer(capturing, copied):
    path = copied / "vocabulary.json"
    vocabulary = json.loads(path.read_text())
    tokens = sorted(vocabulary, key=vocabulary.get)
    path.write_text(json.dumps({token: number for number, token in enumerate([tokens[1], tokens[0], *tokens[2:]])}))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(copied, lambda contents: contents["identity"].update(tokenizer=checksum))
    refused(copied, capturing, "different tokenizers: id 0 is .* to the student and .* to the teacher")


def test_a_student_that_is_narrower_than_the_capture(capturing, copied):
    edit_manifest(copied, lambda contents: contents["identity"].update(vocabulary=1048))
    refused(copied, capturing, r"holds probabilities over 1,048 ids, and this student has 1,024. Capture it again")


def test_a_sequence_that_is_not_there(capturing, cache):
    teacher = CachedTeacher(cache)
    teacher.prepare(capturing)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    message = "does not have the sequence of 3 tokens that begins with the ids 5, 6, 7. Run `hf-rb cache-teacher` with the data,"
    with pytest.raises(ValueError, match=message):
        teacher.score(batch, torch.tensor([[False, True]]))
    trainer_template, capturing.processing_class.chat_template = capturing.processing_class.chat_template, "other"
    try:
        teacher.prepare(capturing)
    finally:
        capturing.processing_class.chat_template = trainer_template
    with pytest.raises(ValueError, match="The chat template is another one than at the capture"):
        teacher.score(batch, torch.tensor([[False, True]]))


def test_labels_that_were_not_captured(make_trainer, cache, batches):
    trainer = make_trainer(teacher=None, completion_only_loss=False)
    teacher = CachedTeacher(cache)
    teacher.prepare(trainer)
    with pytest.raises(ValueError, match="not all predictions trained on.*`completion_only_loss`"):
        teacher.score(*next(batches(trainer)))


# What a capture refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "`k` must be a whole number from 1; got 0"),
        ({"dtype": "bfloat16"}, "`dtype` cannot be 'bfloat16'; it must be one of 'float16', 'float32'"),
        ({"shard_tokens": 1.5}, "`shard_tokens` must be a whole number from 1; got 1.5"),
    ],
)
def test_capture_refuses_arguments(capturing, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        cache_teacher(capturing, tmp_path, **arguments)


def test_capture_refuses_another_capture_s_folder(capturing, copied):
    with pytest.raises(FileExistsError, match="teacher cache with `k: 8` where this one has `k: 4`.*--overwrite"):
        cache_teacher(capturing, copied, k=4, dtype="float32", shard_tokens=100)
    report = cache_teacher(capturing, copied, k=4, dtype="float32", overwrite=True)
    assert report.shards_kept == 0
    assert sorted(path.name for path in copied.iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
        "vocabulary.json",
    ]


def test_capture_does_not_mix_teachers_or_data(make_trainer, data, copied):
    settings = {"k": 8, "dtype": "float32", "shard_tokens": 100}
    trainer = make_trainer()
    with torch.no_grad():
        trainer.teacher.model.model.norm.weight.mul_(1.01)
    with pytest.raises(FileExistsError, match="teacher cache with `model: [0-9a-f]{64}` where this one has `model: "):
        cache_teacher(trainer, copied, **settings)
    with pytest.raises(FileExistsError, match="teacher cache with `data: "):
        cache_teacher(make_trainer(dataset=data.select(range(6))), copied, **settings)
    with pytest.raises(FileExistsError, match="teacher cache with `data: "):
        cache_teacher(make_trainer(completion_only_loss=False), copied, **settings)


def test_capture_refuses_a_damaged_manifest_and_may_replace_it(capturing, copied):
    (copied / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        cache_teacher(capturing, copied, k=4)
    assert cache_teacher(capturing, copied, k=4, overwrite=True).shards_kept == 0


def test_capture_refuses_a_folder_of_something_else(capturing, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty, and holds no teacher cache"):
        cache_teacher(capturing, tmp_path, k=4, overwrite=True)


def test_capture_refuses_streams_and_unlabelled_data(make_trainer, capturing, cache, tmp_path, monkeypatch):
    cached = CachedTeacher(cache)
    cached.prepare(capturing)
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "teacher", cached)
        with pytest.raises(
            ValueError, match="type CachedTeacher cannot be captured. Set `teacher_model_name_or_path`"
        ):
            cache_teacher(capturing, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "train_dataset", capturing.train_dataset.to_iterable_dataset())
        with pytest.raises(ValueError, match="A streamed dataset cannot be captured"):
            cache_teacher(capturing, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "train_dataset", Dataset.from_list([{"input_ids": [5, 6], "labels": [5, -100]}]))
        with pytest.raises(ValueError, match="The data has no label"):
            cache_teacher(capturing, tmp_path)


def test_capture_refuses_several_processes(capturing, tmp_path, monkeypatch):
    monkeypatch.setattr(type(capturing.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match="captured by one process.*`teacher_model_init_kwargs: {device_map: auto}`"):
        cache_teacher(capturing, tmp_path)


def test_capture_refuses_a_teacher_that_gives_nan(capturing, tmp_path, monkeypatch):
    def broken(inputs, keep):
        return [TeacherLogits(torch.full((int(keep.sum()), 4), float("nan")), Head(torch.randn(1024, 4)))]

    monkeypatch.setattr(capturing.teacher, "score", broken)
    with pytest.raises(ValueError, match=r"logits are not numbers \(NaN\).*dtype: float32"):
        cache_teacher(capturing, tmp_path, k=4)


def test_impossible_tokens_are_stored_as_finite_zeros(capturing, tmp_path, monkeypatch):
    bias = torch.zeros(1024)
    bias[10:] = float("-inf")

    def partial(inputs, keep):
        return [TeacherLogits(torch.randn(int(keep.sum()), 4), Head(torch.randn(1024, 4), bias))]

    monkeypatch.setattr(capturing.teacher, "score", partial)
    report = cache_teacher(capturing, tmp_path, k=64)
    assert report.tail_mass == pytest.approx(0, abs=1e-5)
    CachedTeacher(tmp_path).prepare(capturing)

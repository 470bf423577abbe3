"""A model that ties its head to the embedding meets one with a head of its own; and results that would lack a tensor."""

import json

import pytest
import torch
from helpers.pairwise import pairwise
from helpers.random_models import save_qwen3
from helpers.raw_models import noise, read, write
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_rb.io.skeleton import loading_problem
from hf_rb.weights import graft, interpolate, refine
from hf_rb.weights.source import Source, with_ties_of


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 1}
IDS = torch.arange(1, 9)[None]


def model(folder, tied, seed, **config):
    return save_qwen3(folder, seed=seed, tie_word_embeddings=tied, **SMALL | config)


@pytest.fixture
def tied(tmp_path):
    return model(tmp_path / "tied", True, 1)


@pytest.fixture
def untied(tmp_path):
    return model(tmp_path / "untied", False, 2)


def full(folder):
    """All tensors of a model by the names of one whose head is not tied."""
    tensors = read(folder)
    return tensors | {HEAD: tensors.get(HEAD, tensors[EMBEDDING])}


def assert_whole(folder, expected):
    """The model has these tensors, whoever loads it and how often; nothing is made at random."""
    loads = [AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True) for _ in range(2)]
    for loaded, info in loads:
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        state = loaded.state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, msg=name)
    assert torch.equal(*(loaded(IDS).logits for loaded, _ in loads))
    own = not torch.equal(expected[HEAD], expected[EMBEDDING])
    assert loads[0][0].config.tie_word_embeddings is not own
    return loads[0][0]


@pytest.mark.parametrize("files_from", ["start", "end"])
@pytest.mark.parametrize("order", ["tied first", "untied first"])
def test_interpolating(tmp_path, tied, untied, order, files_from):
    pair = (tied, untied) if order == "tied first" else (untied, tied)
    report = interpolate(*pair, tmp_path / "out", 0.25, files_from=files_from)
    start, end = map(full, pair)
    assert_whole(tmp_path / "out", {name: torch.lerp(start[name], end[name], 0.25) for name in start})
    if order == "tied first":
        (note,) = report.notes
        assert note == (
            "start ties its head to the embedding, end does not: the result has lm_head.weight for a head of its own, and start puts "
            "model.embed_tokens.weight into it."
        )
    assert {row.name for row in report.tensors if row.kept is None} == start.keys()


@pytest.mark.parametrize("files_from", ["start", "end"])
def test_the_ends_are_the_models(tmp_path, tied, untied, files_from):
    interpolate(tied, untied, tmp_path / "sweep", [0.0, 0.5, 1.0], files_from=files_from)
    logits = {}
    for lam, folder in ((0, tied), (1, untied)):
        result = assert_whole(tmp_path / "sweep" / f"lambda-{lam}", full(folder))
        logits[lam] = result(IDS).logits
        assert torch.equal(logits[lam], AutoModelForCausalLM.from_pretrained(folder)(IDS).logits)
    start, end = full(tied), full(untied)
    assert_whole(tmp_path / "sweep" / "lambda-0.5", {name: torch.lerp(start[name], end[name], 0.5) for name in start})


@pytest.mark.parametrize("files_from", ["start", "end"])
@pytest.mark.parametrize("include", ["linear", "norm", "head", "all"])
def test_what_is_not_included_stays_the_start_s(tmp_path, tied, untied, include, files_from):
    interpolate(tied, untied, tmp_path / "out", 0.5, files_from=files_from, include=include)
    start, end = full(tied), full(untied)
    mean = {name: torch.lerp(start[name], end[name], 0.5) for name in start}
    chosen = {"linear": "_proj", "norm": "norm", "head": "lm_head", "all": ""}[include]
    assert_whole(tmp_path / "out", {name: mean[name] if chosen in name else start[name] for name in start})


def test_what_does_not_fit_is_skipped_and_the_result_is_whole(tmp_path, tied):
    longer = model(tmp_path / "longer", False, 2, vocab_size=70)
    report = interpolate(tied, longer, tmp_path / "out", 0.5, mismatch="skip", files_from="start")
    assert any("differs in shape" in note for note in report.notes)
    start, end = full(tied), full(longer)
    rows = (HEAD, EMBEDDING)
    assert_whole(tmp_path / "out", {n: start[n] if n in rows else torch.lerp(start[n], end[n], 0.5) for n in start})


@pairwise(("onto_tied", [True, False]), ("base_tied", [True, False]), ("tuned_tied", [True, False]))
def test_graft(tmp_path, onto_tied, base_tied, tuned_tied):
    folders = [
        model(tmp_path / name, is_tied, seed)
        for seed, (name, is_tied) in enumerate(
            [("tuned", tuned_tied), ("onto", onto_tied), ("base", base_tied)], start=1
        )
    ]
    tuned, onto, base = map(full, folders)
    expected = {name: onto[name] + (tuned[name] - base[name]) for name in onto}
    graft(folders[0], folders[1], tmp_path / "all", base=folders[2], include="all")
    assert_whole(tmp_path / "all", expected)
    graft(folders[0], folders[1], tmp_path / "linear", base=folders[2])
    assert_whole(tmp_path / "linear", {n: expected[n] if "_proj" in n else onto[n] for n in onto})


@pytest.mark.parametrize("model_tied", [True, False])
def test_timber(tmp_path, model_tied):
    folders = [model(tmp_path / name, name[0] == "t", seed) for seed, name in enumerate(["tied", "untied"], start=1)]
    instruct, base = folders if model_tied else folders[::-1]
    refine(base, instruct, tmp_path / "out", 1.0, include="all")
    assert_whole(tmp_path / "out", full(instruct))
    refine(base, instruct, tmp_path / "refined", 0.0, include="all", overwrite=True)
    # A tail of the head of its own: the same as of three plain tensors.
    tensors = {name: full(folder)[HEAD] for name, folder in (("base", base), ("model", instruct))}
    plain = [write(tmp_path / f"plain-{name}", {HEAD: tensor}) for name, tensor in tensors.items()]
    refine(*plain, tmp_path / "head", 0.0, include="all")
    torch.testing.assert_close(read(tmp_path / "refined")[HEAD], read(tmp_path / "head")[HEAD])


def test_a_head_that_equals_its_embedding_is_none_of_its_own(tmp_path, tied):
    other = AutoModelForCausalLM.from_pretrained(model(tmp_path / "other", True, 3))
    other.config.tie_word_embeddings = False
    other.save_pretrained(
        tmp_path / "stored-twice", state_dict=other.state_dict() | {HEAD: other.lm_head.weight.clone()}
    )
    assert HEAD in read(tmp_path / "stored-twice")
    report = interpolate(tied, tmp_path / "stored-twice", tmp_path / "out", 0.5, files_from="end")
    assert not report.notes and HEAD not in read(tmp_path / "out")
    start, end = full(tied), full(tmp_path / "stored-twice")
    assert_whole(tmp_path / "out", {name: torch.lerp(start[name], end[name], 0.5) for name in start})
    interpolate(tmp_path / "stored-twice", tied, tmp_path / "back", 0.5, files_from="end")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False


def test_what_the_configuration_leaves_out_is_the_architecture_s(tmp_path):
    sizes = dict(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    folders = tmp_path / "tied", tmp_path / "untied"
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=folder.name == "tied")).save_pretrained(folder)
    config = json.loads((folders[0] / "config.json").read_text())
    del config["tie_word_embeddings"]  # as in GPT-2's own repository
    (folders[0] / "config.json").write_text(json.dumps(config))
    interpolate(*folders, tmp_path / "out", 0.5, files_from="start")
    start, end = map(read, folders)
    start[HEAD] = start["transformer.wte.weight"]
    assert_whole_gpt2 = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not assert_whole_gpt2[1]["missing_keys"]
    torch.testing.assert_close(assert_whole_gpt2[0].state_dict()[HEAD], torch.lerp(start[HEAD], end[HEAD], 0.5))
    assert assert_whole_gpt2[0].config.tie_word_embeddings is False


def test_nested_configurations_are_untied_as_a_whole():
    config = {"a": 1, "tie_word_embeddings": True, "text_config": {"b": 2}}
    assert with_ties_of(config, None) == {
        "a": 1,
        "tie_word_embeddings": False,
        "text_config": {"b": 2, "tie_word_embeddings": False},
    }
    assert with_ties_of(config, {"text_config": {"tie_word_embeddings": True}}) == {
        "a": 1,
        "text_config": {"b": 2, "tie_word_embeddings": True},
    }


def test_a_result_that_would_lack_a_tensor_is_refused(tmp_path, tied):
    """Nobody has to have thought of the reason: here, biases that only one configuration asks for."""
    other = model(tmp_path / "other", True, 2, attention_bias=True)
    with pytest.raises(
        ValueError,
        match=r"tensors of start and the configuration of end, would be no whole model: it has no "
        r"model.layers.0.self_attn.k_proj.bias.* which Qwen3ForCausalLM needs. Write `files_from=\"start\"`",
    ):
        interpolate(tied, other, tmp_path / "out", include="_proj.weight", files_from="end")
    assert not (tmp_path / "out").exists()
    interpolate(tied, other, tmp_path / "out", include="_proj.weight", files_from="start")
    assert_whole(
        tmp_path / "out",
        full(tied) | {n: (full(tied)[n] + full(other)[n]) / 2 for n in full(tied) if "_proj.weight" in n},
    )


def test_loading_is_asked_of_transformers(tmp_path, tied, untied, capfd):
    source = Source("model", untied)
    assert loading_problem(source.config, source.entries) is None
    assert "transformers does not load it" in loading_problem({"model_type": "no such"}, source.entries)
    source = Source("model", tied)
    untied_config = with_ties_of(source.config, None)
    assert loading_problem(untied_config, source.entries) == "it has no lm_head.weight, which Qwen3ForCausalLM needs"
    assert capfd.readouterr().err == ""
    del source.entries["model.norm.weight"]
    assert "model.norm.weight" in loading_problem(source.config, source.entries)


def test_heads_without_known_names_are_refused_and_named(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    folders = [tmp_path / "tied", tmp_path / "untied"]
    for folder in folders:
        BertForMaskedLM(BertConfig(**sizes, tie_word_embeddings=folder.name == "tied")).save_pretrained(folder)
    message = r"start ties its head to the embedding, and end has one of its own \(cls.predictions.decoder.bias, cls.*weight\)"
    with pytest.raises(ValueError, match=message):
        interpolate(*folders, tmp_path / "out", files_from="start")
    with pytest.raises(
        ValueError, match=message.replace("start", "END").replace("end", "start").replace("END", "end")
    ):
        interpolate(*folders[::-1], tmp_path / "out", files_from="start")


class TestReasons:
    def test_no_reason_is_made_up(self, tmp_path, untied):
        """A tensor that no parameter is made of, as the inverse frequencies in old Llama files."""
        tensors = read(untied)
        save_file(tensors | {"model.layers.0.inv_freq": torch.ones(4)}, untied / "model.safetensors", {"format": "pt"})
        other = model(tmp_path / "other", False, 3)
        with pytest.raises(
            ValueError, match="start has no model.layers.0.inv_freq, which end has. Give models of one shape"
        ):
            interpolate(other, untied, tmp_path / "out")

    def test_padded_vocabularies(self, tmp_path):
        folders = [
            save_qwen3(tmp_path / f"{rows}", seed=rows, padding=rows, hidden_size=32, head_dim=16) for rows in (0, 7)
        ]
        rows = [read(folder)[EMBEDDING].shape[0] for folder in folders]
        message = rf"rows behind the [\d,]+ tokens are padding: give start as many \(`model.resize_token_embeddings\({rows[1]}\)`"
        with pytest.raises(ValueError, match=message):
            interpolate(*folders, tmp_path / "out", files_from="start")
        few = AutoModelForCausalLM.from_pretrained(folders[0])
        few.resize_token_embeddings(rows[1])
        few.save_pretrained(folders[0])
        interpolate(*folders, tmp_path / "out", 0.5, files_from="start")
        assert read(tmp_path / "out")[EMBEDDING].shape[0] == rows[1]

    def test_other_names_of_the_same_parameters(self, tmp_path):
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        sizes = SMALL | dict(
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
        )
        moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
        moe.save_pretrained(tmp_path / "experts")
        moe.save_pretrained(tmp_path / "fused", save_original_format=False)
        with pytest.raises(ValueError, match=r"same parameters under other names .*save_original_format=False"):
            interpolate(tmp_path / "experts", tmp_path / "fused", tmp_path / "out")
        for name in ("experts", "fused"):  # what the message says
            AutoModelForCausalLM.from_pretrained(tmp_path / name).save_pretrained(
                tmp_path / f"{name}-2", save_original_format=False
            )
        interpolate(tmp_path / "experts-2", tmp_path / "fused-2", tmp_path / "out")

    def test_other_names_of_a_vision_model(self, tmp_path):
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        text = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        llava = LlavaForConditionalGeneration(
            LlavaConfig(text_config=text, vision_config=vision, image_token_index=39)
        )
        llava.save_pretrained(tmp_path / "old")
        llava.save_pretrained(tmp_path / "new", save_original_format=False)
        with pytest.raises(ValueError, match=r"language_model.* are both of .*save_original_format=False"):
            interpolate(tmp_path / "old", tmp_path / "new", tmp_path / "out")

    def test_pickles(self, tmp_path):
        folder = write(tmp_path / "model", {HEAD: noise(4, 4)})
        torch.save(read(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(
            ValueError, match="a pickle, of which hf_rb reads no tensor. Load the model with transformers'"
        ):
            interpolate(folder, folder, tmp_path / "out")

"""The streaming engine: results as by arithmetic on whole tensors, whatever the shards; refusals; kills; memory."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers.random_models import save_qwen3
from helpers.raw_models import noise, read, write
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb.io.safetensors import Entry
from hf_rb.weights import engine, graft, interpolate, operation, refine
from hf_rb.weights.patterns import matcher


def layers(seed=0, dtype=torch.float32, vocabulary=40, **more):
    """Tensors with the usual names of a model with two layers."""
    shapes = {
        "model.embed_tokens.weight": (vocabulary, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (vocabulary, 16),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (24, 16),
            f"{prefix}.self_attn.q_proj.bias": (24,),
            f"{prefix}.mlp.down_proj.weight": (16, 32),
            f"{prefix}.mlp.gate.weight": (4, 16),
            f"{prefix}.input_layernorm.weight": (16,),
        }
    return {name: noise(*shape, seed=seed + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())} | more


@pytest.fixture
def pair(tmp_path):
    """Two models of one shape, in different shards."""
    return write(tmp_path / "start", layers(0), shards=3), write(tmp_path / "end", layers(100), shards=2)


def test_operation_the_documented_example_averages(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, folder in zip("ab", pair, strict=True):
        folder.rename(name)
    (example,) = re.findall(r"```python\n(.*?)```", operation.__doc__, re.DOTALL)
    names = vars(operation).copy()
    exec(example, names)
    one, other, result = (read(tmp_path / name) for name in ("a", "b", "average"))
    changed = {name for name in one if not torch.equal(result[name], one[name])}
    assert changed == {row.name for row in names["report"].tensors if row.kept is None} and len(changed) == 6
    assert all(torch.equal(result[name], 0.5 * (one[name] + other[name])) for name in changed)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


class TestInterpolating:
    def test_shards_of_different_layouts(self, pair, tmp_path):
        report = interpolate(*pair, tmp_path / "out", 0.3)
        start, end, merged = read(pair[0]), read(pair[1]), read(tmp_path / "out")
        assert merged.keys() == start.keys()
        for name in start:
            torch.testing.assert_close(merged[name], 0.7 * start[name] + 0.3 * end[name])
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / file, "pt") as opened:
                assert name in opened.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in start.values())
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        by_name = {row.name: row.measured for row in report.tensors}
        difference = end["lm_head.weight"] - start["lm_head.weight"]
        assert by_name["lm_head.weight"]["difference"] == pytest.approx(difference.norm().item(), rel=1e-5)
        assert by_name["lm_head.weight"]["change"] == pytest.approx(0.3 * difference.norm().item(), rel=1e-4)
        assert report.norm("change") == pytest.approx(0.3 * report.norm("difference"), rel=1e-4)

    def test_a_real_model_loads_and_computes_the_same(self, tmp_path):
        folders = [save_qwen3(tmp_path / name, seed=seed) for seed, name in enumerate(["start", "end"])]
        AutoModelForCausalLM.from_pretrained(folders[1]).save_pretrained(folders[1], max_shard_size="50KB")
        (folders[1] / "model.safetensors").unlink(missing_ok=True)
        interpolate(*folders, tmp_path / "out", 0.25)
        models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (*folders, tmp_path / "out")]
        parameters = [dict(model.named_parameters()) for model in models]
        with torch.no_grad():
            for name, parameter in parameters[0].items():
                parameter.lerp_(parameters[1][name], 0.25)
        ids = torch.arange(12)[None]
        torch.testing.assert_close(models[2](ids).logits, models[0](ids).logits)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("lam", [0, 1])
    def test_ends_are_exact(self, tmp_path, dtype, lam):
        tensors = layers(0, dtype), layers(100, dtype)
        tensors[lam]["lm_head.weight"][0, :3] = torch.tensor([-0.0, 1e-30, -0.0])
        folders = [write(tmp_path / name, values) for name, values in zip(("start", "end"), tensors, strict=True)]
        interpolate(*folders, tmp_path / "out", lam)
        merged = read(tmp_path / "out")
        assert all(same_bits(merged[name], tensor) for name, tensor in tensors[lam].items())
        assert (tmp_path / "out/model.safetensors").read_bytes() == (folders[lam] / "model.safetensors").read_bytes()

    def test_with_itself_nothing_changes(self, pair, tmp_path):
        interpolate(pair[0], pair[0], tmp_path / "out", 0.37)
        assert all(same_bits(tensor, read(tmp_path / "out")[name]) for name, tensor in read(pair[0]).items())

    def test_sixteen_bits_are_rounded_once(self, tmp_path):
        tensors = layers(0, torch.bfloat16), layers(100, torch.bfloat16)
        folders = [write(tmp_path / name, values) for name, values in zip(("a", "b"), tensors, strict=True)]
        interpolate(*folders, tmp_path / "out", 0.3)
        for name, merged in read(tmp_path / "out").items():
            exact = torch.lerp(tensors[0][name].float(), tensors[1][name].float(), 0.3)
            assert torch.equal(merged, exact.bfloat16()), name

    def test_types_that_differ_meet_in_one_that_holds_both(self, tmp_path):
        start, end = write(tmp_path / "start", layers(0, torch.bfloat16)), write(tmp_path / "end", layers(100))
        interpolate(start, end, tmp_path / "out", 1.0)
        assert all(same_bits(tensor, read(tmp_path / "out")[name]) for name, tensor in read(end).items())
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
        interpolate(start, end, tmp_path / "half", 0.5, dtype="float16")
        assert {tensor.dtype for tensor in read(tmp_path / "half").values()} == {torch.float16}
        assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"

    def test_a_sweep_reads_once(self, pair, tmp_path, monkeypatch):
        lams, passes = [0.2, 0.55, 1.0], []
        chunks = Entry.chunks
        monkeypatch.setattr(Entry, "chunks", lambda self, *args: passes.append(self) or chunks(self, *args))
        report = interpolate(*pair, tmp_path / "sweep", lams)
        assert len(passes) == len(set(passes)) == 2 * len(layers())
        for place, lam in enumerate(lams):
            interpolate(*pair, tmp_path / "one", lam, overwrite=True)
            one, folder = read(tmp_path / "one"), tmp_path / "sweep" / f"lambda-{lam:g}"
            assert all(same_bits(tensor, one[name]) for name, tensor in read(folder).items())
            assert f"`{lam}`" in (folder / "README.md").read_text()
            assert report.norm("change", place) == pytest.approx(lam * report.norm("difference"), rel=1e-4)
        summary = json.loads((tmp_path / "sweep/merge.json").read_text())
        assert summary["options"]["lambda"] == lams and (tmp_path / "sweep/lambda-1/config.json").is_file()

    def test_rules_and_what_is_included(self, pair, tmp_path):
        rules = {"layers:1": 0.0, "attn": 1.0}
        report = interpolate(*pair, tmp_path / "out", 0.5, rules=rules, include="attn|mlp|embed")
        start, end, merged = read(pair[0]), read(pair[1]), read(tmp_path / "out")
        expected = {
            "model.layers.1.self_attn.q_proj.weight": start,
            "model.layers.0.self_attn.q_proj.bias": end,
            "model.norm.weight": start,
            "lm_head.weight": start,
        }
        for name, source in expected.items():
            assert same_bits(merged[name], source[name]), name
        name = "model.layers.0.mlp.gate.weight"
        torch.testing.assert_close(merged[name], (start[name] + end[name]) / 2)
        kept = {row.name: row.kept for row in report.tensors}
        assert kept["model.norm.weight"] == "not included" and kept["model.embed_tokens.weight"] is None

    def test_extrapolating(self, pair, tmp_path):
        interpolate(*pair, tmp_path / "out", 1.5, extrapolate=True)
        start, end = read(pair[0]), read(pair[1])
        for name, merged in read(tmp_path / "out").items():
            torch.testing.assert_close(merged, end[name] + 0.5 * (end[name] - start[name]))

    def test_whose_files_must_be_said_where_they_differ(self, pair, tmp_path):
        for folder, text in zip(pair, ("a", "b"), strict=True):
            (folder / "chat_template.jinja").write_text(text)
            (folder / "generation_config.json").write_text(
                json.dumps({"temperature": 0.6, "top_p": 0.95}, indent=len(text))
            )
        (pair[1] / "generation_config.json").write_text(
            '{"top_p": 0.95, "temperature": 0.6}'
        )  # the same, written otherwise
        with pytest.raises(ValueError, match=r"different chat_template.jinja\. Say whose .*`--files-from end`"):
            interpolate(*pair, tmp_path / "out")
        for whose, text in (("start", "a"), ("end", "b")):
            report = interpolate(*pair, tmp_path / f"as-{whose}", files_from=whose)
            assert (
                tmp_path / f"as-{whose}" / "chat_template.jinja"
            ).read_text() == text and report.files_from == whose
        with pytest.raises(ValueError, match="cannot be 'middle'; write 'start' or 'end'"):
            interpolate(*pair, tmp_path / "out", files_from="middle")

    def test_tied_embeddings_and_a_missing_prefix(self, tmp_path):
        start, end = layers(0), layers(100)
        start.pop("lm_head.weight")
        end["lm_head.weight"] = end["model.embed_tokens.weight"]
        end.pop("model.embed_tokens.weight")
        end = {name.removeprefix("model."): tensor for name, tensor in end.items()}
        folders = [write(tmp_path / name, t, tie_word_embeddings=True) for name, t in (("start", start), ("end", end))]
        interpolate(*folders, tmp_path / "out", 1)
        merged = read(tmp_path / "out")
        assert merged.keys() == start.keys()
        assert same_bits(merged["model.embed_tokens.weight"], end["lm_head.weight"])
        assert same_bits(merged["model.norm.weight"], end["norm.weight"])


class TestRefusing:
    @pytest.mark.parametrize(
        ("lam", "message"),
        [
            (1.2, r"lambda is 1.2, which is outside \[0, 1\] .*--extrapolate"),
            ([0.1, -0.1], "lambda is -0.1, which is outside"),
            (float("nan"), r"lambda is nan; write a number in \[0, 1\]"),
            ([0.1, 0.1], "several different ones"),
            ([], "give one value"),
        ],
    )
    def test_lambda_out_of_range_is_refused_before_writing(self, pair, tmp_path, lam, message):
        with pytest.raises(ValueError, match=message):
            interpolate(*pair, tmp_path / "out", lam)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"include": "conv"},
                r"'conv' means none of the 13 tensors \(lm_head.weight, .*layers:A-B, or one of all, linear",
            ),
            ({"include": "("}, "not a regular expression"),
            ({"include": "layers:5-3"}, "not a range of layers. Write layers:0-11"),
            ({"rules": {"layers:7": 0.5}}, "'layers:7' means none"),
            ({"rules": {"attn": 2.0}}, "lambda is 2.0"),
            ({"mismatch": "ignore"}, "`mismatch` cannot be 'ignore'; it must be one of 'refuse', 'skip'"),
            ({"dtype": "int8"}, "`dtype` cannot be 'int8'"),
            ({"rank": 4}, "for adapters"),
        ],
    )
    def test_options(self, pair, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            interpolate(*pair, tmp_path / "out", **options)

    def test_another_architecture(self, pair, tmp_path):
        other = write(tmp_path / "other", layers(7), model_type="qwen3")
        with pytest.raises(
            ValueError, match=r"start is a llama model and end a qwen3 model\. Give .*`--mismatch skip`"
        ):
            interpolate(pair[0], other, tmp_path / "out")
        report = interpolate(pair[0], other, tmp_path / "out", mismatch="skip", files_from="start")
        assert report.notes == ["start is a llama model and end a qwen3 model."]

    def test_shapes_and_tensors_of_one_model_alone(self, pair, tmp_path):
        tensors = layers(100, vocabulary=48, **{"model.extra.weight": noise(2)})
        del tensors["model.norm.weight"]
        other = write(tmp_path / "other", tensors)
        with pytest.raises(ValueError, match="start has no model.extra.weight, which end has"):
            interpolate(pair[0], other, tmp_path / "out")
        with pytest.raises(ValueError, match="end has no model.norm.weight, which start has"):
            interpolate(pair[0], other, tmp_path / "out", include="embed|model.norm")
        with pytest.raises(
            ValueError, match=r"embed_tokens.weight differs in shape: \(40, 16\) in start, \(48, 16\) in end"
        ):
            interpolate(pair[0], other, tmp_path / "out", include="embed")
        interpolate(pair[0], other, tmp_path / "linear", include="linear")  # what is not included need not fit
        with pytest.raises(ValueError, match="has the shapes of start.*cannot have the files of end"):
            interpolate(pair[0], other, tmp_path / "out", mismatch="skip", files_from="end")
        report = interpolate(pair[0], other, tmp_path / "out", mismatch="skip")
        kept = {row.name: row.kept for row in report.tensors if row.kept}
        assert kept == {
            "model.embed_tokens.weight": "another shape in end",
            "lm_head.weight": "another shape in end",
            "model.norm.weight": "not in end",
        }
        assert report.dropped == ["model.extra.weight"] and len(report.notes) == 3
        assert all(same_bits(read(tmp_path / "out")[name], read(pair[0])[name]) for name in kept)
        with pytest.raises(ValueError, match="Nothing is left to merge: another shape in end"):
            interpolate(pair[0], other, tmp_path / "none", include="embed", mismatch="skip")

    def test_another_vocabulary_of_the_same_size(self, pair, tmp_path):
        for folder, tokens in zip(pair, (["a", "b", "c"], ["a", "c", "b"]), strict=True):
            tokenizer = {"model": {"vocab": {token: index for index, token in enumerate(tokens)}}, "added_tokens": []}
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(ValueError, match="different vocabularies: id 1 is 'b' in one and 'c' in the other"):
            interpolate(*pair, tmp_path / "out", files_from="start")
        interpolate(*pair, tmp_path / "linear", files_from="start", include="linear")
        report = interpolate(*pair, tmp_path / "out", files_from="start", mismatch="skip")
        kept = {row.name for row in report.tensors if row.kept == "another vocabulary"}
        assert kept == {"model.embed_tokens.weight", "lm_head.weight"}
        # A token more is no other vocabulary.
        tokenizer["model"]["vocab"] = {"a": 0, "b": 1, "c": 2, "d": 3}
        (pair[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert not any(row.kept for row in interpolate(*pair, tmp_path / "more", files_from="end").tensors)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_and_infinity(self, pair, tmp_path, value):
        tensors = read(pair[1])
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
        write(pair[1], tensors, shards=2)
        with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight: .*end.* holds NaN or infinity"):
            interpolate(*pair, tmp_path / "out", 0)
        assert not (tmp_path / "out").exists()

    def test_a_result_that_float16_cannot_hold(self, tmp_path):
        folders = [
            write(tmp_path / name, {"a.weight": torch.full((2, 2), size)}) for name, size in (("s", 6e4), ("e", 8e4))
        ]
        with pytest.raises(ValueError, match="a.weight: the result is too large for torch.float16"):
            interpolate(*folders, tmp_path / "out", 0.9, dtype="float16")

    def test_missing_shards(self, pair, tmp_path):
        lost = sorted(pair[1].glob("*.safetensors"))[1]
        lost.unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {lost.name}"):
            interpolate(*pair, tmp_path / "out")
        write(pair[1], layers(100), shards=2)
        index = json.loads((pair[1] / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.lost.weight"] = lost.name
        (pair[1] / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"the index lists model.lost.weight, which no file holds"):
            interpolate(*pair, tmp_path / "out")

    def test_a_destination_that_exists(self, pair, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="not empty.*--overwrite"):
            interpolate(*pair, tmp_path / "out")
        interpolate(*pair, tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "notes.txt").exists()
        with pytest.raises(ValueError, match="holds the model that the result is made from"):
            interpolate(*pair, pair[1], overwrite=True)

    def test_quantized_models(self, pair, tmp_path):
        write(pair[1], layers(100), shards=2, quantization_config={"quant_method": "ptqtp"})
        with pytest.raises(ValueError, match=r"end \(.*\) is quantized with ptqtp.*hf-rb dequantize"):
            interpolate(*pair, tmp_path / "out")

    def test_integers_that_differ(self, tmp_path):
        folders = [
            write(tmp_path / name, {"a.weight": noise(2, 2), "ids": torch.tensor([1, step])})
            for name, step in (("start", 2), ("same", 2), ("other", 3))
        ]
        report = interpolate(*folders[:2], tmp_path / "out")
        assert {row.name: row.kept for row in report.tensors} == {"a.weight": None, "ids": "integers"}
        with pytest.raises(ValueError, match="ids holds integers that differ between start and end"):
            interpolate(folders[0], folders[2], tmp_path / "no")

    def test_no_such_model(self, pair, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no folder nowhere/else"):
            interpolate(pair[0], "nowhere/else", tmp_path / "out")


class TestGrafting:
    @pytest.fixture
    def three(self, tmp_path):
        base, onto = layers(0, torch.bfloat16), layers(50, torch.bfloat16)
        deltas = {name: noise(*tensor.shape, seed=9, std=0.02) for name, tensor in base.items()}
        tuned = {name: tensor.float() + deltas[name] for name, tensor in base.items()}
        folders = [
            write(tmp_path / n, t, shards=i + 1) for i, (n, t) in enumerate([("b", base), ("t", tuned), ("i", onto)])
        ]
        return folders, deltas, onto

    def test_linear_weights_get_their_delta(self, three, tmp_path):
        (base, tuned, onto), deltas, instruct = three
        report = graft(tuned, onto, tmp_path / "out", base=base)
        merged, wanted, error = read(tmp_path / "out"), 0.0, 0.0
        for name, tensor in instruct.items():
            if "_proj" not in name:
                assert same_bits(merged[name], tensor)
                continue
            exact = tensor.float() + (tensor.float() * 0 + read(tuned)[name] - read(base)[name].float())
            assert torch.equal(merged[name], exact.bfloat16()), name
            wanted += deltas[name].square().sum().item()
            error += (merged[name].float() - exact).square().sum().item()
        assert report.norm("wanted") == pytest.approx(wanted**0.5, rel=1e-3)
        assert report.norm("error") == pytest.approx(error**0.5, rel=1e-3)
        assert 0 < report.norm("error") < 0.05 * report.norm("wanted") and not report.notes
        assert report.sigma()[0] > 0.5 and report.files_from == "onto"

    def test_small_deltas_are_lost_in_bfloat16_and_reported(self, tmp_path):
        base = {"model.layers.0.up_proj.weight": noise(512, 512, std=0.02, dtype=torch.bfloat16)}
        tuned = {name: tensor.float() + noise(512, 512, seed=1, std=1e-4) for name, tensor in base.items()}
        folders = [write(tmp_path / name, tensors) for name, tensors in (("base", base), ("tuned", tuned))]
        report = graft(folders[1], folders[0], tmp_path / "out", base=folders[0])
        assert report.norm("error") / report.norm("wanted") == pytest.approx(0.33, abs=0.02)
        assert "Rounding lost 3" in report.notes[0] and "--dtype float32" in report.notes[0]
        exact = graft(folders[1], folders[0], tmp_path / "exact", base=folders[0], dtype="float32")
        assert exact.norm("error") < 1e-4 * exact.norm("wanted") and not exact.notes
        # Onto Base itself the result is the tuned Base.
        torch.testing.assert_close(read(tmp_path / "exact"), tuned)

    def test_without_training_nothing_changes(self, three, tmp_path):
        (base, _, onto), _, instruct = three
        report = graft(base, onto, tmp_path / "out", base=base, include="all")
        assert all(same_bits(tensor, instruct[name]) for name, tensor in read(tmp_path / "out").items())
        assert report.notes == ["The delta is zero: nothing was learned, and nothing changed."]

    def test_base_is_needed(self, three, tmp_path):
        (base, tuned, onto), _, _ = three
        with pytest.raises(
            ValueError, match="t is a model, not an adapter: give the Base model it was tuned from as well"
        ):
            graft(tuned, onto, tmp_path / "out")
        with pytest.raises(ValueError, match="is a model, not an adapter: leave out `keep_adapter`.*for adapters"):
            graft(tuned, onto, tmp_path / "out", base=base, keep_adapter=True)


class TestRefining:
    def test_matrices_experts_and_the_rest(self, tmp_path):
        from hf_rb.weights import effective_rank, refine_tensors

        fused = {"model.layers.0.mlp.experts.gate_up_proj": noise(3, 12, 8, seed=1)}
        base, model = layers(0, **fused), layers(100, **{name: tensor * 1.5 for name, tensor in fused.items()})
        folders = [write(tmp_path / name, tensors) for name, tensors in (("base", base), ("model", model))]
        report = refine(*folders, tmp_path / "out", [0.0, 0.2])
        merged = read(tmp_path / "out" / "lambda-0.2")
        rows = {row.name: row for row in report.tensors}
        assert {f"model.layers.0.mlp.experts.gate_up_proj[{expert}]" for expert in range(3)} <= rows.keys()
        assert rows["model.layers.0.self_attn.q_proj.bias"].kept == "no matrix"
        assert rows["lm_head.weight"].kept == "not included"
        for name, tensor in model.items():
            if "_proj" not in name or "bias" in name:
                assert same_bits(merged[name], tensor)
                continue
            for expert in range(len(tensor)) if tensor.ndim == 3 else [None]:
                one, other, result = (t[name] if expert is None else t[name][expert] for t in (base, model, merged))
                (expected,), found = refine_tensors(one, other, [0.2])
                torch.testing.assert_close(result, expected.float())
                row = rows[name if expert is None else f"{name}[{expert}]"].measured
                assert (row["k"], row["rank"]) == (found.k, found.rank) and row["erank"] == pytest.approx(found.erank)
                assert row["erank_base"] == pytest.approx(effective_rank(torch.linalg.svdvals(one.double())), rel=1e-9)
                assert row["change"] == pytest.approx([found.tail, 0.8 * found.tail], abs=1e-4)

    def test_lambda_one_changes_nothing(self, pair, tmp_path):
        report = refine(*pair, tmp_path / "out", 1, include="all", spectra=False)
        assert all(same_bits(tensor, read(tmp_path / "out")[name]) for name, tensor in read(pair[1]).items())
        assert "erank_base" not in report.merged[0].measured

    def test_a_matrix_that_cannot_be_decomposed_stays(self, pair, tmp_path, monkeypatch):
        def fail(matrix):
            raise torch.linalg.LinAlgError("no convergence")

        monkeypatch.setattr(torch.linalg, "eigh", fail)
        report = refine(*pair, tmp_path / "out")
        assert "could not be decomposed and stay as they are" in report.notes[0]
        assert all(same_bits(tensor, read(tmp_path / "out")[name]) for name, tensor in read(pair[1]).items())

    def test_base_is_needed(self, pair, tmp_path):
        with pytest.raises(ValueError, match="give its Base model as well"):
            refine(None, pair[1], tmp_path / "out")


class TestResuming:
    class Kill(BaseException):
        pass

    @pytest.mark.parametrize("stop", [0, 3, 7, 12, 13])
    def test_goes_on_behind_what_is_done(self, pair, tmp_path, monkeypatch, stop):
        expected = tmp_path / "expected"
        whole = interpolate(*pair, expected, [0.3, 0.6])
        monkeypatch.setattr(engine, "SYNC_BYTES", 1)
        count, write_tensor = [0], engine._Writer._write_tensor

        def killed(plan, job, files):
            if count[0] == stop:
                files[0].write(torch.zeros(3))  # half a tensor lies behind what is done
                raise self.Kill
            count[0] += 1
            return write_tensor(plan, job, files)

        with monkeypatch.context() as patch:
            patch.setattr(engine._Writer, "_write_tensor", killed)
            if stop < 13:
                with pytest.raises(self.Kill):
                    interpolate(*pair, tmp_path / "out", [0.3, 0.6])
        if stop == 13:  # all tensors written, nothing else
            with monkeypatch.context() as patch, pytest.raises(self.Kill):
                patch.setattr(engine._Writer, "complete", lambda *args: (_ for _ in ()).throw(self.Kill))
                interpolate(*pair, tmp_path / "out", [0.3, 0.6])
        assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
        with (tmp_path / ".out.partial/journal.jsonl").open("a") as journal:
            journal.write('{"done": 9, "ten')  # half a line
        again = []
        monkeypatch.setattr(
            engine._Writer, "_write_tensor", lambda *args: again.append(args[1]) or write_tensor(*args)
        )
        report = interpolate(*pair, tmp_path / "out", [0.3, 0.6])
        assert len(again) == 13 - stop
        assert not (tmp_path / ".out.partial").exists()
        for path in expected.rglob("*.safetensors*"):
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(expected)).read_bytes()
        assert report.tensors == whole.tensors

    def test_other_work_is_refused_or_thrown_away(self, pair, tmp_path, monkeypatch):
        with monkeypatch.context() as patch, pytest.raises(self.Kill):
            patch.setattr(engine._Writer, "complete", lambda *args: (_ for _ in ()).throw(self.Kill))
            interpolate(*pair, tmp_path / "out", 0.3)
        with pytest.raises(ValueError, match="lambda was 0.3 and is 0.4.*--no-resume"):
            interpolate(*pair, tmp_path / "out", 0.4)
        os.utime(pair[1] / "model-00001-of-00002.safetensors")
        with pytest.raises(ValueError, match="end/model-00001-of-00002.safetensors changed"):
            interpolate(*pair, tmp_path / "out", 0.3)
        interpolate(*pair, tmp_path / "out", 0.4, resume=False)
        name = "model.norm.weight"
        torch.testing.assert_close(read(tmp_path / "out")[name], 0.6 * read(pair[0])[name] + 0.4 * read(pair[1])[name])

    def test_killed_after_the_result_has_got_its_name(self, pair, tmp_path, monkeypatch):
        with monkeypatch.context() as patch, pytest.raises(self.Kill):
            patch.setattr(engine, "finish", lambda work: (_ for _ in ()).throw(self.Kill))
            interpolate(*pair, tmp_path / "out", 0.3)
        assert (tmp_path / "out/merge.json").is_file() and (tmp_path / ".out.partial").is_dir()
        assert len(interpolate(*pair, tmp_path / "out", 0.3).tensors) == 13
        assert not (tmp_path / ".out.partial").exists()


def test_memory_is_that_of_pieces(tmp_path):
    """Three tensors of 57 MB a model, as SmolLM2's largest: the bar is 3 of them and 200 MB, torch included."""
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    for value, name in enumerate(["start", "end"]):
        write(tmp_path / name, {n: torch.full((49152, 576), value, dtype=torch.bfloat16) for n in names})
    command = [sys.executable, "-m", "hf_rb.cli", "merge", "--method", "linear", "--start", tmp_path / "start"]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    command += ["--end", tmp_path / "end", "--lambda", "0.2,0.6", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 3 * 49152 * 576 * 2 + 200e6


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("linear", "model.layers.3.self_attn.qkv_proj.weight", True),
        ("linear", "model.layers.3.mlp.experts.gate_up_proj", True),
        ("linear", "model.layers.3.mlp.gate.weight", False),
        ("router", "model.layers.3.mlp.gate.weight", True),
        ("router", "model.layers.3.mlp.gate_proj.weight", False),
        ("attn", "model.layers.3.self_attn.q_norm.weight", True),
        ("mlp", "model.layers.3.mlp.up_proj.weight", True),
        ("norm", "model.layers.3.post_attention_layernorm.weight", True),
        ("norm", "transformer.h.0.ln_1.weight", True),
        ("embed", "transformer.wte.weight", True),
        ("head", "lm_head.weight", True),
        ("layers:0-3", "model.layers.3.mlp.up_proj.weight", True),
        ("layers:3", "model.layers.33.mlp.up_proj.weight", False),
        ("layers:3", "transformer.h.3.mlp.c_fc.weight", True),
        ("layers:0-3", "model.norm.weight", False),
        (r"layers\.1\d\..*q_proj", "model.layers.12.self_attn.q_proj.weight", True),
    ],
)
def test_matcher_on_names_and_patterns(pattern, name, expected):
    assert matcher(pattern)(name) is expected

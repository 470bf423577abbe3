import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_rb import tiny
from hf_rb.cli import main
from hf_rb.models.mpi import alignment, apply_mpi, effective_router
from hf_rb.models.mpi.conversion import routers
from hf_rb.models.router_report import RouterMeter, examine, layer_alignments, max_vio, row_cosine


def small(seed=0, **fields):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | fields)).eval()


def ids(rows=3, length=7, seed=0):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_max_vio_by_hand():
    assert max_vio(torch.tensor([5, 3, 2, 2])) == pytest.approx(0.6667, abs=1e-4)
    assert max_vio(torch.tensor([4, 4])) == 0
    assert max_vio(torch.tensor([8, 0, 0, 0])) == 3
    assert math.isnan(max_vio(torch.zeros(4)))


def test_row_cosine_by_hand():
    assert row_cosine(torch.eye(3)) == 0
    assert row_cosine(torch.tensor([[1.0, 2], [-2, -4]])) == pytest.approx(1)
    assert row_cosine(torch.tensor([[1.0, 0], [1, 1], [0, 3]])) == pytest.approx(2 * 0.5**0.5 / 3, abs=1e-6)


def test_the_load_is_that_of_the_logits_the_model_returns():
    model = small()
    batches = [{"input_ids": ids(seed=seed)} for seed in (1, 2)]
    report = examine(model, batches)
    assert report.tokens == 42 and not report.mpi and not model.training
    for index, layer in enumerate(report.layers):
        logits = [model(**batch, output_router_logits=True).router_logits[index] for batch in batches]
        counts = [torch.bincount(one.topk(2).indices.flatten(), minlength=6).double() for one in logits]
        assert layer.load == pytest.approx((sum(counts) / sum(counts).sum()).tolist())
        assert layer.max_vio == pytest.approx(max_vio(sum(counts)))
        assert layer.batch_max_vio == pytest.approx((max_vio(counts[0]) + max_vio(counts[1])) / 2)
        assert layer.dead == (sum(counts) == 0).sum()
        probs = torch.cat(logits).softmax(-1)
        assert layer.entropy == pytest.approx((-(probs * probs.log()).sum(-1).mean() / math.log(6)).item(), rel=1e-5)
        assert 0 < layer.load_entropy <= 1


def test_padding_does_not_count():
    model, tokens = small(), ids()
    padded = torch.cat([tokens, torch.zeros(3, 5, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(3, 5, dtype=torch.long)], dim=1)
    plain = examine(model, [{"input_ids": tokens}])
    masked = examine(model, [{"input_ids": padded, "attention_mask": mask}])
    assert masked.tokens == plain.tokens == 21
    for layer, expected in zip(masked.layers, plain.layers, strict=True):
        assert layer.load == expected.load and layer.entropy == pytest.approx(expected.entropy, rel=1e-5)
    with pytest.raises(ValueError, match="no tokens"):
        examine(model, [{"input_ids": padded, "attention_mask": torch.zeros_like(mask)}])


def test_collapse_is_seen():
    model = small()
    for layer in routers(model):
        layer.router.forward = lambda hidden: (
            torch.zeros(hidden.shape[0], 6),
            torch.full((hidden.shape[0], 2), 0.5),
            torch.tensor([[0, 3]]).expand(hidden.shape[0], 2),
        )
    report = examine(model, [{"input_ids": ids()}])
    for layer in report.layers:
        assert layer.dead == 4 and layer.max_vio == 2 and layer.entropy == pytest.approx(1)
        assert layer.load_entropy == pytest.approx(math.log(2) / math.log(6))
    assert "model.layers.0.mlp (4), model.layers.1.mlp (4)" in report.notes[0]


@pytest.mark.parametrize("matrix", ["gate", "down"])
def test_alignments_are_those_of_the_maths(matrix):
    model = apply_mpi(small(), matrix=matrix)
    for index, layer in enumerate(routers(model)):
        expert, values = layer.expert_matrix(), layer_alignments(layer, seed=index)
        draws = torch.randn(6, 32, generator=torch.Generator().manual_seed(index))
        assert values["learned"] == pytest.approx(alignment(layer.learned, expert).mean().item(), rel=1e-5)
        assert values["effective"] == pytest.approx(alignment(layer.weight(), expert).mean().item(), rel=1e-5)
        stepped = effective_router(draws, expert, 2.0)
        assert values["random"] == pytest.approx(alignment(stepped, expert).mean().item(), rel=1e-5)
        assert values["learned"] < values["effective"] <= 1 + 1e-6


def test_a_step_alone_is_told_from_learning():
    model = apply_mpi(small())
    report = examine(model, [{"input_ids": ids()}])
    assert report.mpi
    # Untrained rows are random rows: about as many seeds are below as above, and the doctor says what it sees.
    below = report.mean("lambda_effective") <= report.mean("lambda_random")
    assert below == any("aligned no better" in note for note in report.notes)
    with torch.no_grad():
        for layer in routers(model):
            top = torch.linalg.svd(layer.expert_matrix()).Vh[:, 0]
            layer.learned.copy_(top)
    report = examine(model, [{"input_ids": ids()}])
    assert report.mean("lambda_effective") == pytest.approx(1)
    assert not any("aligned no better" in note for note in report.notes)


def test_training_passes_alone_count_while_training():
    model = small().train()
    with RouterMeter(model, training=True) as meter:
        model(ids())
        with torch.no_grad():
            model(ids(seed=5))
        model.generate(ids(), max_new_tokens=2)
        assert [load.tokens.item() for load in meter.take()] == [21, 21]
        assert meter.take()[0].picks.sum() == 0
    model(ids())
    assert meter.take()[0].tokens == 0


def test_a_dense_model_has_no_routers():
    config = AutoConfig.from_pretrained(tiny.path("student"))
    with pytest.raises(TypeError, match="no mixture of experts"):
        examine(AutoModelForCausalLM.from_config(config), [{"input_ids": ids()}])


def test_the_verb_prints_a_table_and_json(tmp_path, capsys):
    out = tmp_path / "report.json"
    command = ["router-report", "tiny:moe", "tiny:math", "--tokens", "1024", "--window", "128", "--out", str(out)]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "MaxVio" in table and "model.layers.3.mlp" in table and "mean" in table
    assert main([*command[:-2], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert len(printed["layers"]) == 4 and sum(printed["layers"][0]["load"]) == pytest.approx(1)
    assert printed["tokens"] == 1024


def test_the_verb_refuses_what_cannot_be_looked_at(tmp_path, capsys):
    (tmp_path / "there.json").touch()
    assert main(["router-report", "tiny:moe", "tiny:math", "--out", str(tmp_path / "there.json")]) == 2
    assert "there.json is there already" in capsys.readouterr().err
    assert main(["router-report", "tiny:student", "tiny:math"]) == 2
    assert "no mixture of experts" in capsys.readouterr().err
    assert main(["router-report", "tiny:moe", str(tmp_path / "none.txt")]) == 2
    assert "none.txt', which does not exist." in capsys.readouterr().err
    assert main(["router-report", "tiny:moe", "tiny:math", "--window", "1"]) == 2
    assert "--window" in capsys.readouterr().err


def test_text_files_are_read(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Two apples and three pears are five fruits. " * 40)
    assert main(["router-report", "tiny:moe", str(text), "--window", "64", "--json"]) == 0
    tokens = len(AutoTokenizer.from_pretrained(tiny.path("moe"))(text.read_text())["input_ids"])
    assert json.loads(capsys.readouterr().out)["tokens"] == tokens // 64 * 64

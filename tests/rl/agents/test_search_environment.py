import sys
from pathlib import Path

import pytest
from transformers.utils import get_json_schema

import hf_rb
from hf_rb import tiny
from hf_rb.rl.agents.search import Index, Passage, PassageSearch, read_passages, search_environment
from hf_rb.tiny.facts import _QUERIES, fact_base, questions, search


pytest.importorskip("bm25s")

MULTIHOP = Path(hf_rb.__file__).parents[2] / "shared/data/multihop_passages.jsonl"


@pytest.fixture(scope="module")
def facts():
    return search_environment()


def test_finds_every_hop_of_every_question(facts):
    index = facts().search.__self__._index
    asked = {_QUERIES[fact.relation].format(fact.subject): fact.text for q in questions() for fact in q.hops}
    assert len(asked) > 200
    for query, text in asked.items():
        assert text in [passage.text for passage in index.search(query)], query


def test_the_tiny_family_reads_the_description_of_its_training(facts):
    assert [get_json_schema(facts().search)] == tiny.tool_schemas()
    assert get_json_schema(facts().search) == get_json_schema(search)


def test_an_environment_keeps_ids_by_message_until_reset(facts):
    first, second = facts(), facts()
    fact = fact_base()[0]
    message = first.search(f"mayor of {fact.subject}")
    assert message.splitlines()[0] == fact.text and len(message.splitlines()) == 2
    assert first.retrieved == {message: message.splitlines()} and second.retrieved == {}
    first.reset(prompt=[{"role": "user", "content": "?"}], answer="x")
    assert first.retrieved == {}


@pytest.mark.parametrize("query", ["", "   ", "?!", "of the", "zzzz qqqq", "\n\x00"])
def test_a_query_without_a_known_word_finds_nothing(facts, query):
    environment = facts()
    assert environment.search(query) == "Nothing found."
    assert environment.retrieved == {"Nothing found.": []}


def test_top_k_is_a_bound():
    index = Index([Passage("a", "red apple"), Passage("b", "green apple"), Passage("c", "pear")], top_k=5)
    assert {passage.id for passage in index.search("apple")} == {"a", "b"}
    assert [passage.id for passage in Index(index.passages, top_k=1).search("green apple")] == ["b"]


@pytest.mark.parametrize("passages, top_k", [([], 2), ([Passage("a", "x")], 0)])
def test_an_index_needs_something_to_find(passages, top_k):
    with pytest.raises(ValueError, match="needs passages and top_k"):
        Index(passages, top_k)


def test_no_passage_is_not_the_default_number_of_passages():
    with pytest.raises(ValueError, match="top_k of at least 1"):
        search_environment(top_k=0)


def test_passages_of_a_file(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text('{"id": "p1", "title": "Apple", "text": "A  red\\nfruit."}\n\n{"text": "A plum."}\n')
    assert read_passages(path) == [Passage("p1", "Apple: A red fruit."), Passage("3", "A plum.")]
    environment = search_environment(str(path))()
    assert environment.search("red fruit") == "Apple: A red fruit."
    assert environment.reset(prompt=[], question="Which fruit?") is None


@pytest.mark.parametrize(
    "form, asked", [("hashes", "begins with ####."), ("boxed", r"in \boxed{}."), ("tag", "</answer>.")]
)
def test_a_question_without_a_prompt_asks_for_a_readable_answer(form, asked):
    text = search_environment(answer_extractor=form)().reset(question="Which fruit?", answer="plum")
    assert text.startswith("Which fruit?\n") and text.endswith(asked)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_rb\[rl\]'"):
        search_environment()


def test_what_unicode_counts_as_a_line_end_is_part_of_a_passage(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_bytes('{"text": "A\u2028red\u0085fruit."}\r\n{"text": "A plum."}'.encode())
    assert [passage.text for passage in read_passages(path)] == ["A red fruit.", "A plum."]


@pytest.mark.parametrize("line", ['{"title": "Apple"}', "[1]", "no json", '{"text": 3}'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "passages.jsonl"
    path.write_text('{"text": "A plum."}\n' + line)
    with pytest.raises(ValueError, match=r"passages.jsonl, line 2: write one JSON object"):
        read_passages(path)


def test_an_id_occurs_once(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text('{"id": "p", "text": "A plum."}\n{"id": "p", "text": "A pear."}')
    with pytest.raises(ValueError, match="line 2: the id 'p' occurs twice"):
        read_passages(path)


def test_a_corpus_of_wikipedia():
    if not MULTIHOP.exists():
        pytest.skip("needs the multi-hop corpus")
    environment = search_environment(str(MULTIHOP))()
    assert isinstance(environment, PassageSearch)
    message = environment.search("John Lennon album issued by Apple Records, separation from Yoko Ono")
    assert environment.retrieved[message][0] == "p0002" and len(message.splitlines()) == 3

from hf_rb.tiny.facts import fact_base, generate_transcripts, questions, search


def test_every_transcript_finds_both_facts():
    for split in ("train", "test"):
        for question, messages in generate_transcripts(split):
            found = [message["content"] for message in messages if message["role"] == "tool"]
            assert len(found) == 2
            for hop, text in zip(question.hops, found, strict=True):
                assert hop.value in text
            assert messages[-1]["content"].endswith(f"#### {question.answer}")


def test_hops_are_chained_and_splits_disjoint():
    train, test = questions("train"), questions("test")
    assert len(train) > 300 and len(test) > 50
    assert not {question.text for question in train} & {question.text for question in test}
    for question in train + test:
        first, second = question.hops
        assert first.value == second.subject


def test_search_returns_the_two_best_facts():
    fact = fact_base()[0]
    assert search(f"{fact.relation} of {fact.subject}").splitlines()[0] == fact.text
    assert len(search("nothing that is known").splitlines()) == 2

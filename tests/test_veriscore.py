"""VeriScore: claims, evidence and F1@K worked by hand, and the published row format."""

import threading

import pytest

from llm import judge, veriscore

STOP = threading.Event


def test_sentences():
    text = (
        "Dr. J. Smith was born in 1950. He wrote 3.5 books, e.g. Novels!  Did he?\n"
        '1. **Life**: he lived in the U.S. Army.\n2. Death\n- "Yes." He said so.\n---\n'
    )
    assert veriscore.sentences(text) == [
        "Dr. J. Smith was born in 1950.",
        "He wrote 3.5 books, e.g. Novels!",
        "Did he?",
        "1. **Life**: he lived in the U.S. Army.",
        "2. Death",
        '- "Yes."',
        "He said so.",
    ]


@pytest.mark.parametrize(
    ("supported", "claims", "k", "f1"),
    [
        (0, 5, 3, 0.0),
        (0, 0, 3, 0.0),
        (3, 3, 3, 1.0),
        (6, 6, 3, 1.0),
        (3, 4, 6, 2 * 0.75 * 0.5 / 1.25),
        (1, 1, 2, 2 / 3),
    ],
)
def test_f1_by_hand(supported, claims, k, f1):
    assert veriscore.f1_at_k(supported, claims, k) == pytest.approx(f1)


def test_k_is_the_upper_median_of_answers_with_claims():
    rows = [{"all_claims": ["c"] * n} for n in (0, 1, 2, 8, 9, 0)]
    assert veriscore.median_claims(rows) == 8  # of 1, 2, 8, 9
    assert veriscore.median_claims(rows[:3]) == 2
    assert veriscore.median_claims([{"all_claims": []}]) == 1


def published(claims, labels, question="What is Mercury?"):
    """A row as VeriScore's README lists it, after verification."""
    row = {"question": question, "prompt_source": "FreshQA", "response": " ".join(claims), "model": "gpt-4o"}
    row |= {"prompt_tok_cnt": 5, "response_tok_cnt": 9, "abstained": False, "claim_list": [[c] for c in claims]}
    row |= {
        "all_claims": claims,
        "claim_snippets_dict": {c: [{"title": "t", "snippet": "s", "link": "l"}] for c in claims},
    }
    verdicts = zip(claims, labels, strict=True)
    row["claim_verification_result"] = [
        {"claim": c, "search_results": "t\ns", "verification_result": label} for c, label in verdicts
    ]
    return row | {"errors": 0}


def test_published_rows_score_as_by_hand():
    rows = [
        published(["a", "b", "c", "d"], ["supported", "unsupported", "supported", "supported"]),
        published(["a", "b"], ["unsupported", "unsupported"]),
        published(["e", "f", "g"], ["supported"] * 3),
    ]
    k = veriscore.median_claims(rows)
    assert k == 3
    # S = 3 of 4: P .75, R 1; S = 0: 0; S = 3 of 3: 1
    expected = [2 * 0.75 / 1.75, 0.0, 1.0]
    assert [veriscore.score(r, k) for r in rows] == pytest.approx(expected)
    got = veriscore.summary(rows, k)
    assert (
        got["f1"] == pytest.approx(sum(expected) / 3)
        and got["claims"] == 3
        and got["precision"] == pytest.approx(6 / 9)
    )
    assert (got["k"], got["answers"], got["abstained"]) == (3, 3, 0)
    counted = [{name: v for name, v in r.items() if name != "claim_verification_result"} for r in rows]
    assert veriscore.summary(counted, k)["f1"] is None and veriscore.summary(counted, k)["claims"] == 3


def sample(answer, name):
    row = {
        "id": name,
        "mode": "off",
        "draw": 0,
        "question": "Who is Nala?",
        "answers": [],
        "finish": "stop",
        "prompt": "",
    }
    return row | {"text": answer}


def test_from_answer_to_score_by_hand():
    """Two answers; one sentence repeats a claim, one reply is garbage twice, one verdict is garbage twice."""
    said = {
        "Nala is a lion.": "Nala is a lion.",
        "She is a queen, and a lion.": "Nala is a queen.\n- Nala is a lion.",
        "I like her.": "No verifiable claim.",
        "Rubbish.": "Claims:",
    }
    verdicts = {"Nala is a lion.": "supported", "Nala is a queen.": "perhaps"}
    seen = []

    def reply(kind, fields, messages):
        seen.append((kind, dict(fields)))
        return said[fields["sentence"]] if kind == "claims" else verdicts[fields["claim"]]

    who = judge.Judge("scripted", reply)
    samples = [sample("Nala is a lion. She is a queen, and a lion. I like her.", "1"), sample("Rubbish.", "2")]
    samples.append(sample("", "3"))
    rows = veriscore.extract(samples, who, "mralign", 1, STOP())
    assert rows[0]["all_claims"] == ["Nala is a lion.", "Nala is a queen."]
    assert rows[0]["claim_list"] == [["Nala is a lion."], ["Nala is a queen.", "Nala is a lion."], []]
    assert [(r["errors"], r["abstained"]) for r in rows] == [(0, False), (1, True), (0, True)]
    context = seen[2][1]["context"]
    assert (
        context == "Nala is a lion. She is a queen, and a lion. I like her." and seen[2][1]["sentence"] == "I like her."
    )
    results = {c: [{"title": "Lions", "snippet": f"{c}\nIgnore all this", "link": "x"}] for c in rows[0]["all_claims"]}
    rows = veriscore.verify(rows, results, who, 1, STOP())
    labels = [v["verification_result"] for v in rows[0]["claim_verification_result"]]
    assert labels == ["supported", "error"]
    assert seen[-1][1]["evidence"] == "[1] Lions: Nala is a queen. Ignore all this"
    got = veriscore.summary(rows, veriscore.median_claims(rows))
    # K = 2, S = 1 of 2: P = R = .5
    assert (got["k"], got["errors"], got["abstained"]) == (2, 2, 2) and got["f1"] == pytest.approx(0.5 / 3)
    assert set(published([], [])) - {"prompt_tok_cnt", "response_tok_cnt"} <= set(rows[0])


def test_the_stand_in_runs_the_whole_path():
    who = judge.Judge(judge.STAND_IN, lambda kind, fields, messages: judge.stand_in(kind, fields))
    rows = veriscore.extract([sample("A lion.", "1"), sample("I don't know.", "2")], who, "m", 1, STOP())
    assert [r["all_claims"] for r in rows] == [["Who is Nala? A lion."], []]
    good = {"Who is Nala? A lion.": [{"title": "Nala", "snippet": "Nala is a lion", "link": ""}]}
    bad = {"Who is Nala? A lion.": [{"title": "Nala", "snippet": "Nala is a name", "link": ""}]}
    scores = [veriscore.summary(veriscore.verify(rows, r, who, 1, STOP()), 1)["f1"] for r in (good, bad)]
    assert scores == [0.5, 0.0]

"""ledger.py: prices by hand, the file under every kind of damage, and a budget that many threads cannot pass."""

import json
import random
import threading

import pytest

from common.errors import BudgetSpent, CallsStopped, InputError
from llm import ledger
from llm.ledger import Call, Ledger, Price

PRICE = Price(2.0, 10.0)


def call(book, key="k", prompt=1000, completion=100, price=PRICE):
    return Call(book, {"role": "a", "endpoint": "m@u", "key": key, "prompt_sha256": "p"}, price, prompt, completion)


def pay(book, key, prompt_tokens=900, completion_tokens=50, content="hi", **bounds):
    c = call(book, key, **bounds)
    c.reserve()
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return c.settle(usage, content=content, finish="stop", id=key)


def test_cost_by_hand(tmp_path):
    with Ledger(tmp_path / "calls.jsonl") as book:
        row = pay(book, "x")
        assert row["usd"] == pytest.approx((900 * 2 + 50 * 10) / 1e6) and row["estimated"] is False
        assert book.tokens == 950 and book.usd == pytest.approx(0.0023)
        c = call(book, "free", price=None)
        c.reserve()
        assert c.settle({"prompt_tokens": 7, "completion_tokens": 3}, content="", finish="stop")["usd"] == 0
        for usage in (None, {}, {"prompt_tokens": -1, "completion_tokens": True}, {"prompt_tokens": 10**400}, "many"):
            c = call(book, "no usage")
            c.reserve()
            row = c.settle(usage, content="", finish="stop")  # no usage: the worst case
            assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (1000, 100, True)


def test_what_was_paid_for_is_there_again(tmp_path):
    path = tmp_path / "a" / "calls.jsonl"
    with Ledger(path) as book:
        pay(book, "x", content='line\n"quoted" \ud800 é')
        book.learn("m@u", {"format": "none"})
        lost = call(book, "lost")
        lost.reserve()
        lost.release(maybe_billed=True)
        refused = call(book, "refused")
        refused.reserve()
        refused.release(maybe_billed=False)
    with Ledger(path) as book:
        assert book.replies["x"]["content"] == 'line\n"quoted" \ud800 é' and list(book.replies) == ["x"]
        assert book.dialects == {"m@u": {"format": "none"}}
        assert book.tokens == 950 + 1100 and book.usd == pytest.approx(0.0023 + 0.003)
    outcomes = [json.loads(line)["outcome"] for line in path.read_text().splitlines()]
    assert outcomes == ["billed", "dialect", "unknown"]


def test_requests_under_way_are_noted_when_the_file_is_closed(tmp_path):
    with Ledger(tmp_path / "calls.jsonl") as book:
        late = call(book, "late")
        late.reserve()
    with pytest.raises(CallsStopped):
        late.settle({}, content="too late", finish="stop")
    with Ledger(tmp_path / "calls.jsonl") as book:
        assert book.tokens == 1100 and not book.replies


def test_a_second_program_is_refused(tmp_path):
    with Ledger(tmp_path / "calls.jsonl"), pytest.raises(InputError, match="another program is writing"):
        Ledger(tmp_path / "calls.jsonl")
    Ledger(tmp_path / "calls.jsonl").__exit__(None, None, None)


@pytest.fixture
def three(tmp_path):
    path = tmp_path / "calls.jsonl"
    with Ledger(path) as book:
        for key in "xyz":
            pay(book, key, content=f"reply {key}")
    return path


def test_torn_at_every_byte_of_the_last_row(three):
    whole = three.read_bytes()
    second = whole[:-1].rfind(b"\n") + 1
    for end in range(second, len(whole)):
        three.write_bytes(whole[:end])
        with Ledger(three) as book:
            assert list(book.replies) == ["x", "y"]
            pay(book, "w")
        with Ledger(three) as book:
            assert list(book.replies) == ["x", "y", "w"]


def test_a_flipped_byte_costs_its_row_only_and_is_said(three, capsys):
    """No damaged reply is ever used, no sound one is lost, and the file can be written to again."""
    whole, rng = three.read_bytes(), random.Random(0)
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    for _ in range(500):
        at = rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        three.write_bytes(damaged)
        row = sum(end < at for end in ends)
        hit = {"xyz"[row], *(("xyz"[row + 1],) if at in ends[:2] else ())}  # a line end flipped joins two rows
        with Ledger(three) as book:
            lost = {*"xyz"} - {*book.replies}
            assert lost == hit or (lost, row) == (set(), 0), at  # the first row may pass for one without a checksum
            assert all(book.replies[key]["content"] == f"reply {key}" for key in book.replies)
            assert book.tokens == 950 * len(book.replies)
        said = capsys.readouterr().err
        assert (f"{three}: " in said and "left out" in said) == (lost > set() and at != ends[2])  # that: a torn row


def test_a_ledger_from_before_there_were_checksums(tmp_path):
    path = tmp_path / "calls.jsonl"
    with Ledger(path) as book:
        pay(book, "x")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "check"}) + "\n")
    with Ledger(path) as book:
        assert list(book.replies) == ["x"]
        pay(book, "y")
    path.write_bytes(path.read_bytes() + b'{"outcome": "billed", "key": "forged"}\n')
    with Ledger(path) as book:
        assert list(book.replies) == ["x", "y"]


# ------------------------------------------------------------------------------------------------ budget


def test_a_call_that_does_not_fit_ends_the_run(tmp_path):
    with Ledger(tmp_path / "calls.jsonl", budget_tokens=2000) as book:
        pay(book, "x")  # 950 of at most 1100
        with pytest.raises(
            BudgetSpent, match=r"950 tokens of 2,000, the next call may take 0.0030 USD and 1,100 tokens"
        ):
            call(book).reserve()
        call(book, prompt=950).reserve()  # 950 + 1050 = 2000
    with Ledger(tmp_path / "calls.jsonl", budget_usd=0.0023 + 0.0021 + 0.003) as book, pytest.raises(BudgetSpent):
        call(book).reserve()  # the one under way at the end counts in full: 0.0029
        call(book).reserve()


def test_a_call_waits_for_others_that_may_leave_room(tmp_path):
    with Ledger(tmp_path / "calls.jsonl", budget_tokens=1600) as book:
        first = call(book, "first")
        first.reserve()  # 1100 set aside
        threading.Timer(
            0.1, lambda: first.settle({"prompt_tokens": 400, "completion_tokens": 100}, content="", finish="")
        ).start()
        call(book, "second").reserve()  # fits exactly once the first has come back with 500
        assert book.tokens == 500
        book.stop.set()
        with pytest.raises(CallsStopped):
            call(book, "third").reserve()


@pytest.mark.parametrize("limit", [{"budget_usd": 0.1}, {"budget_tokens": 40_000}])
def test_many_threads_never_pass_the_budget(tmp_path, limit):
    with Ledger(tmp_path / "calls.jsonl", **limit) as book:

        def work(seed):
            rng = random.Random(seed)
            try:
                while True:
                    c = call(book, f"{seed}/{rng.random()}")
                    c.reserve()
                    used = {"prompt_tokens": rng.randrange(1001), "completion_tokens": rng.randrange(101)}
                    if rng.random() < 0.2:
                        c.release(maybe_billed=rng.random() < 0.5)
                    else:
                        c.settle(used, content="", finish="stop")
            except BudgetSpent:
                pass

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        spent, worst = (book.usd, 0.003) if "budget_usd" in limit else (book.tokens, 1100)
        (most,) = limit.values()
        assert most - worst < spent <= most + 1e-9


# ------------------------------------------------------------------------------------------------ prices


def test_the_shipped_prices_are_dated():
    date, prices = ledger.load_prices("prices.json")
    assert date >= "2025-01-01" and prices["gpt-4o"].usd(1_000_000, 100_000) == pytest.approx(2.5 + 1.0)


def priced(**price):
    return {"as_of": "2025-01-01", "models": {"m": price}}


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"as_of": "2025-01-01"},
        priced(input=1),
        priced(input=-1, output=0),
        priced(input=1, output=2) | {"as_of": 1},
    ],
)
def test_bad_price_files_are_named(tmp_path, value):
    (tmp_path / "p.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="p.json: "):
        ledger.load_prices(tmp_path / "p.json")


@pytest.mark.parametrize("searches", [None, [], 1, {"serper": None}, {"serper": "1"}, {"serper": True}, {"serper": -1}])
def test_a_price_of_searches_that_is_none_is_named(tmp_path, searches):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"searches": searches}))
    with pytest.raises(InputError, match='p.json: "searches" must look like'):
        ledger.search_price(path)
    path.write_text('{"searches": {"serper": 2}}')
    assert ledger.search_price(path) == 0.002
    path.write_text("{}")
    assert ledger.search_price(path) is None

"""`refrain usage`: sums, costs, savings and break-even, on the terminal, as pictures, files, and over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from typer.testing import CliRunner

from app.__main__ import cli
from app.errors import AppError, BadCall, StartRefused
from app.gate.keys import KeyFile
from app.ledger import cost, files
from app.ledger.ledger import note_training
from app.ledger.record import Prices, Record
from app.ledger.sums import Question, moment, summed
from tests.conftest import Running, chat, until
from tests.ledger.reading import records

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()
DAY = 86_400


def written(home: Path, found: list[Record]) -> None:
    folder = home / "ledger"
    folder.mkdir(parents=True, exist_ok=True)
    by_day: dict[str, list[Record]] = {}
    for record in found:
        by_day.setdefault(time.strftime("%Y%m%d", time.gmtime(record.time)), []).append(record)
    for day, lines in by_day.items():
        path = folder / (day + files.new_name()[8:])
        path.write_bytes(msgspec.json.Encoder().encode_lines(lines))


def call(at: float, tenant: str, cache: str, *, device_s: float = 0.0, model: str = "bot") -> Record:
    """100 tokens in, 50 out."""
    spared = 150 if cache in ("hit", "shared", "stale") else 0
    return Record(
        time=at,
        tenant=tenant,
        key=f"key_{tenant}",
        weights=f"{model}@0123456789ab",
        endpoint="/v1/chat/completions",
        cache=cache,
        prompt_tokens=100,
        completion_tokens=50,
        spared_tokens=spared,
        device_s=device_s,
        decode_s=device_s * 4,
        total_s=0.5,
        cost=device_s * 2,
    )


LEDGER = [
    call(NOON, "acme", "miss", device_s=2.0),
    call(NOON + 1, "acme", "hit"),
    call(NOON + 2, "globex", "shared"),
    call(NOON + DAY, "globex", "bypass", device_s=6.0),
    call(NOON + DAY + 1, "globex", "hit", model="other"),
    Record(time=NOON + DAY + 2, tenant="acme", status=400, finish="refused", error="bad"),
    Record(time=NOON + DAY + 3, kind="rest", tenant="acme", weights="bot@0123456789ab", device_s=1.0, cost=2.0),
    Record(time=NOON + DAY + 4, kind="engine", device_s=10.0, idle_s=90.0),
    Record(time=NOON - DAY, kind="training", weights="bot@", endpoint="train", device_s=1800.0),
    Record(time=NOON - DAY, kind="training", weights="bot@", endpoint="evaluate", device_s=1800.0),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFRAIN_HOME", str(tmp_path))
    written(tmp_path, LEDGER)
    return tmp_path


def refrain(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["usage", *arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_it_sums_by_whatever_is_asked(home: Path) -> None:
    told = json.loads(refrain("--by", "tenant,day", "--json"))
    rows = {(row["tenant"], row["day"]): row for row in told["rows"]}
    assert rows.keys() == {
        ("acme", "2026-11-20"),
        ("globex", "2026-11-20"),
        ("globex", "2026-11-21"),
        ("acme", "2026-11-21"),
    }
    assert rows["acme", "2026-11-20"] == {
        "tenant": "acme",
        "day": "2026-11-20",
        "calls": 2,
        "failed": 0,
        "spared_calls": 1,
        "prompt_tokens": 200,
        "completion_tokens": 100,
        "spared_tokens": 150,
        "device_s": 2.0,
        "cost": 4.0,
        "mean_s": 0.5,
    }
    assert (rows["acme", "2026-11-21"]["failed"], rows["acme", "2026-11-21"]["device_s"]) == (1, 1.0)
    assert told["total"]["calls"] == 6
    assert told["devices"] == {"busy_s": 10.0, "idle_s": 90.0}
    assert told["training"] == [{"model": "bot", "device_s": 3600.0}]


@pytest.mark.parametrize("by", ["tenant", "key", "model", "weights", "day", "cache", "endpoint", "status", "finish"])
def test_the_groups_of_each_dimension_make_up_the_total(home: Path, by: str) -> None:
    told = json.loads(refrain("--by", by, "--json"))
    for name in ("calls", "spared_tokens", "device_s", "cost"):
        assert sum(row[name] for row in told["rows"]) == pytest.approx(told["total"][name])
    assert all(row[by] for row in told["rows"])


def test_a_time_and_a_model_are_chosen(home: Path) -> None:
    assert json.loads(refrain("--since", "2026-11-21", "--json"))["total"]["calls"] == 3
    assert json.loads(refrain("--until", "2026-11-20T12:00:01", "--json"))["total"]["calls"] == 1
    assert json.loads(refrain("--model", "other", "--json"))["total"]["calls"] == 1
    assert moment("2h") == pytest.approx(time.time() - 7200, abs=60)
    with pytest.raises(BadCall, match="is no time"):
        moment("yesterday")


def test_the_table_has_a_bar_for_each_row_and_the_picture_a_rectangle_for_each_part(home: Path, tmp_path: Path) -> None:
    shown = refrain("--by", "day")
    assert "2026-11-20" in shown
    assert "█" in shown
    assert "░" in shown
    refrain("--svg", str(tmp_path / "usage.svg"), "--html", str(tmp_path / "usage.html"))
    drawn = ElementTree.parse(tmp_path / "usage.svg")  # noqa: S314 - it is our own
    bars = [each for each in drawn.iter("{http://www.w3.org/2000/svg}rect") if float(each.get("width", 0)) == 48]
    assert len(bars) == (3 + 3) + 2, "calls by what the cache had, and device time, on each of two days"
    page = (tmp_path / "usage.html").read_text()
    assert "<svg" in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", ""), "the page stands alone"


def test_what_it_cannot_do_is_one_line(home: Path, tmp_path: Path) -> None:
    wrong = [("--by", "colour"), ("--since", "soon"), ("export",), ("cost", "--model", "nobody"), ("--svg", "/no/x")]
    for arguments in wrong:
        with pytest.raises((StartRefused, AppError)) as refused:
            refrain(*arguments)
        assert "\n" not in str(refused.value)


def test_the_cost_of_training_and_inference_and_what_was_saved(home: Path) -> None:
    found = cost.costs(home / "ledger", Question(), Prices(device_hour=36.0), Prices())
    assert found is not None
    assert found.training == [("bot", 3600.0, 36.0)]
    assert (found.generation_s, found.overhead_s, found.idle_s) == (9.0, 1.0, 90.0)
    assert found.device_cost == pytest.approx(1.0)  # 100 device-seconds
    assert found.generation_cost == pytest.approx(0.09)
    assert found.cost_per_1000_tokens == pytest.approx(1.0 / 0.75)
    assert found.cost_per_day == pytest.approx(1.0, rel=0.001)
    saved = {each.by: each for each in found.saved}
    # (2 + 6 + 1 for nobody) device-seconds for 100 generated tokens; of `other` none was generated, so all count.
    assert (saved["cache"].calls, saved["cache"].tokens) == (2, 300)
    assert saved["cache"].device_s == pytest.approx(9 / 100 * 100)
    assert (saved["sharing"].calls, saved["sharing"].device_s) == (1, pytest.approx(4.5))
    assert saved["batching"].device_s == pytest.approx(32.0 - 9.0)
    assert found.break_even is None


def test_tokens_have_a_price_where_they_were_generated() -> None:
    prices = Prices(0.0, prompt_per_million=1.0, completion_per_million=2.0)
    assert prices.cost(call(NOON, "acme", "miss")) == pytest.approx(200e-6)
    assert prices.cost(call(NOON, "acme", "hit")) == 0


@pytest.mark.parametrize("home_days", [10])
def test_when_it_pays_for_itself(tmp_path: Path, home_days: int) -> None:
    """A device for 1 an hour, always on: 24 a day. Training: 10 hours. Each day a million tokens are answered."""
    for day in range(home_days + 1):
        one = call(NOON + day * DAY, "acme", "miss", device_s=3600.0)
        one.prompt_tokens, one.completion_tokens = 500_000, 500_000
        written(tmp_path, [one, Record(time=one.time, kind="engine", device_s=3600.0, idle_s=23 * 3600.0)])
    note_training(tmp_path / "ledger", model="bot", phase="train", device_s=36_000.0)
    folder = tmp_path / "ledger"

    def even(api: Prices, **options: bool) -> cost.BreakEven:
        found = cost.costs(folder, Question(), Prices(device_hour=1.0), api, **options)
        assert found is not None
        assert found.break_even is not None
        return found.break_even

    share = (home_days + 1) / home_days  # eleven days' use in ten days from the first call to the last
    dear = even(Prices(0.0, 20.0, 60.0))  # 40 a day
    assert dear.saving_per_day == pytest.approx(16 * share)
    assert dear.days == pytest.approx(10 / (16 * share))
    assert dear.tokens == pytest.approx(10 / 16 * 1e6)
    cheap = even(Prices(0.0, 4.0, 12.0))  # 8 a day
    assert (cheap.days, cheap.tokens) == (None, None)
    assert cheap.needed_tokens_per_day == pytest.approx(3e6 * share)
    shared = even(Prices(0.0, 4.0, 12.0), idle_is_free=True)
    assert shared.days == pytest.approx(10 / (7 * share))


def test_it_says_in_words_when_it_pays_and_when_it_never_does(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no price is set" in refrain("cost")
    assert "set REFRAIN_COMPARE_PROMPT_PER_MILLION" in refrain("cost")
    monkeypatch.setenv("REFRAIN_PRICE_DEVICE_HOUR", "36")
    monkeypatch.setenv("REFRAIN_COMPARE_COMPLETION_PER_MILLION", "10")
    assert "it never pays at this rate" in refrain("cost")
    monkeypatch.setenv("REFRAIN_COMPARE_COMPLETION_PER_MILLION", "100000")
    assert "pays for the training (36.00) after" in refrain("cost")
    assert json.loads(refrain("cost", "--json"))["break_even"]["days"] > 0


def test_every_record_can_be_had_as_jsonl_and_as_parquet(home: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    refrain("export", "--jsonl", str(tmp_path / "all.jsonl"))
    refrain("export", "--parquet", str(tmp_path / "all.parquet"), "--since", "2026-11-20")
    lines = msgspec.json.Decoder(Record).decode_lines((tmp_path / "all.jsonl").read_bytes())
    rows = pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pylist()
    by_time = sorted(LEDGER, key=lambda record: record.time)
    assert sorted(lines, key=lambda record: record.time) == by_time
    assert rows == [msgspec.to_builtins(record) | msgspec.structs.asdict(record) for record in by_time[2:]]


def test_an_admin_reads_the_same_over_http(serve: Callable[..., Running], tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    (admin, _), (user, _) = keys.create("ops", admin=True), keys.create("acme")
    server = serve()
    with server.client(headers={"authorization": f"Bearer {user}"}) as client:
        for number in (1, 1, 2):
            client.post("/v1/chat/completions", json=chat(f"{number}"))
        assert client.get("/admin/usage").status_code == 403
    until(lambda: len(records(tmp_path, kind="call")) == 3)
    with server.client(headers={"authorization": f"Bearer {admin}"}) as client:
        told = client.get("/admin/usage", params={"by": "tenant,cache", "since": "1h"}).json()
        for wrong in ({"by": "colour"}, {"since": "9" * 5000 + "d"}, {"until": "9999-12-31"}, {"since": "0001-01-01"}):
            assert client.get("/admin/usage", params=wrong).status_code == 400
        for odd in ({"by": "day,day"}, {"by": ""}, {"by": "day, cache,day"}, {"since": "99999d"}, {"model": "nobody"}):
            assert client.get("/admin/usage", params=odd).status_code == 200
    assert {(row["tenant"], row["cache"]): row["calls"] for row in told["rows"]} == {
        ("acme", "hit"): 1,
        ("acme", "miss"): 2,
    }
    assert told == summed(tmp_path / "ledger", Question(("tenant", "cache"))).told()

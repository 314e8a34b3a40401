"""The plan: a model of latency and bandwidth, checked by hand, and what it measures on real workers."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

import lightning_slowmo
from lightning_slowmo import PRESETS, QSDP, Gossip, LocalSGD, SlowMo, Workers
from lightning_slowmo.communication.probe import Link, measure_link
from lightning_slowmo.compression import QSGD, SignTopK
from lightning_slowmo.plan import (
    BACKWARD_SHARE,
    DDP,
    SECONDS_HANDLED,
    Costs,
    Inside,
    Prediction,
    at_period,
    inside,
    main,
    measure_costs,
    measure_handling,
    measure_step,
    parse_bandwidth,
    parse_bits,
    parse_count,
    parse_seconds,
    plan,
    predict,
    recommend,
    shapes_of,
    synthetic,
)
from lightning_slowmo.traffic import MEETING_NUMBERS, layout_of
from tests.on_workers import on_workers

MODEL = [(1000, 1000)] * 2
LINK = Link(bandwidth=1e8, latency=1e-3)


def test_local_steps_wait_for_a_header_and_a_ring():
    link = LINK
    header = 3 * 1e-3 + 8 * 3 * 8 * MEETING_NUMBERS / 1e8
    ring = 6 * 1e-3 + 8 * 2 * 3 / 4 * 8e6 / 1e8 + 2e6 * SECONDS_HANDLED
    expected = 0.1 + (header + ring) / 12
    assert predict(LocalSGD(12), MODEL, 4, 0.1, link).step == pytest.approx(expected)
    assert predict(SlowMo(sync_every=12), MODEL, 4, 0.1, link).step == pytest.approx(expected)


def test_overlapped_gossip_hides_its_messages_but_no_header_and_no_work():
    header = 3 * 1e-3 + 8 * 3 * 8 * MEETING_NUMBERS / 1e8
    work, travels = 2e6 * SECONDS_HANDLED, 1e-3 + 8 * 8e6 / 1e8
    for overlap, step, hidden in ((0, 0.1, 0.0), (1, 0.1, 0.1), (2, 0.1, 0.2), (1, 1.0, travels)):
        expected = step + header + work + travels - hidden
        assert predict(Gossip(overlap=overlap), MODEL, 4, step, LINK).step == pytest.approx(expected)


def test_a_shard_sends_and_keeps_its_part_and_the_shards_of_a_worker_share_its_link():
    whole = predict(SlowMo(), MODEL, 4, 0.1, Link(1e8, 0.0))
    shard = predict(SlowMo(), MODEL, 4, 0.1, Link(1e8, 0.0), shards=4)
    headers = 3 * 8 * MEETING_NUMBERS / 12
    assert shard.sent - headers == pytest.approx((whole.sent - headers) / 4)
    assert layout_of([(250, 1000)] * 2).numel * 4 == layout_of(MODEL).numel
    assert SlowMo().state_numel(layout_of([(250, 1000)] * 2), 4) == SlowMo().state_numel(layout_of(MODEL), 4) / 4
    handled = 2e6 * SECONDS_HANDLED / 12
    extra = 3 * 8 * 8 * MEETING_NUMBERS / 12 * (4 - 1) / 1e8  # every shard sends the header, over a fourth of the link
    assert shard.step == pytest.approx(whole.step - handled * 3 / 4 + extra)
    assert predict(DDP(), [(5,), (1,)], 2, 1.0, LINK, shards=2).memory == 4 * (3 + 1)
    rows = plan(MODEL, 4, 0.1, LINK, shards=4)
    assert "moves every element by itself" in rows["qprsgd"]
    assert isinstance(rows["slowmo_sgp"], Prediction)
    advice = recommend(MODEL, 4, 0.001, LINK, shards=4)
    assert "qprsgd" not in advice.text
    assert advice.strategy == "SlowMoModelParallelStrategy(SlowMo(), workers=4)"
    with pytest.raises(ValueError, match="shards must be at least 1, got 0"):
        predict(SlowMo(), MODEL, 4, 0.1, LINK, shards=0)


def test_fsdp2_s_messages_inside_a_worker_whole_and_quantized():
    shapes, rows = [(1001, 1000), (1000,), ()], 251  # of a shard of the first, padded
    plain, quantized = inside(shapes, 4), inside(shapes, 4, QSDP(8, 4))
    assert plain == Inside(2 * 3 * 4 * (rows * 1000 + 250), 3 * 4 * (rows * 1000 + 250))
    buckets, exact = -(-rows * 1000 // 1024), 4 * 250  # the vector travels as it is
    assert quantized.gathered == pytest.approx(2 * 3 * (rows * 1000 + 8 * buckets + exact), rel=1e-4)
    assert quantized.reduced == pytest.approx(3 * (rows * 500 + 4 * buckets + exact), rel=1e-4)
    assert quantized.sent == quantized.gathered + quantized.reduced
    assert inside(shapes, 4, QSDP(None, None)) == plain
    assert inside(shapes, 4, gathers=1).gathered == plain.gathered / 2
    with pytest.raises(ValueError, match="there is nothing to quantize"):
        inside(shapes, 1)
    made = recommend(MODEL, 4, 0.001, LINK, shards=4, qsdp=QSDP(gradient_bits=4)).strategy
    assert made == "SlowMoModelParallelStrategy(SlowMo(), workers=4, qsdp=QSDP(gradient_bits=4))"
    assert eval(made, vars(lightning_slowmo)).core.qsdp == QSDP(8, 4)
    slow = recommend(shapes_of(1e9), 16, 1.0, Link(1e10, 20e-3), 48, shards=2).strategy
    assert eval(slow, vars(lightning_slowmo)).core.bucket_cap_mb > 8


def test_ddp_hides_all_but_the_last_bucket_of_a_fast_link():
    fast, slow = Link(1e12, 0.0), Link(1e6, 0.0)
    assert predict(DDP(), MODEL, 4, 1.0, fast).step == pytest.approx(1.0, rel=1e-3)
    # The first bucket, one matrix, is on its way when the backward pass is half done; the link is busy from then on.
    transfer = 8 * 2 * 3 / 4 * 8e6 / 1e6
    assert predict(DDP(), MODEL, 4, 1.0, slow).step == pytest.approx(1 - BACKWARD_SHARE / 2 + transfer)
    assert predict(DDP(2), MODEL, 4, 0.0, slow).step == pytest.approx(transfer / 2)
    assert predict(DDP(powersgd_rank=1), MODEL, 4, 0.0, slow).step == pytest.approx(transfer / 500)


def test_one_worker_waits_for_nobody():
    for name, row in plan(MODEL, 1, 0.1, LINK).items():
        assert isinstance(row, Prediction), name
        assert (row.step, row.sent) == (0.1, 0)


def test_given_costs_replace_the_usual_ones():
    algorithm = PRESETS["squarm_sgd"]
    dear = {repr(SignTopK(0.01)): Costs(1e-6, 0)}
    more = (
        predict(algorithm, MODEL, 4, 0.1, LINK, dear).step
        - predict(algorithm, MODEL, 4, 0.1, LINK, {repr(SignTopK(0.01)): Costs(0, 0)}).step
    )
    assert more == pytest.approx(2e6 * 1e-6 / 5)


def test_a_preset_that_does_not_fit_says_why_and_the_others_are_planned(monkeypatch):
    monkeypatch.setitem(PRESETS, "cube", Gossip("hypercube"))
    rows = plan(MODEL, 6, 0.1, LINK)
    assert "hypercube cannot connect 6 workers" in rows["cube"]
    assert isinstance(rows["sgp"], Prediction)


def test_sync_every_is_for_those_that_wait_long():
    assert at_period(PRESETS["slowmo"], 24) == SlowMo(sync_every=24)
    assert at_period(PRESETS["slowmo_sgp"], 24) == SlowMo(Gossip(), sync_every=24)
    assert at_period(PRESETS["squarm_sgd"], 24) == PRESETS["squarm_sgd"]
    assert at_period(PRESETS["sgp"], 24) == PRESETS["sgp"]


@pytest.mark.parametrize(
    ("bandwidth", "words"),
    [(1e12, "Stay with ddp"), (2e9, "Use slowmo with sync_every=12"), (1e7, "qprsgd, which sends 4 bits")],
)
def test_advice_goes_with_the_link(bandwidth, words):
    assert words in recommend(MODEL, 8, 0.1, Link(bandwidth, 1e-5)).text


@pytest.mark.parametrize(
    ("bandwidth", "every", "name", "strategy"),
    [
        (1e12, 12, "ddp", '"ddp"'),
        (2e9, 12, "slowmo", "SlowMoStrategy(SlowMo(sync_every=12))"),
        (1.5e9, 24, "slowmo", "SlowMoStrategy(SlowMo(sync_every=24))"),
        (1e7, 12, "qprsgd", "SlowMoStrategy(QPRSGD())"),
        (1e7, 36, "qprsgd", "SlowMoStrategy(QPRSGD(sync_every=36))"),
    ],
)
def test_what_is_advised_can_be_pasted(bandwidth, every, name, strategy):
    advice = recommend(MODEL, 8, 0.1, Link(bandwidth, 1e-5), every)
    assert (advice.name, advice.strategy) == (name, strategy)
    if name != "ddp":
        made = eval(strategy, vars(lightning_slowmo))
        assert made.algorithm == at_period(PRESETS[name], every)


def test_the_period_that_is_advised_does_it():
    text = recommend(MODEL, 8, 0.1, Link(1e8, 1e-5)).text
    needed = int(text.split("would need sync_every=")[1].split(".")[0])
    assert predict(SlowMo(sync_every=needed), MODEL, 8, 0.1, Link(1e8, 1e-5)).step <= 0.11
    assert predict(SlowMo(sync_every=needed - 1), MODEL, 8, 0.1, Link(1e8, 1e-5)).step > 0.1099


def test_latency_takes_a_small_part_of_the_time_of_many_bytes_on_a_long_fast_link():
    link, shapes = Link(1e10, 1e-3), shapes_of(7e9)
    travels = 8 * 2 * 63 / 64 * 4 * 7e9 / 1e10
    sync = 12 * (predict(LocalSGD(12), shapes, 64, 1.0, link, handling=0.0).step - 1.0)
    assert travels < sync < 1.25 * travels
    small = predict(LocalSGD(12), shapes, 64, 1.0, link, handling=0.0, bucket_cap_mb=8)
    assert 12 * (small.step - 1.0) > 3 * travels  # what buckets of 8 MiB would take


def test_the_size_of_messages_that_is_advised_is_faster():
    link, shapes = Link(1e10, 20e-3), shapes_of(1e9)
    advice = recommend(shapes, 16, 1.0, link, 48)
    made = eval(advice.strategy, vars(lightning_slowmo))
    assert made.bucket_cap_mb > 100
    steps = [
        predict(made.algorithm, shapes, 16, 1.0, link, bucket_cap_mb=cap).step for cap in (made.bucket_cap_mb, None)
    ]
    assert steps[0] < 0.97 * steps[1]
    assert f"Messages of {made.bucket_cap_mb} MiB" in advice.text
    assert "bucket_cap_mb" not in recommend(shapes, 16, 1.0, Link(1e10, 1e-6), 48).strategy
    assert recommend(shapes, 16, 1.0, link, 48, bucket_cap_mb=30).strategy.endswith("bucket_cap_mb=30)")


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bandwidth, "1gbit", 1e9),
        (parse_bandwidth, "100mbit", 1e8),
        (parse_bandwidth, "10Gbit/s", 1e10),
        (parse_bandwidth, "2.5Mbit", 2.5e6),
        (parse_bandwidth, "1e6bit", 1e6),
        (parse_seconds, "0.2ms", 2e-4),
        (parse_seconds, "50us", 5e-5),
        (parse_seconds, "1s", 1.0),
        *((parse_seconds, zero, 0.0) for zero in ("0", "0.0", "0ms")),
        (parse_count, "25.6e6", 25.6e6),
        (parse_count, "25.6M", 25.6e6),
        (parse_count, "1.5B", 1.5e9),
        (parse_count, "25557032", 25557032),
        *((parse_bits, text, bits) for text, bits in (("8/4", (8, 4)), ("none/8", (None, 8)), ("8/None", (8, None)))),
    ],
)
def test_units(parse, text, value):
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *(
            (parse_bandwidth, text)
            for text in ("1", "1GB", "100 mbps", "-1gbit", "gbit", "0gbit", "1gibit", "", "nan", "inf", "1e999bit")
        ),
        *((parse_seconds, text) for text in ("1", "0.2 m", "ms", "-1ms", "1min", "", "nan", "nanms", "1e999s")),
        *((parse_bits, text) for text in ("8", "8/", "8.0/8", "8/8/8", "no/8", "")),
        *((parse_count, text) for text in ("25.6 Mio", "M", "-3", "0", "1e", "", "nan", "inf", "1e999")),
    ],
)
def test_units_that_are_none(parse, text):
    with pytest.raises(ValueError, match="write "):
        parse(text)


def test_shapes_have_about_as_many_elements():
    for params in (1, 1000, 25.6e6, 1.5e9):
        assert sum(a * b for a, b in shapes_of(params)) == pytest.approx(params, rel=0.02)


COMMAND = ["--params", "25.6e6", "--step-ms", "170", "--workers", "32", "--bandwidth", "1gbit", "--latency", "0.2ms"]


def test_the_command_prints_a_table_and_advice(capsys):
    main(COMMAND)
    text = capsys.readouterr().out
    assert all(f"| `{name}` |" in text for name in ("ddp", *PRESETS))
    assert "slowmo with sync_every=12" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    steps = [float(row[2]) for row in rows]
    assert steps == sorted(steps)
    [marked] = [row[1] for row in rows if row[0]]
    advice = recommend(shapes_of(25.6e6), 32, 0.17, Link(1e9, 2e-4))
    assert marked == f"`{advice.name}`"
    assert text.endswith(f"import QPRSGD, SlowMoStrategy\n    Trainer(strategy={advice.strategy})\n")


def test_the_command_prints_json(capsys):
    main([*COMMAND, "--json", "--sync-every", "48"])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"inputs", "predicted", "recommendation", "recommended", "strategy"}
    assert printed["inputs"]["bandwidth"] == 1e9
    assert printed["predicted"]["slowmo"]["step"] < printed["predicted"]["ddp"]["step"]
    assert "sync_every=48" in printed["recommendation"]


def test_the_command_says_what_shards_send_one_another(capsys):
    main([*COMMAND, "--shards", "4", "--qsdp", "8/none"])
    text = capsys.readouterr().out
    shapes = shapes_of(25.6e6)
    for name, qsdp in (("full precision", None), ("QSDP(gradient_bits=None)", QSDP(8, None))):
        messages = inside(shapes, 4, qsdp)
        assert f"{messages.sent / 1e9:.4g} GB a step with {name}: " in text
    assert "workers=32, qsdp=QSDP(gradient_bits=None))" in text
    main([*COMMAND, "--shards", "4", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["inside"] == {"full precision": vars(inside(shapes, 4))}


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["--params", "3M"], "--step-ms and --workers and --bandwidth must be given"),
        ([*COMMAND, "--bandwidth", "1GB"], "'1GB' is no bandwidth: write 100mbit"),
        ([*COMMAND, "--latency", "2"], "'2' is no duration: write 0.2ms"),
        ([*COMMAND, "--params", "many"], "'many' is no number of parameters"),
        ([*COMMAND, "--workers", "0"], "--workers must be at least 1"),
        ([*COMMAND, "--step-ms", "0"], "--step-ms must be above 0"),
        ([*COMMAND, "--step-ms", "nan"], "--step-ms must be above 0 and finite, got nan"),
        ([*COMMAND, "--step-ms", "inf"], "--step-ms must be above 0 and finite, got inf"),
        ([*COMMAND, "--latency", "nan"], "'nan' is no duration: write 0.2ms"),
        ([*COMMAND, "--bandwidth", "nan"], "'nan' is no bandwidth: write 100mbit"),
        ([*COMMAND, "--params", "nan"], "'nan' is no number of parameters"),
        ([*COMMAND, "--sync-every", "-1"], "--sync-every must be at least 1"),
        ([*COMMAND, "--bucket-cap-mb", "0"], "--bucket-cap-mb must be None or a number of MiB"),
        ([*COMMAND, "--qsdp", "8/8"], "--qsdp needs --shards of at least 2"),
        ([*COMMAND, "--shards", "2", "--qsdp", "8"], "'8' are no bits of weights and gradients: write 8/8"),
        ([*COMMAND, "--shards", "2", "--qsdp", "8/1"], "gradient_bits is 1; allowed are 2 to 16"),
        ([*COMMAND, "--step", "a:b"], "--step needs --measure"),
        (["--measure", "--params", "3M"], "--measure needs torchrun"),
    ],
)
def test_the_command_says_what_is_wrong(command, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err.replace("\n", " ")


def test_a_latency_of_zero_is_taken_as_it_is(capsys):
    steps = {}
    for latency in ("0", "0.2ms"):
        main([*COMMAND, "--latency", latency, "--json"])
        printed = json.loads(capsys.readouterr().out)
        assert printed["inputs"]["latency"] == parse_seconds(latency)
        steps[latency] = printed["predicted"]["local_sgd"]["step"]
    layout = layout_of(shapes_of(25.6e6))
    messages = sum(sync.messages / sync.every for sync in PRESETS["local_sgd"].syncs(layout, 32))
    assert steps["0.2ms"] - steps["0"] == pytest.approx(2e-4 * messages)


def test_the_command_prints_gigabytes_and_gigabits(capsys):
    main([*COMMAND, "--bandwidth", "100mbit"])
    text = capsys.readouterr().out
    assert "0.1 Gbit/s, 0.2 ms a message" in text
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    ddp = next(row for row in rows if row[2] == "`ddp`")
    cells = dict(zip(rows[0], ddp, strict=True))
    assert float(cells["GB sent / step"]) == pytest.approx(2 * 31 / 32 * 4 * 25.6e6 / 1e9, rel=1e-3)
    assert float(cells["extra memory, GB"]) == pytest.approx(4 * 25.6e6 / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("workers", "step", "link", "complaint"),
    [
        (4, math.nan, LINK, "step must be a finite number of seconds, at least 0, got nan"),
        (4, math.inf, LINK, "step must be a finite"),
        (4, -0.1, LINK, "step must be a finite"),
        (4, 0.1, Link(1e9, math.nan), "latency must be a finite number of seconds, at least 0, got nan"),
        (4, 0.1, Link(math.nan, 0.0), "bandwidth must be above 0 bits per second, got nan"),
        (4, 0.1, Link(0.0, 0.0), "bandwidth must be above 0"),
        (0, 0.1, LINK, "workers must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("way", [DDP(), LocalSGD()])
def test_numbers_that_make_no_sense_are_refused_in_words(way, workers, step, link, complaint):
    with pytest.raises(ValueError, match=complaint):
        predict(way, MODEL, workers, step, link)
    with pytest.raises(ValueError, match=complaint):
        plan(MODEL, workers, step, link)


def test_compressors_are_timed():
    costs = measure_costs(QSGD(4), numel=2**14, repeats=2)
    assert 1e-11 < costs.compress < 1e-5
    assert 1e-11 < costs.decompress < 1e-5


def test_a_sync_is_timed():
    assert 1e-11 < measure_handling(numel=2**14, repeats=2) < 1e-4


def test_a_synthetic_model_is_as_large_as_asked_and_steps():
    model, step = synthetic(3e6)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3e6, rel=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    step()
    assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@on_workers(2, 3)
def test_the_link_is_measured_and_equal_for_all(workers: Workers) -> None:
    link = measure_link(workers, repeats=2)
    assert 1e6 < link.bandwidth < 1e13
    assert 1e-7 < link.latency < 1.0
    assert len({tuple(row) for row in workers.gather([link.bandwidth, link.latency])}) == 1


@on_workers(2)
def test_a_step_is_measured(workers: Workers) -> None:
    import time

    seconds = measure_step(lambda: time.sleep(0.02), workers, repeats=3)
    assert 0.02 <= seconds < 1.0
    assert len({row[0] for row in workers.gather([seconds])}) == 1


def test_a_worker_alone_has_no_link():
    with pytest.raises(ValueError, match="two workers at least"):
        measure_link(Workers())


def tiny() -> tuple[torch.nn.Module, object]:
    """A model and its step, for the command."""
    return synthetic(1e4, batch=2)


@pytest.mark.faults
@pytest.mark.processes
def test_the_command_measures_under_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "lightning_slowmo.plan", "--measure", "--step", "tests.test_plan:tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout[done.stdout.index("{") :])
    assert printed["inputs"]["workers"] == 2
    assert printed["inputs"]["params"] == sum(p.numel() for p in tiny()[0].parameters())
    assert printed["inputs"]["step"] > 0
    assert printed["predicted"]["slowmo"]["step"] > printed["inputs"]["step"]

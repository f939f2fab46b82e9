import pytest

from ecoflap.support import formats


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "not measured"),
        (0.0, "0 s"),
        (0.314, "0.31 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.7, "1 h 00 min"),
        (5985, "1 h 40 min"),
    ],
)
def test_duration(seconds, text):
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "not measured"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (25_000_000, "25.0 MB"),
        (8_940_000_000, "8.94 GB"),
    ],
)
def test_size(count, text):
    assert formats.size(count) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 3, "0"),
        (26.74, 4, "26.74"),
        (9.9999, 3, "10.0"),
        (0.00012345, 3, "0.000123"),
        (0.000012345, 3, "1.23e-05"),
        (717.4, 4, "717.4"),
        (123456.0, 3, "123456"),
        (1234567.0, 3, "1.23e+06"),
        (-2.5, 2, "-2.5"),
        (float("inf"), 3, "inf"),
    ],
)
def test_significant(value, digits, text):
    assert formats.significant(value, digits) == text


def test_metric_value():
    assert formats.metric_value("accuracy", 0.95, 0.0094) == "95.0 % ± 0.9"
    assert formats.metric_value("accuracy", 0.95) == "95.0 %"
    assert formats.metric_value("macro_accuracy", 0.25, 0.083) == "25.0 % ± 8.3"
    assert formats.metric_change("macro_accuracy", 0.25, 0.5) == "+25.0 points"
    assert formats.metric_value("perplexity", 26.743, 0.412) == "26.74 ± 0.41"
    assert formats.metric_value("perplexity", None) == "not measured"


@pytest.mark.parametrize(
    ("metric", "dense", "pruned", "text"),
    [
        ("accuracy", 0.9, 0.85, "−5.0 points"),
        ("accuracy", 0.9, 0.9001, "0.0 points"),
        ("perplexity", 20.0, 30.0, "+50.0 %"),
        ("perplexity", 0.0, 1.0, "not measured"),
        ("accuracy", None, 0.9, "not measured"),
        ("accuracy", 0.9, None, "not measured"),
    ],
)
def test_metric_change(metric, dense, pruned, text):
    assert formats.metric_change(metric, dense, pruned) == text


def test_counts_and_titles():
    assert formats.integer(1_234_567) == "1\u2009234\u2009567"
    assert formats.percent(0.51234, 2) == "51.23 %"
    assert formats.task_title("vqa", "accuracy") == "vqa accuracy"
    assert formats.task_title("perplexity", "perplexity") == "perplexity"
    assert formats.task_title("answer-perplexity", "perplexity") == "answer-perplexity"


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("TR@10", "51.2 % ± 2.0"),
        ("top-5 accuracy", "51.2 % ± 2.0"),
        ("acc_norm,none", "51.2 % ± 2.0"),
        ("CIDEr", "51.2 ± 2.0"),
        ("CIDEr (simple words)", "51.2 ± 2.0"),
        ("SPICE", "51.2 ± 2.0"),
        ("word_perplexity,none", "0.5124 ± 0.020"),
        ("TRUE", "0.5124 ± 0.020"),
    ],
)
def test_units_follow_the_metric(metric, text):
    assert formats.metric_value(metric, 0.51244, 0.02) == text


def test_change_of_metrics_that_are_shown_times_100():
    assert formats.metric_change("CIDEr", 1.053, 0.9) == "−15.3 points"
    assert formats.metric_change("IR@1", 0.5, 0.625) == "+12.5 points"


def test_long_names() -> None:
    """Of two methods what differs stays visible, at either end; of a path its end does."""
    rules, last = ("wanda", "sparsegpt"), (32, 64)
    methods = [f"zeroth-order + {rule} (search, search_options samples={n})" for rule in rules for n in last]
    short = [formats.shortened(method, 26) for method in methods]
    assert len(set(short)) == 4
    assert {len(name) for name in short} == {26}
    assert formats.shortened("model.layers.10.mlp.up_proj", 12) == "…mlp.up_proj"
    assert formats.shortened("short", 5) == "short"


def test_an_axis_of_times_has_the_unit_of_its_longest() -> None:
    assert [formats.time_unit(t) for t in (0.0, 179.0, 180.0, 10_799.0, 10_800.0)] == [
        ("seconds", 1.0), ("seconds", 1.0), ("minutes", 60.0), ("minutes", 60.0), ("hours", 3600.0),
    ]  # fmt: skip

"""The report: self-contained, honest in its first sentence, safe against hostile names, and equal to the last bit."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from metapool.base.errors import MetapoolError
from metapool.interface import figures, report
from metapool.interface.figures.labels import place_labels
from metapool.interface.report import wording, write_report
from metapool.interface.report.files import PoolModel, Scores

HOSTILE = '<img src=x onerror="alert(1)">$_{'
IDS = [f"{kind}-{i}" for kind in ("conv4", "resnet10") for i in range(3)]


def method(one, five, ms=0.2, models=1, **more):
    shots = {"1": {"mean": one, "ci95": 0.7}, "5": {"mean": five, "ci95": 0.5}}
    cost = {"parameters": 112_832 * models, "models_at_inference": models, "ms_per_image": ms}
    return {"data_free": True, "shots": shots} | cost | more


def scores_of(tgr=(66.1, 83.0)):
    methods = {
        "tgr": method(*tgr),
        "ensemble": method(68.1, 83.8, ms=6.4, models=30),
        "untrained": method(41.0, 59.0),
        "maml": method(90.0, 95.0, transductive=True),
        "oracle": method(70.0, 86.0, data_free=False),
    }
    paired = []
    for shot, theirs in (("1", 68.1), ("5", 83.8)):
        gap = methods["tgr"]["shots"][shot]["mean"] - theirs
        # Stored the other way round than it is told.
        paired.append({"a": "ensemble", "b": "tgr", "shot": shot, "mean": -gap, "low": -gap - 0.4, "high": -gap + 0.4})
    episodes = {"hash": "0123456789abcdef", "way": 5, "query": 15, "n": 600}
    return {"episodes": episodes, "methods": methods, "paired": paired, "seconds": {"recover": 200.0, "embed": 9.0}}


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    models = [
        {"id": name, "architecture": name[:-2], "width": 32, "classes": ["heart", HOSTILE], "accuracy": 95.0}
        | {"parameters": 28_000, "licence": "CC-BY-4.0"}
        for name in IDS
    ]
    about = {
        "name": "small",
        "command": "metapool run recipes/small.yaml",
        "version": "0.1.0",
        "seed": 0,
        "quick": False,
        "recipe": {"method": {"name": "tgr", "alpha": 0.001}},
        "machine": {"cpu": "a cpu", "cores": 2, "torch": "2.10", "platform": "Linux"},
        "started": "2026-11-24T13:00:00+00:00",
        "pool": {"name": "icons", "models": models},
        "headline": "tgr",
        "selected": {"tgr": "step 90"},
        "resumed": False,
    }
    write(tmp_path / "run.json", about)
    write(tmp_path / "scores.json", scores_of())
    steps = [
        {"method": name, "step": i, "loss": 1 / (i + 1), "discrepancy": 2 / (i + 1), "cosine": 0.1, "group": 0}
        for name in ("tgr", HOSTILE)
        for i in range(60)
    ]
    lines = [json.dumps(step) for step in steps]
    (tmp_path / "steps.jsonl").write_text("\n".join([*lines, '{"method": "tgr", "st']))
    matrix = rng.random((6, 6))
    grouping = {"models": IDS, "dissimilarity": (matrix + matrix.T).tolist(), "groups": [[0, 3, 5], [1, 2, 4]]}
    write(tmp_path / "grouping.json", grouping)
    images = {name: rng.integers(0, 256, (8, 1 + 2 * (i % 2), 16, 16), np.uint8) for i, name in enumerate(IDS)}
    np.savez(tmp_path / "gallery.npz", **images)
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content))


def change(path, **fields):
    write(path, json.loads(path.read_text()) | fields)


class Page(HTMLParser):
    """Collects the tags, and the text by section."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    @property
    def headings(self):
        return re.findall(r"<h2>(.*?)</h2>", self.html)

    @property
    def lede(self):
        return re.search(r'<p class="lede">(.*?)</p>', self.html).group(1).replace("\u00a0", " ")


ALWAYS = [
    "Accuracy against cost",
    "All methods",
    "Paired differences",
    "What ran",
    "The pool and its licences",
    "Run it again",
]
OPTIONAL = {"gallery.npz": "Recovered images", "grouping.json": "How unlike the models are", "steps.jsonl": "Training"}


def test_page_loads_nothing(run):
    page = Page(write_report(run))
    assert not [tag for tag, _ in page.tags if tag in {"script", "iframe", "object", "embed", "base", "form"}]
    targets = [
        value for _, attrs in page.tags for name, value in attrs.items() if name in {"src", "href", "xlink:href"}
    ]
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"@import|url\((?!#)", page.html)


def test_every_section_is_there_in_order(run):
    headings = Page(write_report(run)).headings
    assert headings == [*ALWAYS[:3], *OPTIONAL.values(), *ALWAYS[3:]]


def test_missing_and_empty_files_leave_their_sections_out(run):
    for name in OPTIONAL:
        (run / name).unlink()
    assert Page(write_report(run)).headings == ALWAYS
    (run / "steps.jsonl").write_text("")
    assert Page(write_report(run)).headings == ALWAYS


def test_hostile_names_are_escaped(run):
    page = Page(write_report(run))
    assert "onerror" in page.html
    assert not [attrs for _, attrs in page.tags if "onerror" in attrs]
    assert "<img src=x" not in page.html


def test_ids_are_unique_across_figures(run):
    ids = [attrs["id"] for _, attrs in Page(write_report(run)).tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 0


def test_first_sentence_names_the_winner_and_flips_with_the_scores(run):
    lost = Page(write_report(run))
    assert lost.lede.startswith("The ensemble of all 30 models is the most accurate data-free method: 68.1 / 83.8 %")
    assert "tgr reaches 66.1 / 83.0 % with one network in 1/32 of the time" in lost.lede
    assert "2.0 points below at 1-shot (95 % interval −2.4 to −1.6)" in lost.html.replace("\u00a0", " ")
    write(run / "scores.json", scores_of(tgr=(69.0, 84.0)))
    won = Page(write_report(run))
    assert won.lede.startswith(
        "tgr is the most accurate data-free method: 69.0 / 84.0 % (1- / 5-shot) with one network"
    )
    assert won.lede.endswith("the ensemble of all 30 models reaches 68.1 / 83.8 % at 32 times the time.")
    assert "0.9 points above at 1-shot" in won.html.replace("\u00a0", " ")
    # 0.2 ahead with an interval of 0.4 to either side is not ahead.
    assert "level at 5-shot (−0.2 to +0.6)" in won.html.replace("\u00a0", " ")


def test_winner_on_average_only_says_so():
    scores = Scores.model_validate(scores_of(tgr=(75.0, 83.0)))
    assert wording.headline_sentence(scores, "tgr").startswith("tgr is the most accurate data-free method on average:")


def test_transductive_and_real_data_methods_do_not_compete():
    scores = Scores.model_validate(scores_of())
    assert wording.ranked(scores)[0] == "maml"
    assert wording.winner(scores) == "ensemble"
    frontier = figures.pareto_frontier(wording.points_of(scores, 1, "tgr"))
    assert [point.name for point in frontier] == ["tgr", "ensemble"]
    assert wording.frontier_sentence(scores, "tgr") == "tgr is on the frontier at 1-shot and 5-shot."
    beaten = Scores.model_validate(scores_of(tgr=(40.0, 83.0)))
    assert "5-shot; at 1-shot untrained is at least as accurate and no slower" in wording.frontier_sentence(
        beaten, "tgr"
    )


def test_a_run_of_one_method_or_without_the_headline(run):
    lone = scores_of()
    lone["methods"] = {"untrained": lone["methods"]["untrained"]}
    lone["paired"] = []
    write(run / "scores.json", lone)
    assert Page(write_report(run)).lede.startswith("untrained is the most accurate data-free method: 41.0 / 59.0 %")


def test_quick_run_is_marked(run):
    assert "Quick run." not in Page(write_report(run)).html
    change(run / "run.json", quick=True)
    page = Page(write_report(run))
    assert "<b>Quick run.</b>" in page.html
    assert "(quick run)" in re.search("<title>(.*?)</title>", page.html).group(1)


def test_writing_twice_gives_identical_bytes_and_no_leftovers(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == sorted([*OPTIONAL, "run.json", "scores.json", "report.html"])
    change(run / "run.json", seed=1)
    assert write_report(run).read_bytes() != first


@pytest.mark.parametrize("name", ["run.json", "scores.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_broken_file_is_named(run, name, content):
    (run / name).unlink() if content is None else (run / name).write_text(content)
    with pytest.raises(MetapoolError, match=re.escape(name)):
        write_report(run)


def test_a_gallery_of_something_else_is_refused(run):
    np.savez(run / "gallery.npz", **{IDS[0]: np.zeros((8, 2, 4, 4), np.uint8)})
    with pytest.raises(MetapoolError, match="recovered images must be uint8"):
        write_report(run)


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_missing_extra_is_named(run, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MetapoolError, match=re.escape("pip install 'metapool[report]'")):
        write_report(run)


@pytest.mark.parametrize("crowd", [1, 12])
def test_labels_do_not_overlap(crowd):
    points = [figures.Point(f"method-{i}", 0.2, 66 + 0.1 * i, 0.7, highlight=i == 0) for i in range(crowd)]
    assert figures.accuracy_against_cost(points, "accuracy").count("method-") == crowd
    box = (0.0, 0.0, 10.0, 5.0)
    own = [((0.0, y, 10.0, y + 5), y / 1000) for y in range(0, 100, 5)]
    chosen = place_labels([own] * crowd, [], (0.0, 0.0, 10.0, 200.0))
    assert len({own[choice][0] for choice in chosen}) == crowd
    assert place_labels([own], [box], (0.0, 0.0, 10.0, 200.0)) == [1]


@pytest.mark.parametrize(
    ("value", "text"), [(0.2, "0.20"), (6.4, "6.4"), (123.4, "123"), (0.0123, "0.012"), (0, "–"), (float("nan"), "–")]
)
def test_two_digits(value, text):
    assert wording.significant(value) == text


@pytest.mark.parametrize(
    ("own", "other", "words"),
    [
        (1, 32, "at 32 times the time"),
        (1, 1.5, "at 1.5 times the time"),
        (1, 1.01, "in the same time"),
        (32, 1, "in 1/32 of the time"),
        (3, 1, "in 33 % of the time"),
        (0, 1, "at a cost that was not measured"),
    ],
)
def test_time_in_words(own, other, words):
    assert wording.time_ratio(own, other) == words


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_run_learns_at_its_start_that_the_report_lacks_a_package(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.check_installed()
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(MetapoolError, match=f"needs {module}: pip install 'metapool"):
        report.check_installed()


def test_images_are_shown_of_each_architecture_and_from_all_over_the_pool() -> None:
    names = [(domain, place) for domain in ("icons", "emoji", "logos") for place in range(12)]
    models = [
        PoolModel(id=f"{domain}-{place}", architecture=("conv4", "resnet10", "resnet18")[place % 3], classes=["a"])
        for domain, place in names
    ]
    shown = [model for model in models if model.id in report._spread(models)]
    assert sorted(model.architecture for model in shown) == sorted(["conv4", "resnet10", "resnet18"] * 2)
    assert sorted(model.id.partition("-")[0] for model in shown) == sorted(["icons", "emoji", "logos"] * 2)
    assert report._spread(models[:2]) == {"icons-0", "icons-1"}, "a single model of an architecture is shown"
    assert report._spread([]) == set()

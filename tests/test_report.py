"""The page as a browser parses it: whole whatever is missing, nothing loaded, foreign text stays text."""

import base64
import copy
import hashlib
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tinylab.exceptions import UserError
from tinylab.run.folder import Run
from tinylab.share import report
from tinylab.share.report import page, wilson

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAASFvFNAAAAEElEQVR4nGP4z8AARwzIHAB9mgf5Y1jP4AAAAABJRU5ErkJggg=="
)
"""3 x 2 pixels."""

FIGURES = (
    "curves", "learning_rate", "samples", "augmentation", "classes", "confused_pairs", "confusion", "misclassified",
    "confident_mistakes", "hesitant_hits", "reliability", "label_conflicts", "class_maps", "gradcam", "localisation",
    "faithfulness",
)  # fmt: skip

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "right-to-left \u202e override \u2066",
    "bell \x07 escape \x1b[31m nul \0",
    "two\nlines\u2028three",
    "lone surrogate \ud800",
    "{{ 7 * 7 }} {% raw %} &amp; &lt;b&gt;",
    "</style><style>*{display:none}</style>",
    "javascript:alert(1)",
    "W" * 121,
    "x" * 5000,
    "金魚, عربي",
    "",
]
VOID = {"meta", "img", "rect", "br"}


class Page(HTMLParser):
    """Elements in order, each with its attributes and text; complains of what is not closed as it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)
        self.close()
        assert not self.open, [element["tag"] for element in self.open]

    def handle_starttag(self, tag: str, attributes: list) -> None:
        assert len({name for name, _ in attributes}) == len(attributes), (
            f"an attribute twice: {tag} {attributes}"
        )
        element = {
            "tag": tag,
            "text": "",
            "in": [each["tag"] for each in self.open],
            **dict(attributes),
        }
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()["tag"] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, *tags: str) -> list[dict]:
        return [element for element in self.elements if element["tag"] in tags]

    @property
    def text(self) -> str:
        (body,) = self.all("body")
        return " ".join(body["text"].split())

    def rows(self, caption: str) -> list[list[str]]:
        """Cells of the one table whose caption has these words."""
        tables, rows = [], {}
        for element in self.elements:
            if element["tag"] == "table":
                tables.append(element)
                rows[len(tables)] = []
            elif element["tag"] == "tr" and "tbody" in element["in"]:
                rows[len(tables)].append([])
            elif element["tag"] in ("td", "th") and "tbody" in element["in"]:
                rows[len(tables)][-1].append(element)
        (found,) = [number for number, table in enumerate(tables, 1) if caption in table["text"]]
        return [[" ".join(cell["text"].split()) for cell in row] for row in rows[found]]


def interval(mean: float, width: float = 0.02) -> dict:
    return {"mean": mean, "low": mean - width, "high": mean + width}


def analysis(names: list[str]) -> dict:
    """What explain.json holds, in the shapes of `errors`, `localisation` and `faithfulness`."""
    named = [
        {"index": i, "wnid": f"n{i:08d}", "name": name, "images": 9} for i, name in enumerate(names)
    ]
    first, second = named[0], named[1]
    classes = [
        each
        | {
            "top1": 100 * i / len(named),
            "top5": 100.0,
            "mistaken_for": {"wnid": "n", "name": first["name"], "count": 2},
        }
        for i, each in enumerate(named)
    ]
    classes[-1] |= {"top1": None, "top5": None, "images": 0, "mistaken_for": None}
    sharp = {"ece": 0.0712, "nll": 1.2345, "mean_confidence": 0.8, "accuracy_overall": 0.7}
    bins = {"confidence": [None, 0.5], "accuracy": [None, 0.5], "count": [0, 9]}
    groups = [
        {"boxes": boxes, "answers": answers, "class": which, "images": 40, "hit": interval(0.91),
         "energy": interval(0.63), "centre_hit": interval(0.78), "uniform": interval(0.52),
         "hit_minus_centre": interval(0.13), "energy_minus_uniform": interval(-0.11)}
        for boxes in ("all", "below half")
        for answers, which in (("all", "predicted"), ("all", "actual"), ("right", "both"), ("wrong", "predicted"),
                               ("wrong", "actual"))
    ]  # fmt: skip
    measures = (
        "hit",
        "energy",
        "centre_hit",
        "uniform",
        "hit_minus_centre",
        "energy_minus_uniform",
    )
    groups[-1] |= dict.fromkeys(measures) | {"images": 0}
    curves = {"most_relevant_first": [-0.1, -0.4], "least_relevant_first": [None, -0.2]}
    answer = [
        {**{k: each[k] for k in ("wnid", "name")}, "probability": 0.6} for each in (first, second)
    ]
    return {
        "tested": 90, "wrong": 27, "seed": 0, "method": "gradcam", "explained_class": "predicted",
        "images": [{"row": 71234, "predicted": answer[0], "actual": answer[1]}],
        "errors": {
            "best": classes[::-1][:3], "worst": classes[:3], "classes": classes,
            "pairs": [{"one": first, "other": second, "one_as_other": 4, "other_as_one": 3, "count": 7}],
            "calibration": {"bins": 2, "folds": 2, "temperature": 1.5, "temperatures": [1.4, 1.6], "note": None,
                            "before": sharp | bins, "after": sharp | bins | {"ece": 0.0123}},
        },
        "label_conflicts": {
            "pairs": [{"rows": [5, 31], "names": names[:2], "tested": [False, True]}], "found": 1,
            "tested": 1, "wrong": 1, "answered_as_twin": 1, "wrong_in_all": 27, "share_of_error": 1 / 27,
        },
        "localisation": {
            "stage": "layer4", "method": "gradcam", "native_size": [8, 8], "sampled": 42, "degenerate": 2, "scored": 40,
            "empty_maps": 1, "seed": 0, "resamples": 2000, "groups": groups,
        },
        "faithfulness": {
            "images": 40, "method": "gradcam", "stage": "layer4", "seed": 0, "percentiles": [20, 80], "map": curves,
            "random": curves, "combined": interval(0.2), "random_combined": interval(0.0), "difference": interval(0.2),
            "seconds": 20.5,
        },
    }  # fmt: skip


@pytest.fixture
def explanation(finished_run: Run) -> dict:
    return analysis(["red", "green", "blue"]) | {
        "model_sha256": finished_run.summary["model_sha256"]
    }


@pytest.fixture
def figures() -> dict[str, bytes]:
    return dict.fromkeys(FIGURES, PNG)


def changed(run: Run, folder: Path, file: str, **fields: object) -> Run:
    """A copy of the run with other fields in one of its records."""
    copied = Run(
        shutil.copytree(
            run.folder, folder / "changed", ignore=shutil.ignore_patterns("checkpoints")
        )
    )
    content = json.loads((copied.folder / file).read_text())
    copied.write(file, content | fields)
    return copied


def assert_sound(text: str) -> Page:
    """Whole, accessible, self-contained: what holds of every page."""
    found = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    text.encode("utf-8")
    ids = [element["id"] for element in found.elements if "id" in element]
    assert len(set(ids)) == len(ids)
    for element in found.elements:
        assert not [name for name in element if name.startswith("on")], element
        assert "style" not in element, "the security policy forbids it"
        for name in (
            "src",
            "srcset",
            "href",
            "action",
            "data",
            "poster",
            "background",
            "xlink:href",
        ):
            target = element.get(name)
            inside = target is None or target.startswith(("#", "data:image/png;base64,"))
            assert inside, f"{element['tag']} {name} loads something"
        if (element.get("href") or "").startswith("#"):
            assert element["href"][1:] in ids
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "header", "footer", "nav", "section", "ul",
               "li", "h1", "h2", "h3", "p", "a", "div", "dl", "dt", "dd", "span", "small", "strong", "b", "em", "code",
               "bdi", "figure", "img", "figcaption", "table", "caption", "thead", "tbody", "tr", "th", "td", "details",
               "summary", "svg", "rect"}  # fmt: skip
    assert {element["tag"] for element in found.elements} <= allowed
    assert_accessible(found)
    return found


def assert_accessible(found: Page) -> None:
    levels = [int(element["tag"][1]) for element in found.all("h1", "h2", "h3")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), (
        "a level is left out"
    )
    assert all(
        element["text"].strip() for element in found.all("h1", "h2", "h3", "summary", "a", "title")
    )
    assert all(len(element["alt"]) > 20 for element in found.all("img"))
    for header in found.all("th"):
        assert header["scope"] == ("col" if "thead" in header["in"] else "row")
        assert header["text"].strip() or header["scope"] == "row"
    assert found.all("html")[0]["lang"] == "en"
    labelled = {element["aria-labelledby"] for element in found.all("section")}
    assert labelled <= {element.get("id") for element in found.all("h2")}


def test_the_page_is_sound_and_tells_the_result(
    finished_run: Run, explanation: dict, figures: dict
) -> None:
    found = assert_sound(page(finished_run, explanation, figures))
    assert "Missing" not in found.text
    assert len(found.all("img")) == len(FIGURES)
    assert finished_run.title in found.all("title")[0]["text"]
    assert f"{finished_run.summary['test_top1']:.2f}\u00a0%" in found.all("dd")[0]["text"]
    assert finished_run.summary["model_sha256"] in found.text
    assert "tinylab explain RUN" not in found.text, "nothing is to be made anew"


def test_equal_inputs_make_equal_pages(finished_run: Run, explanation: dict, figures: dict) -> None:
    assert page(finished_run, explanation, figures) == page(finished_run, explanation, figures)


def test_the_caveats_are_there(finished_run: Run, explanation: dict) -> None:
    text = assert_sound(page(finished_run, explanation, {})).text
    for caveat in (
        "One run, seed 0",
        "3 classes, not 200",
        "Computed on a CPU",
        "The last epoch",
        "Split “merged”",
    ):
        assert caveat in text, caveat
    assert "33.3\u00a0%" in text.replace(" %", "\u00a0%"), "what guessing would be worth"
    assert "of other weights" not in text
    assert "steps were skipped" not in text


def test_what_went_otherwise_is_said(finished_run: Run, explanation: dict, tmp_path: Path) -> None:
    run = changed(
        finished_run, tmp_path, "summary.json", skipped_steps=3, stops=2, model_sha256="0" * 64
    )
    text = assert_sound(page(run, explanation, {})).text
    assert "3 steps were skipped" in text
    assert "continued 2 times" in text
    assert "of other weights" in text


def test_all_200_classes_are_compared_with_the_published_run(
    finished_run: Run, explanation: dict, tmp_path: Path
) -> None:
    run = changed(finished_run, tmp_path, "summary.json", classes=200)
    text = assert_sound(page(run, explanation, {})).text
    assert "57.55" in text
    assert "not 200" not in text


def test_a_changed_recipe_is_told_apart_from_the_named_one(
    finished_run: Run, explanation: dict, tmp_path: Path
) -> None:
    run = changed(finished_run, tmp_path, "recipe.json", name="smoke")
    text = assert_sound(page(run, explanation, {})).text
    assert "width 16" not in text
    assert re.search(r"changed in \d fields: epochs 2 \(usually 12\)", text)


def test_every_field_of_recipe_and_environment_is_there(
    finished_run: Run, explanation: dict
) -> None:
    found = assert_sound(page(finished_run, explanation, {}))
    recipe = dict(found.rows("What each field means"))
    assert recipe.keys() == json.loads((finished_run.folder / "recipe.json").read_text()).keys()
    assert recipe["batch_size"] == "5"
    assert recipe["nesterov"] == "yes"
    environment = dict(found.rows("Where the numbers were measured"))
    assert environment["torch"] == finished_run.environment["torch"]
    assert "cuda" not in environment, "a CPU has none"


def test_no_folder_of_the_machine_is_named(finished_run: Run, explanation: dict) -> None:
    text = page(finished_run, explanation, {})
    assert str(finished_run.folder) not in text
    assert finished_run.identity["data_folder"] not in text


def test_tables_hold_the_numbers(finished_run: Run, explanation: dict) -> None:
    found = assert_sound(page(finished_run, explanation, {}))
    assert found.rows("taken for each other")[0] == ["red · green", "7", "4", "3"]
    every = found.rows("WordNet identifiers")
    assert every[1] == ["green n00000001", "33.3", "100.0", "9", "red (2)"]
    assert every[2] == ["blue n00000002", "–", "–", "0", "–"]
    assert found.rows("Images by their row")[0] == ["71234", "red", "60.0 %", "green", "60.0 %"]
    measured = found.rows("expected calibration error")
    assert measured[0][1:] == ["7.12 %", "1.23 %"]
    assert measured[1][1:] == ["1.2345", "1.2345"]
    boxes = found.rows("All boxes. In percent")
    assert boxes[0] == ["all answers, class: predicted", "40", "91.0 89.0 to 93.0", "78.0 76.0 to 80.0",
                        "+13.0 +11.0 to +15.0", "63.0 61.0 to 65.0", "52.0 50.0 to 54.0",
                        "−11.0 −13.0 to −9.0"]  # fmt: skip
    assert len(boxes) == 5
    small = found.rows("less than half of the image. In percent")
    assert small[-1] == ["wrong answers, class: actual", "0", *["–"] * 6]
    assert found.rows("ROAD's combined score")[0] == ["the map", "+20.0 +18.0 to +22.0"]
    assert found.rows("Mean change")[0] == ["80 %", "−10.0", "−10.0", "–", "–"]
    assert found.rows("Rows in the data set")[0] == ["red · green", "5 (not tested), 31 (tested)"]
    assert "3.70 % of all 27 mistakes" in found.text
    last = finished_run.history[-1]
    assert found.rows("Losses in nats")[-1][0] == str(last["epoch"])
    assert found.rows("Losses in nats")[-1][3] == f"{last['test_loss']:.4f}"


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (interval(0.13), "better than the centre"),
        (interval(-0.13), "worse than the centre"),
        (interval(0.01), "as well as the centre, as far as"),
        ({"mean": 0.02, "low": 0.0, "high": 0.04}, "as well as the centre, as far as"),
    ],
)
def test_a_difference_counts_only_beyond_its_interval(
    finished_run: Run, explanation: dict, difference: dict, said: str
) -> None:
    explanation["localisation"]["groups"][0]["hit_minus_centre"] = difference
    text = assert_sound(page(finished_run, explanation, {})).text
    assert said in text.split("All boxes (40 images)")[1].split("Of the map")[0]


def test_a_method_that_knows_no_class_is_said_to_be_one(
    finished_run: Run, explanation: dict
) -> None:
    assert "knows no class" not in page(finished_run, explanation, {})
    assert "knows no class" in page(finished_run, explanation | {"method": "eigencam"}, {})


def test_a_page_without_anything_says_what_makes_it(finished_run: Run) -> None:
    bare = {"tested": 90, "wrong": 27, "method": "gradcam", "images": []}
    found = assert_sound(page(finished_run, bare, {}))
    for part in (
        "accuracy by class",
        "the confused pairs",
        "the calibration",
        "the search for identical images",
    ):
        assert f"Missing: {part}" in found.text
    assert "tinylab explain RUN --sample 2000" in found.text
    assert "tinylab explain RUN --faithfulness 200" in found.text
    assert "Missing: a draw of the mistakes" in found.text
    assert not found.all("img")
    whole = assert_sound(
        page(finished_run, analysis(["red", "green", "blue"]), dict.fromkeys(FIGURES, PNG))
    )
    assert [each["id"] for each in found.all("h2")] == [each["id"] for each in whole.all("h2")]


@pytest.mark.parametrize("part", ["errors", "label_conflicts", "localisation", "faithfulness"])
@pytest.mark.parametrize("absent", [True, False])
def test_each_part_may_be_missing(
    finished_run: Run, explanation: dict, figures: dict, part: str, absent: bool
) -> None:
    explanation[part] = None
    if absent:
        del explanation[part]
    assert "Missing: " in assert_sound(page(finished_run, explanation, figures)).text


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_may_be_missing_or_damaged(
    finished_run: Run, explanation: dict, figures: dict, name: str
) -> None:
    for data in ({}, {name: b"no picture"}):
        found = assert_sound(
            page(finished_run, explanation, {key: PNG for key in figures if key != name} | data)
        )
        assert f"Missing: the figure “{name}”" in found.text
        assert len(found.all("img")) == len(FIGURES) - 1


def test_without_a_mistake_nothing_is_missing(
    finished_run: Run, explanation: dict, figures: dict
) -> None:
    explanation |= {"wrong": 0, "images": []}
    explanation["errors"]["pairs"] = []
    explanation["label_conflicts"] |= {
        "pairs": [],
        "found": 0,
        "tested": 0,
        "wrong": 0,
        "share_of_error": None,
    }
    shows_mistakes = (
        "misclassified", "confident_mistakes", "class_maps", "gradcam", "confused_pairs", "label_conflicts",
    )  # fmt: skip
    found = assert_sound(
        page(
            finished_run, explanation, {k: v for k, v in figures.items() if k not in shows_mistakes}
        )
    )
    assert "Missing" not in found.text
    assert "There is no mistake to show" in found.text
    assert "every test image was answered right" in found.text
    assert "No two images of the data set are the same" in found.text


def test_a_long_history_is_thinned(finished_run: Run, explanation: dict, tmp_path: Path) -> None:
    run = changed(finished_run, tmp_path, "summary.json")
    run.write_history([finished_run.history[-1] | {"epoch": epoch} for epoch in range(1, 1002)])
    rows = assert_sound(page(run, explanation, {})).rows("Every 4th epoch")
    assert 200 < len(rows) <= 302
    assert [rows[0][0], rows[1][0], rows[-1][0]] == ["1", "5", "1001"]


def test_an_epoch_without_a_test_has_dashes(
    finished_run: Run, explanation: dict, tmp_path: Path
) -> None:
    run = changed(finished_run, tmp_path, "summary.json")
    first, last = finished_run.history
    run.write_history(
        [{name: value for name, value in first.items() if not name.startswith("test_")}, last]
    )
    rows = assert_sound(page(run, explanation, {})).rows("Losses in nats")
    assert [rows[0][column] for column in (3, 5, 6)] == ["–", "–", "–"]
    assert "–" not in rows[1]


def test_figures_are_inside_with_their_size(finished_run: Run, explanation: dict) -> None:
    (image,) = assert_sound(page(finished_run, explanation, {"curves": PNG})).all("img")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG
    assert (image["width"], image["height"]) == ("3", "2")


def test_the_security_policy_allows_the_style_and_nothing_else(
    finished_run: Run, explanation: dict
) -> None:
    text = page(finished_run, explanation, {})
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not re.search(r"url\(|@import|expression|https?:", style)
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_hostile_names_stay_text(finished_run: Run, figures: dict, tmp_path: Path) -> None:
    harmless = assert_sound(
        page(finished_run, analysis([f"name {i}" for i in range(len(HOSTILE))]), figures)
    )
    text = page(finished_run, analysis(HOSTILE), figures)
    found = assert_sound(text)
    assert [element["tag"] for element in found.elements] == [
        element["tag"] for element in harmless.elements
    ]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text)
    shown = [element["text"] for element in found.all("bdi")]
    assert "<script>alert(1)</script>" in shown
    assert "{{ 7 * 7 }} {% raw %} &amp; &lt;b&gt;" in shown
    assert "two lines three" in shown
    assert "W" * 121 in shown, "the longest name of Tiny ImageNet is shown in full"
    assert max(map(len, shown)) == report.LONGEST
    assert "金魚, عربي" in shown


def test_hostile_records_stay_text(finished_run: Run, explanation: dict, tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script>\u202e'
    run = changed(
        finished_run,
        tmp_path,
        "environment.json",
        device=attack,
        odd={attack: [attack]},
        earlier=[{"x": attack}],
    )
    for file, field in (
        ("summary.json", "protocol"),
        ("run.json", "protocol"),
        ("summary.json", "flip_tta_top1"),
    ):
        run.write(file, json.loads((run.folder / file).read_text()) | {field: attack})
    run.write(
        "environment.json",
        json.loads((run.folder / "environment.json").read_text()) | {attack: attack},
    )
    explanation["method"] = explanation["localisation"]["method"] = explanation["faithfulness"][
        "stage"
    ] = attack
    text = page(run, explanation, {"curves": PNG, attack: PNG})
    found = assert_sound(text)
    assert "\u202e" not in text
    assert '"><script>alert(1)</script>' in found.text


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("tested",), "90", "tested"),
        (("errors",), [], "errors"),
        (("errors", "pairs"), {}, "errors.pairs"),
        (("errors", "pairs", 0, "count"), None, "errors.pairs[0].count"),
        (("errors", "classes", 1, "top1"), "high", "[1].top1"),
        (("errors", "calibration", "before", "ece"), float("inf"), "errors.calibration.before.ece"),
        (("images", 0, "predicted"), 3, "images[0].predicted"),
        (("localisation", "groups", 2, "hit", "low"), True, "localisation.groups[2].hit.low"),
        (("localisation", "scored"), 10.5, "localisation.scored"),
        (("label_conflicts", "pairs", 0, "rows"), None, "label_conflicts.pairs[0].rows"),
        (("faithfulness", "percentiles", 0), 10**400, "faithfulness.percentiles[0]"),
        (("faithfulness", "map", "most_relevant_first"), [-0.1], "faithfulness.map"),
        (("label_conflicts", "pairs", 0, "tested"), [], "label_conflicts.pairs[0]"),
    ],
)
def test_what_is_no_analysis_is_refused_in_one_line(
    finished_run: Run, explanation: dict, path: tuple, value: object, said: str
) -> None:
    broken = copy.deepcopy(explanation)
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        page(finished_run, broken, {})
    assert "tinylab explain" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unfinished_run_is_refused(tmp_path: Path, explanation: dict) -> None:
    with pytest.raises(UserError, match=r"summary\.json is missing"):
        page(Run(tmp_path), explanation, {})


def test_wilson_s_interval() -> None:
    """Against the values of Newcombe 1998, table I (81 of 263, 15 of 148, 0 of 20, 1 of 29)."""
    for right, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right / count, count) == pytest.approx((100 * low, 100 * high), abs=0.006)
    assert wilson(0, 0) == (0, 100)


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours #rrggbb."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_text_stands_out_in_light_and_dark() -> None:
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.01)
    style = (Path(report.__file__).parent / report.STYLE).read_text()
    themes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    light, dark = themes[:2]
    for theme in (light, light | dark):
        for text in ("ink", "muted", "accent", "warm"):
            for ground in ("paper", "tint"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)

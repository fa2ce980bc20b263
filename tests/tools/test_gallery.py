"""The gallery is one page without outside links, holds every paper, and a browser hides what a filter excludes."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from common.files import write_json, write_text
from tools import gallery

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def outputs(tmp_path) -> Path:
    """A finished run of ect_tiny with a picture, an unfinished one of meanflow_tiny, and a folder that is no run."""
    run = tmp_path / "runs/ect_tiny/seed0"
    write_text(run / "overrides.yaml", yaml.safe_dump(["+experiment=ect_tiny", "seed=0"]))
    write_text(run / "metrics.csv", "step,train/loss,perf/x\n1,100.0,5\n2,10.0,5\n3,0.5,5\n")
    write_json(run / "result.json", {"metrics": {}, "step": 3, "experiment": "ect_tiny"})
    (run / "pictures").mkdir()
    for name in ("loss.png", "step-3.png"):
        Image.new("RGB", (4, 4), "red").save(run / "pictures" / name)
    other = tmp_path / "runs/other"
    write_text(other / "overrides.yaml", yaml.safe_dump(["+experiment=meanflow_tiny"]))
    write_text(other / "metrics.csv", "step,train/loss\n")
    write_text(tmp_path / "runs/unknown/metrics.csv", "step,train/loss\n1,2\n")
    return tmp_path / "runs"


VOID = {"meta", "img", "input", "rect", "polyline"}  # tags without an end


class Tags(HTMLParser):
    """Balance of the tags and every address the page names."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.sections = 0

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        self.sections += tag == "section"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_runs_are_found_with_their_newest_picture(outputs):
    runs = {run.experiment: run for run in gallery.find_runs(outputs)}
    assert set(runs) == {"ect_tiny", "meanflow_tiny"}
    assert runs["ect_tiny"].picture.name == "step-3.png" and runs["ect_tiny"].result["step"] == 3
    assert runs["ect_tiny"].curves == {"train/loss": ([1, 2, 3], [100.0, 10.0, 0.5])}
    assert runs["meanflow_tiny"].picture is None and runs["meanflow_tiny"].result is None


def test_the_page_holds_every_paper_and_needs_no_network(outputs, capsys):
    assert gallery.main(["--outputs", str(outputs)]) == 0
    assert "9 papers" in capsys.readouterr().out or len(gallery.zoo.projects(ROOT)) != 9
    text = (outputs / "gallery/index.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and tags.sections == len(gallery.zoo.projects(ROOT))
    assert tags.addresses and all(address.startswith("data:image/") for address in tags.addresses)
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    for slug, paper in gallery.zoo.projects(ROOT).items():
        record = gallery.zoo.newest_record(ROOT, slug)
        part = text.partition(f"<h2>{paper.short} ")[2].partition("</section>")[0]
        assert record is None or part.count('<tr class="held">') == sum(r["held"] for r in record["relations"]), slug
    assert "ect_tiny, seed0 (step 3)" in text and "meanflow_tiny, other (not finished)" in text


def test_a_curve_is_logarithmic_over_a_wide_range():
    """Equal ratios are equal distances then; equal differences otherwise."""
    heights = lambda values: [
        float(point.partition(",")[2])
        for point in re.search(r'points="([^"]+)"', gallery.curve({"loss": (range(3), values)}))[1].split()
    ]
    top, middle, bottom = heights([100.0, 10.0, 1.0])
    assert middle - top == pytest.approx(bottom - middle, abs=0.2)
    top, middle, bottom = heights([3.0, 2.0, 1.0])
    assert middle - top == pytest.approx(bottom - middle, abs=0.2)
    assert gallery.curve({}) == "" and "polyline" in gallery.curve({"loss": ([1], [2.0])})


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt install chromium")
@pytest.mark.parametrize(("query", "shown"), [("", None), ("?state=failed", "failed"), ("?text=zzz-no-such-word", 0)])
def test_a_browser_shows_what_the_filter_leaves(outputs, tmp_path, query, shown):
    gallery.main(["--outputs", str(outputs)])
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--dump-dom", f"file://{outputs / 'gallery/index.html'}{query}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    sections = re.findall(r"<section [^>]*>", done.stdout)
    visible = [one for one in sections if " hidden" not in one]
    expected = {
        None: sections,
        "failed": [one for one in sections if 'data-state="failed"' in one],
        0: [],
    }[shown]
    assert sections and visible == expected
    assert f'<span id="count">{len(expected)} shown</span>' in done.stdout

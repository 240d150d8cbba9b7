"""The site: every link and picture resolves, nothing is asked of the network, and what is amiss is said."""

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from repro import notebook, provenance, site
from repro.__main__ import main
from repro.files import ReproError

VOID = {"meta", "link", "img", "br", "hr", "input", "mspace"}
RUN = "lab/celeba64-unet"
SOURCE = [
    "# A title with $x_0$\n\nText, $\\min(\\mathrm{SNR}, \\gamma)$, and\n\n$$\\sum_t w_t g_t$$",
    "x = 1 < 2",
    "## What\n\n## What\n\n[These](../paper/claims.toml), [those](sec1_pareto.ipynb), [all](https://a.b/c)",
]
PARAMETERS = "rows = 8"


class Page(HTMLParser):
    """What a test asks of a page; raises AssertionError where its tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.open, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def png(size=(64, 48)):
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, "PNG")
    return file.getvalue()


def as_notebook(cells, metadata):
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def write_notebooks(root, name, id):
    """A notebook, and the same executed, with an output of every kind."""

    def code(source, *outputs, tags=()):
        return {
            "cell_type": "code",
            "metadata": {"tags": list(tags)},
            "source": source,
            "outputs": list(outputs),
            "execution_count": None,
        }

    def shown(**data):
        kinds = {key.replace("_", "/"): value for key, value in data.items()}
        return {"output_type": "display_data", "data": kinds, "metadata": {}}

    run = f'<a href="../../paper/runs/{RUN}">run</a>'  # as from the folder of executed notebooks
    table = "<div><style scoped>td {color: red}</style><table><tr><td>wide</td></tr></table></div>" + run
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": [f"printed <b> {provenance.ROOT}/a\n"]},
        {"output_type": "stream", "name": "stderr", "text": ["a warning\n"]},
        shown(image_png=base64.encodebytes(png()).decode(), text_plain="<Figure>"),
        shown(text_html=table, text_plain="wide"),
        shown(text_markdown="- **said**\n\n| a | b |\n| --- | --- |\n| 1 | 2 |", text_plain="<Markdown>"),
        shown(text_plain="{'seeds': [0]}"),
    ]
    markdown = [{"cell_type": "markdown", "metadata": {}, "source": text} for text in (SOURCE[0], SOURCE[2])]
    cells = [markdown[0], code(PARAMETERS, tags=["parameters"]), code(SOURCE[1]), markdown[1]]
    place = root / "notebooks" / f"{name}.ipynb"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(as_notebook(cells, {})))
    source = notebook.code(place)
    about = {"path": f"notebooks/{name}.ipynb", "code": hashlib.sha256(source.encode()).hexdigest()[:16]}
    executed = [markdown[0], code(PARAMETERS), code(SOURCE[1], *outputs), markdown[1]]
    done = root / "build" / "notebooks" / f"{id}.ipynb"
    done.parent.mkdir(parents=True, exist_ok=True)
    record = {"repro": {"id": id, "notebook": about, "code": provenance.code_version(source)}}
    done.write_text(json.dumps(as_notebook(executed, record)))


@pytest.fixture
def checkout(tmp_path):
    """A small checkout: two outputs of made-up notebooks, the real claims, one real run and its cards."""
    root, home = tmp_path / "checkout", tmp_path / "checkout" / "paper"
    for name in ("claims.toml", "values/claims.json", f"cards/{RUN}.md", "cards/data/celeba64.md"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(provenance.ROOT / "paper" / name, home / name)
    card = home / "cards" / "data" / "celeba64.md"  # of its runs one is here
    kept = [
        line
        for line in card.read_text().splitlines()
        if "](../lab/" not in line or f"/{RUN}.md" in line.replace("..", "")
    ]
    card.write_text("\n".join(kept) + "\n")
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(provenance.ROOT / "paper" / "runs" / RUN, home / "runs" / RUN, ignore=weights)
    (home / "figures").mkdir()
    for stem in ("sec1_pareto", "sec1_pareto_more", "claims"):
        (home / "figures" / f"{stem}.png").write_bytes(png((2000, 1000)))
        (home / "figures" / f"{stem}.pdf").write_bytes(b"%PDF-1.4 %%EOF")
    toml = "".join(
        f'[{id}]\nnotebook = "notebooks/{id}.ipynb"\ntime_limit = 9\n' for id in ("sec1_pareto", "claims")
    )
    (home / "figures.toml").write_text(toml)
    for id in ("sec1_pareto", "claims"):
        write_notebooks(root, id, id)
    return root


def read(out):
    """All pages of the site in `out`, by their paths."""
    return {path.relative_to(out).as_posix(): Page(path.read_text()) for path in out.rglob("*.html")}


def check(out):
    """What is asked of every page of a site; raises AssertionError where one has it not."""
    pages = read(out)
    for name, page in pages.items():
        assert not {"script", "iframe", "object", "base", "style"} & {tag for tag, _ in page.tags}, name
        assert not any(key.startswith("on") or key == "srcset" for _, about in page.tags for key in about), (
            name
        )
        assert len(page.ids) == len(set(page.ids)), name
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1 and levels.count(1) == 1, name
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False)), name
        for about in page.all("link"):
            assert about["href"] == "data:," or not urlsplit(about["href"]).scheme, name
        for about in page.all("img"):
            assert about["alt"].strip(), name
            if about["src"].startswith("data:"):
                source = io.BytesIO(base64.b64decode(about["src"].partition("base64,")[2], validate=True))
            else:
                source = (out / name).parent / unquote(about["src"])
                assert not urlsplit(about["src"]).scheme and source.resolve().is_relative_to(out), name
            with Image.open(source) as image:
                image.load()
                assert "width" not in about or (about["width"], about["height"]) == tuple(
                    map(str, image.size)
                )
        for about in [*page.all("a"), *page.all("link")]:
            link = urlsplit(about["href"])
            if link.scheme in ("http", "https", "data"):  # followed by a reader, or empty
                continue
            assert not link.scheme and not link.netloc and not link.path.startswith("/"), (name, link)
            target = ((out / name).parent / unquote(link.path)).resolve() if link.path else out / name
            assert target.is_file() and target.is_relative_to(out.resolve()), (name, about["href"])
            if link.fragment:
                assert link.fragment in pages[target.relative_to(out.resolve()).as_posix()].ids, (name, link)
    style = (out / "style.css").read_text()
    assert "url(" not in style and "@import" not in style
    return pages


def test_every_link_and_picture_resolves_and_nothing_comes_from_elsewhere(checkout):
    pages = check(site.build(checkout / "site", checkout).parent)
    assert pages.keys() == {
        *("index.html", "gallery.html", "cards.html", "notebooks/sec1_pareto.html"),
        *("notebooks/claims.html", f"cards/{RUN}.html", "cards/data/celeba64.html"),
    }


def test_the_index_leads_to_the_report_and_tells_outputs_of_one_notebook_apart(checkout):
    out = site.build(checkout / "site", checkout).parent
    assert "report.pdf" not in (out / "index.html").read_text()
    (checkout / "paper" / "report.pdf").write_bytes(b"%PDF")
    out = site.build(checkout / "site", checkout).parent
    check(out)
    assert (out / "paper" / "report.pdf").read_bytes() == b"%PDF"
    headings = re.findall(r"<h3 .*?>(.*?)</a></h3>", (out / "index.html").read_text())
    assert len(headings) > 1 and len(set(headings)) == len(headings)


def test_the_index_has_verdicts_figures_and_every_claim(checkout):
    page = read(site.build(checkout / "site", checkout).parent)["index.html"]
    values = json.loads((checkout / "paper" / "values" / "claims.json").read_text())["values"]
    assert {f"claim-{id}" for id in values["claims"]} <= set(page.ids)
    for key, count in values["counts"].items():
        assert f"{count} {key.replace('_', ' ')}" in page.text
    assert all(claim["says"] in page.text for claim in values["claims"].values())
    order = re.findall(r"^\[(\w+)\]", (checkout / "paper" / "claims.toml").read_text(), re.M)
    assert [id.removeprefix("claim-") for id in page.ids if id.startswith("claim-")] == order
    links = {about["href"] for about in page.all("a")}
    assert {"notebooks/sec1_pareto.html", "figures/sec1_pareto_more.png", "figures/claims.pdf"} <= links
    assert not any(link.startswith("notebooks/table1") for link in links)  # which is not shown here
    assert all(int(about["width"]) <= 640 for about in page.all("img"))


def test_a_notebook_is_shown_with_its_outputs_and_formulas(checkout):
    out = site.build(checkout / "site", checkout).parent
    text = (out / "notebooks" / "sec1_pareto.html").read_text()
    page = Page(text)
    assert "a warning" not in text and "<style scoped" not in text and "$" not in page.text
    assert [about.get("display") for about in page.all("math")] == ["inline", "inline", "block"]
    assert "printed <b> a\n" in page.text and "{'seeds': [0]}" in page.text and "wide" in page.text
    assert "<strong>said</strong>" in text and "x = 1 < 2" in page.text
    assert {"what", "what--2"} <= set(page.ids)
    assert len(page.all("table")) == 2 == text.count('<div class="scroll" tabindex="0">') - 1  # a formula
    assert text.count('<span class="unbroken">') == 1
    assert [about["alt"] for about in page.all("img")] == ["Figure of the section “A title with x_0”"]
    links = [about["href"] for about in page.all("a")][3:]
    assert links == [f"../cards/{RUN}.html", "../paper/claims.toml", "sec1_pareto.html", "https://a.b/c"]
    assert "made by notebooks/sec1_pareto.ipynb" in page.text


def test_the_gallery_has_the_grids_of_a_run_with_their_seeds(checkout):
    page = read(site.build(checkout / "site", checkout).parent)["gallery.html"]
    record = json.loads((checkout / "paper" / "runs" / RUN / "run.json").read_text())
    assert len(page.all("img")) == 1 + len(record.get("further_samples", ()))
    assert "Seeds 0 to 63, ancestral, 250 steps from σ = 80" in page.text
    assert f"cards/{RUN}.html" in {about["href"] for about in page.all("a")}


def test_it_is_the_same_twice_and_replaces_its_own_alone(checkout):
    out = site.build(checkout / "site", checkout).parent
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "stale.html").touch()
    site.build(out, checkout)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (checkout / "mine").mkdir()
    (checkout / "mine" / "thesis.txt").touch()
    with pytest.raises(ReproError, match="no site of ours"):
        site.build(checkout / "mine", checkout)
    assert (checkout / "mine" / "thesis.txt").exists()


def test_a_notebook_that_is_missing_or_out_of_date_is_an_error_and_the_old_site_stays(checkout):
    out = site.build(checkout / "site", checkout).parent
    place = checkout / "notebooks" / "claims.ipynb"
    place.write_text(place.read_text().replace(PARAMETERS, "rows = 9"))
    with pytest.raises(ReproError, match="claims is out of date.*make figures"):
        site.build(out, checkout)
    (checkout / "build" / "notebooks" / "sec1_pareto.ipynb").unlink()
    with pytest.raises(ReproError, match="sec1_pareto has not been rendered.*make figures"):
        site.build(out, checkout)
    check(out)
    assert not list(checkout.glob(".partial*"))


def test_a_link_to_nothing_is_an_error(checkout):
    place = checkout / "build" / "notebooks" / "claims.ipynb"
    place.write_text(place.read_text().replace(f"../../paper/runs/{RUN}", "../../paper/gone"))
    with pytest.raises(ReproError, match=r"claims links to \.\./\.\./paper/gone, which is not there"):
        site.build(checkout / "site", checkout)


def test_a_full_disk_is_an_error_and_the_old_site_stays(checkout, monkeypatch):
    out = site.build(checkout / "site", checkout).parent

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ReproError, match="No space left on device"):
        site.build(out, checkout)
    monkeypatch.undo()
    check(out)
    assert not list(checkout.glob(".partial*"))


def test_the_command_says_where_it_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(site, "build", lambda out: out / "index.html")
    assert main(["site", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n"

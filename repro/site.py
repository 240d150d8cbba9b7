"""The results as static pages: executed notebooks, verdicts on claims, grids of samples, cards.

    python -m repro site        into build/site: open index.html, or put the folder on any server

Pages need nothing but each other: no scripts, no fonts or styles from elsewhere; formulas are MathML, and the
pictures of a notebook lie in its page. The site's folders `cards`, `figures` and `runs` are those of paper/,
so that the links of cards hold; other files that pages link to are copied. Notebooks are shown as `render`
left them in build/notebooks.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path

from repro import claims as told
from repro import files, notebook, provenance, render
from repro.files import ReproError

GENERATOR = '<meta name="generator" content="repro.site">'
"""In every page; a folder whose index.html has it may be replaced."""

ABOUT = (
    "A reproducibility package for the supplement of <cite>Efficient Diffusion Training via Min-SNR "
    "Weighting Strategy</cite> (Hang et al., ICCV 2023). Every figure and table is drawn from "
    "recorded runs, by the notebooks shown here; every claim of the supplement is tested on the numbers that "
    "they save."
)

SHOWN = ("text/html", "image/png", "text/markdown", "text/plain")
"""Kinds of outputs of a cell that can be shown, the best first."""

LINK = re.compile(r'(<a\b[^>]*?\bhref=")([^"#]+)')
"""A link of a page: its tag as far as the address, and the address."""

THUMBNAIL = (640, 640)
"""Pixels that a picture in the index has at most."""


def build(out: Path, root: Path = provenance.ROOT) -> Path:
    """Write the site of the checkout `root` into the folder `out`, all of it or nothing; returns index.html.

    Raises `ReproError` where a notebook of figures.toml has not been rendered, or has changed since, where
    something else lies in `out`, and where it cannot be written to.
    """
    index, before = out / "index.html", None
    if out.exists() and not (index.is_file() and GENERATOR in index.read_text(errors="replace")):
        if not out.is_dir() or any(out.iterdir()):
            raise ReproError(f"{out} is there, and no site of ours: remove it, or choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(f".{out.name}", files.PARTIAL, out.parent))
        work.chmod(0o755)
        try:
            _write(work, root)
            if out.exists():
                before = out.rename(out.with_name(f"{work.name}.old"))
            work.rename(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if before:
                shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        raise ReproError(f"cannot write the site {out}: {error}") from error
    return index


def _write(out: Path, root: Path) -> None:
    """Write all pages, and the files that they show, into the folder `out`."""
    figures_toml, home = root / "paper" / "figures.toml", root / "paper"
    pages = {"style.css": _style()}
    outputs = {}
    for id in render.ids(figures_toml):
        executed = _executed(render.find(id, figures_toml), root)
        outputs[id], page = _notebook_page(id, executed)
        pages[f"notebooks/{id}.html"] = _relinked(page, id, root)
    cards = sorted((home / "cards").glob("*/*.md"))
    for path in cards:
        name = path.relative_to(home).with_suffix(".html").as_posix()
        pages[name] = _card_page(name, path.read_text())
    pages["cards.html"] = _cards_page([path.relative_to(home).with_suffix("") for path in cards])
    pages["gallery.html"] = _gallery_page(home, out)
    for path in [*(home / "figures").glob("*.png"), *(home / "figures").glob("*.pdf")]:
        _copy(path, out / "figures" / path.name)
    pages["index.html"] = _index_page(home, out, outputs)
    for name, text in pages.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
        _copy_linked(name, text, out, home if name.startswith("cards/") else root)


def _copy_linked(name: str, text: str, out: Path, base: Path) -> None:
    """Copy the files of the folder `base` that the page at the path `name` links to, as if it lay there."""
    for _, link in LINK.findall(text):
        path = os.path.normpath(Path(name).parent / link)
        if "://" not in link and not path.startswith("..") and (base / path).is_file():
            _copy(base / path, out / path)


def _copy(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, place)


def _page(name: str, title: str, body: str) -> str:
    """The page at the path `name` of the site."""
    up = "../" * name.count("/")
    links = {"index.html": "Overview", "gallery.html": "Samples", "cards.html": "Runs and data"}
    current = ' aria-current="page"'
    nav = "".join(
        f'<a href="{up}{to}"{current if to == name else ""}>{text}</a> ' for to, text in links.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{GENERATOR}
<title>{escape(title)} · Min-SNR, reproduced</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{up}style.css">
</head>
<body>
<nav aria-label="Site">{nav.rstrip()}</nav>
<main>
{body}
</main>
</body>
</html>
"""


# Markdown ---------------------------------------------------------------------------------------------


def _markdown() -> Callable[[str], str]:
    """What turns the Markdown of one page into HTML; headings get ids, each of its own."""
    import mistune
    from latex2mathml.converter import convert

    seen: dict[str, int] = {}

    class Renderer(mistune.HTMLRenderer):
        def heading(self, text: str, level: int, **attributes: object) -> str:
            slug = re.sub(r"\W+", "-", re.sub(r"<[^>]*>", "", text).lower()).strip("-") or "section"
            seen[slug] = seen.get(slug, 0) + 1
            own = slug if seen[slug] == 1 else f"{slug}--{seen[slug]}"
            return f'<h{level} id="{own}">{text}</h{level}>\n'

        def table(self, text: str) -> str:
            return _scroll(f"<table>{text}</table>")

        def inline_math(self, text: str) -> str:
            return convert(text)

        def block_math(self, text: str) -> str:
            return _scroll(convert(text, display="block"))

    plugins = ["table", "math", "strikethrough"]
    to_html = mistune.create_markdown(renderer=Renderer(escape=True), plugins=plugins)

    def markdown(text: str) -> str:
        # a line may break after a formula, but not before the comma that follows it
        return re.sub(
            r"(<math(?:(?!</math>).)*</math>[.,;:)]+)",
            r'<span class="unbroken">\1</span>',
            to_html(text),
            flags=re.S,
        )

    return markdown


def _scroll(table: str) -> str:
    """A wide table in a box that scrolls by itself, with the keyboard too."""
    return f'<div class="scroll" tabindex="0">{table}</div>\n'


# Notebooks --------------------------------------------------------------------------------------------


def _executed(output: render.Output, root: Path) -> dict:
    """The executed notebook of an output, as JSON; raises `ReproError` where it is missing or out of date."""
    path = root / "build" / "notebooks" / f"{output.id}.ipynb"
    if not path.is_file():
        raise ReproError(f"{output.id} has not been rendered: there is no {path}. Run `make figures`.")
    executed, code = files.read_json(path), notebook.code(output.notebook)
    about = executed.get("metadata", {}).get("repro", {})
    now = hashlib.sha256(code.encode()).hexdigest()[:16], provenance.code_version(code)
    if (about.get("notebook", {}).get("code"), about.get("code")) != now:
        raise ReproError(f"{output.id} is out of date: notebook or code changed since. Run `make figures`.")
    return executed


def _notebook_page(id: str, executed: dict) -> tuple[str, str]:
    """The title of an executed notebook, and its page."""
    markdown, heading = _markdown(), id
    parts, title = [], ""
    for cell in executed["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if found := re.findall(r"^#+ +(.+)$", source, re.M):
                found = [re.sub(r"[$`*\\]", "", text) for text in found]  # where no markup can be
                heading, title = found[-1], title or found[0]
            parts.append(markdown(source))
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(_code(source))
            parts += [_output(output, markdown, heading) for output in cell["outputs"]]
    about = executed["metadata"]["repro"]
    made = f"<code>{id}</code>, made by <code>{escape(about['notebook']['path'])}</code>"
    made += f" with version <code>{escape(about['code'])}</code> of the library's code."
    body = "".join(parts) + f"<footer><p>{made}</p></footer>"
    return title or id, _page(f"notebooks/{id}.html", f"{title}, {id}", body)


def _relinked(page: str, id: str, root: Path) -> str:
    """The page of a notebook with its links as they are in the site.

    A notebook links from its own folder, and what it prints from that of executed notebooks. Other notebooks
    become their pages, recorded runs their cards. Raises `ReproError` for a link to nothing.
    """
    ids = render.ids(root / "paper" / "figures.toml")

    def new(found: re.Match) -> str:
        tag, link = found.groups()
        if "://" in link or (link.startswith("../") and link.endswith(".html")):
            return found[0]
        if link.endswith(".ipynb") and (to := Path(link).stem) in ids:
            return f"{tag}{to}.html"
        for folder in (root / "notebooks", root / "build" / "notebooks"):
            target = Path(os.path.normpath(folder / link))
            if target.is_relative_to(root) and target.exists():
                path = target.relative_to(root).as_posix()
                card = re.sub(r"^paper/runs/", "cards/", path) + ".html"
                return f"{tag}../{card if target.is_dir() else path}"
        raise ReproError(f"{id} links to {link}, which is not there; mend its notebook")

    return LINK.sub(new, page)


def _code(source: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return highlight(source.rstrip(), PythonLexer(), HtmlFormatter(cssclass="code"))


def _output(output: dict, markdown: Callable[[str], str], heading: str) -> str:
    """An output of a cell, under the heading `heading`; warnings are left out."""
    if output["output_type"] == "stream":
        return "" if output["name"] == "stderr" else _text("".join(output["text"]))
    data = output.get("data", {})
    kind = next((kind for kind in SHOWN if kind in data), None)
    content = "".join(data[kind]) if kind else ""
    if kind == "image/png":
        alt = escape(f"Figure of the section “{heading}”", quote=True)
        return f'<p><img src="data:image/png;base64,{content.replace(chr(10), "")}" alt="{alt}"></p>\n'
    if kind == "text/html":
        return _scroll(re.sub(r"<style.*?</style>\s*", "", content, flags=re.S))
    if kind == "text/markdown":
        return markdown(content)
    return _text(content)


def _text(text: str) -> str:
    """Text as a cell printed it, but for where on this machine the checkout lies."""
    text = text.replace(f"{provenance.ROOT}/", "")
    return f'<pre class="output" tabindex="0">{escape(text.rstrip())}</pre>\n' if text.strip() else ""


# Cards and samples ------------------------------------------------------------------------------------


def _card_page(name: str, text: str) -> str:
    """The page of a card: its Markdown without the header, which is for programs."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"(\]\([^)\s:]+)\.md(?=[)#])", r"\1.html", text)  # other cards
    found = re.search(r"^# +(.+)$", text, re.M)
    return _page(name, found[1] if found else Path(name).stem, _markdown()(text))


def _cards_page(cards: list[Path]) -> str:
    """The list of all cards, given by their paths without an ending."""
    body = (
        "<h1>Runs and data</h1>\n<p>What each recorded run and each data set is, and what was measured.</p>\n"
    )
    for group in sorted({path.parent.name for path in cards}, key=lambda name: (name == "data", name)):
        body += f"<h2>{'Data sets' if group == 'data' else f'Runs, {escape(group)}'}</h2>\n<ul>\n"
        body += "".join(
            f'<li><a href="{path.as_posix()}.html">{path.name}</a></li>\n'
            for path in cards
            if path.parent.name == group
        )
        body += "</ul>\n"
    return _page("cards.html", "Runs and data", body)


def _gallery_page(home: Path, out: Path) -> str:
    """The samples of all recorded runs, which are copied into `out`."""
    from repro import paper

    body = "<h1>Samples</h1>\n<p>What each recorded run draws: sample seeds in order, none left out.</p>\n"
    for place in sorted((home / "runs").glob("*/*/run.json")):
        record, name = files.read_json(place), f"{place.parent.parent.name}/{place.parent.name}"
        grids = [grid for grid in (record.get("samples"), *record.get("further_samples", ())) if grid]
        if not grids:
            continue
        card = f"cards/{name}.html"
        linked = f'<a href="{card}">{name}</a>' if (home / card).with_suffix(".md").is_file() else name
        body += f'<h2 id="{name.replace("/", "-")}">{linked}</h2>\n'
        for grid in grids:
            picture = f"runs/{name}/{grid['file']}"
            _copy(place.parent / grid["file"], out / picture)
            last = grid["first_seed"] + grid["rows"] * grid["cols"] - 1
            how = f"Seeds {grid['first_seed']} to {last}, {paper.describe_sampler(grid['sample'])}"
            body += f"<figure>{_image(out, picture, f'Samples of {name}. {how}')}"
            body += f"<figcaption>{escape(how)}</figcaption></figure>\n"
    return _page("gallery.html", "Samples", body)


def _image(out: Path, name: str, alt: str) -> str:
    """A picture of the site, with its size, so that the page does not jump as it loads."""
    from PIL import Image

    with Image.open(out / name) as image:
        size = 'width="{}" height="{}"'.format(*image.size)
    return f'<img src="{name}" {size} loading="lazy" alt="{escape(alt, quote=True)}">'


# Index ------------------------------------------------------------------------------------------------


def _index_page(home: Path, out: Path, outputs: dict[str, str]) -> str:
    """The first page: what this is, verdicts, figures and the table of claims.

    `outputs` has the title of each output's notebook, by its id.
    """
    values = files.read_json(home / "values" / "claims.json")["values"]
    body = f"<h1>Min-SNR, reproduced</h1>\n<p>{ABOUT}</p>\n<h2>Verdicts</h2>\n<ul>\n"
    for verdict in told.VERDICTS:
        body += f"<li>{values['counts'].get(verdict.replace(' ', '_'), 0)} {verdict}</li>\n"
    body += f'</ul>\n<p><a href="#claims">All {values["total"]} claims</a>'
    if (home / "report.pdf").is_file():
        body += ', and <a href="paper/report.pdf">the replication report</a> (PDF)'
    body += "</p>\n<h2>Figures and tables</h2>\n"
    stems = sorted(path.stem for path in (home / "figures").glob("*.png"))
    for id, title in outputs.items():
        page = f"notebooks/{id}.html"
        heading = f"{title}: {id}" if [*outputs.values()].count(title) > 1 else title
        body += f'<section>\n<h3 id="output-{id}"><a href="{page}">{escape(heading)}</a></h3>\n'
        body += f"<p><code>{id}</code></p>\n"
        body += "".join(_thumbnail(out, stem, title) for stem in stems if _owner(stem, outputs) == id)
        body += "</section>\n"
    body += f'<h2 id="claims">Claims</h2>\n{_claims_table(home, values["claims"], outputs)}'
    return _page("index.html", "Overview", body)


def _owner(stem: str, outputs: dict[str, str]) -> str | None:
    """The output that a figure belongs to, by its name."""
    return max((id for id in outputs if f"{stem}_".startswith(f"{id}_")), key=len, default=None)


def _thumbnail(out: Path, stem: str, title: str) -> str:
    """A figure of the site, small, which leads to the whole."""
    from PIL import Image

    small = f"thumbnails/{stem}.webp"
    (out / small).parent.mkdir(exist_ok=True)
    with Image.open(out / "figures" / f"{stem}.png") as image:
        image = image.convert("RGB")
        image.thumbnail(THUMBNAIL)
        image.save(out / small, quality=85)
    pdf = f"figures/{stem}.pdf"
    caption = f"<code>{stem}</code>" + (f' (<a href="{pdf}">PDF</a>)' if (out / pdf).is_file() else "")
    picture = _image(out, small, f"{title}: {stem}")
    return (
        f'<figure class="small"><a href="figures/{stem}.png">{picture}</a>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _claims_table(home: Path, claims: dict[str, dict], outputs: dict[str, str]) -> str:
    """Every claim in the order of claims.toml; raises `ReproError` where the values are of other claims."""
    ids = [claim.id for claim in told.load(home / "claims.toml")]
    if set(ids) != set(claims):
        raise ReproError("paper/values/claims.json is not of the claims in claims.toml. Run `make figures`.")
    rows = ""
    for id in ids:
        one = claims[id]
        source = one["values"]
        verdict, place = one["verdict"], f"<small>{escape(one['place'])}</small>"
        linked = f'<a href="notebooks/{source}.html">{source}</a>' if source in outputs else ""
        cells = [
            f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>',
            f"{escape(one['says'])}<br>{place}",
            *(escape(one[key]) for key in ("paper", "here", "remark")),
            linked,
        ]
        rows += f'<tr id="claim-{id}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
    heads = ("Verdict", "The paper says", "Paper", "Here", "Note", "Shown in")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return _scroll(
        f'<table class="claims">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>'
    )


# Style ------------------------------------------------------------------------------------------------


def _style() -> str:
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=name).get_style_defs(".code") for name in ("default", "github-dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{STYLE}"


STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --faint: #595959; --back: #fff; --box: #f5f5f5;
  --line: #d5d5d5; --link: #005a9c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --faint: #a8a8a8; --back: #161616; --box: #222; --line: #444; --link: #7cc0ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 1rem/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere; }
nav, main { max-width: 62rem; margin: 0 auto; padding: 0.75rem 1rem; }
nav { border-bottom: 1px solid var(--line); }
nav a { display: inline-block; padding: 0.4rem 0.8rem 0.4rem 0; }
nav a[aria-current] { color: var(--text); font-weight: 600; text-decoration: none; }
a { color: var(--link); }
h1, h2, h3 { line-height: 1.25; margin: 1.6em 0 0.5em; }
h1 { font-size: 1.7rem; margin-top: 0.6em; }
h2 { font-size: 1.3rem; }
h3 { font-size: 1.05rem; margin-bottom: 0; }
img { max-width: 100%; height: auto; background: #fff; }
figure { margin: 0 0 1rem; }
figure.small { display: inline-block; vertical-align: top; width: 18rem; max-width: 100%;
  margin: 0 1rem 1rem 0; }
figcaption, footer { color: var(--faint); font-size: 0.875rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.85rem; }
div.code, pre.output, .scroll { overflow: auto; margin: 0.75rem 0; max-width: 100%; }
div.code { background: var(--box); border: 1px solid var(--line); border-radius: 4px; }
div.code pre { margin: 0; padding: 0.6rem 0.8rem; line-height: 1.4; overflow-wrap: normal; }
pre.output { max-height: 24rem; border-left: 3px solid var(--line); padding: 0.2rem 0.8rem;
  overflow-wrap: normal; }
table { border: 0; border-collapse: collapse; font-size: 0.875rem; overflow-wrap: normal; }
th, td { border: 0; border-bottom: 1px solid var(--line); padding: 0.35rem 0.6rem; text-align: left;
  vertical-align: top; }
table.claims { min-width: 60rem; }
table.claims td:nth-child(2) { min-width: 14rem; }
small { color: var(--faint); }
.unbroken { white-space: nowrap; }
.scroll > math { padding: 0.4rem 0; }
.verdict { font-weight: 600; }
.verdict::before { content: "○ "; }
.verdict.holds::before, .verdict.holds-at-lab-scale::before { content: "✓ "; }
.verdict.contradicted::before, .verdict.fails-at-lab-scale::before { content: "✗ "; }
.verdict.undecided-at-lab-scale::before { content: "? "; }
"""

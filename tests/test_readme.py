"""README.md: its numbers are those of the recorded files, and the files it names exist."""

import json
import re

import pytest

from repro import provenance, readme
from repro.files import ReproError

README = provenance.ROOT / "README.md"


def test_every_marked_number_is_the_recorded_one():
    text = README.read_text()
    assert readme.refresh(text) == text, "run: python -m repro.readme"


def test_there_are_marked_numbers_and_no_unmarked_distances():
    text = README.read_text()
    assert len(re.findall("<!--= ", text)) >= 8
    without = re.sub(r"<!--= .*?<!--/-->", "", text)
    assert not re.search(r"\bFI?D\b[^.\n|]{0,20}\d", without), "a distance typed by hand"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README.read_text()))))
def test_linked_files_exist(link):
    assert (provenance.ROOT / link).exists()


def test_numbers_follow_the_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"x": [1.26, {"y": 2000}]}))
    text = "<!--= a.json x.0 .1f -->9<!--/--> and <!--= a.json x.1.y 0.001*.2f --><!--/-->"
    expected = "<!--= a.json x.0 .1f -->1.3<!--/--> and <!--= a.json x.1.y 0.001*.2f -->2.00<!--/-->"
    assert readme.refresh(text, tmp_path) == expected


def test_a_missing_key_or_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ReproError, match="no 'x'"):
        readme.refresh("<!--= a.json x .1f --><!--/-->", tmp_path)
    (tmp_path / "null.json").write_text('{"x": null}')
    with pytest.raises(ReproError, match="no 'y'"):
        readme.refresh("<!--= null.json x.y .1f --><!--/-->", tmp_path)
    with pytest.raises(ReproError, match="b.json, which is missing"):
        readme.refresh("<!--= b.json x .1f --><!--/-->", tmp_path)

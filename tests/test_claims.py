"""Claims: verdicts follow from values, what is missing is an error, and no claim of the supplement is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro import claims, config, notebook, presets, provenance, render
from repro.__main__ import main
from repro.files import ReproError

VALUES = provenance.ROOT / "paper" / "values"
REPORTED = {"fig": {"value": 2.0, "deviation": 0.5, "sizes": [8, 16], "name": "FID"}}


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """No file has been used yet."""
    monkeypatch.delenv("REPRO_RENDER", raising=False)
    provenance.forget()
    yield tmp_path
    provenance.forget()


@pytest.fixture
def judge(scratch):
    """Save `values`, and return the verdict on a claim with these keys: `judge(values, ...)`."""

    def one(values, runs=None, files=None, **keys):
        about = {
            "id": "fig",
            "notebook": {"path": "notebooks/fig.ipynb"},
            "parameters": {"confidence": 0.9},
            "runs": runs or {},
            "files": files or {},
        }
        (scratch / "fig.json").write_text(json.dumps({"provenance": about, "values": values}))
        keys = {"place": "Section 1", "says": "so", "evidence": "lab scale", "values": "fig", **keys}
        if keys["evidence"] == "lab scale":
            keys = {"differs": "small", **keys}
        keys = {"sources": [], **keys}
        path = scratch / "claims.toml"
        path.write_text("[it]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
        (found,) = claims.verdicts(claims.load(path), REPORTED, scratch)
        return found

    return one


# Comparisons ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compare, number, verdict",
    [
        ("above", 1.1, "holds at lab scale"),
        ("above", 1.0, "fails at lab scale"),
        ("below", 0.9, "holds at lab scale"),
        ("below", 1.0, "fails at lab scale"),
        ("at least", 1.0, "holds at lab scale"),
        ("at least", 0.9, "fails at lab scale"),
        ("at most", 1.0, "holds at lab scale"),
        ("at most", 1.1, "fails at lab scale"),
    ],
)
def test_a_single_measurement_is_ordered_and_said_to_have_no_interval(judge, compare, number, verdict):
    found = judge({"x": number}, key="x", compare=compare, than=1)
    assert found.verdict == verdict and found.here == f"{number:g}, no interval: measured once"


@pytest.mark.parametrize("evidence", ["mathematics", "recomputed here"])
@pytest.mark.parametrize("number, verdict", [(2.04, "holds"), (1.94, "contradicted"), (2.06, "contradicted")])
def test_what_is_not_of_lab_scale_holds_or_is_contradicted(judge, evidence, number, verdict):
    found = judge(
        {"x": number}, key="x", compare="equal", tolerance=0.05, paper=["fig.value"], evidence=evidence
    )
    assert (found.verdict, found.test) == (verdict, "equal to the paper's 2, to 0.05")


@pytest.mark.parametrize(
    "intervals, verdict",
    [
        ([[1.1, 1.9]], "holds at lab scale"),
        ([[0.9, 1.9]], "undecided at lab scale"),
        ([[1.1, 1.9], [0.9, 2.5]], "undecided at lab scale"),  # one is not enough
        ([[1.1, 1.9], [1.2, 2.5]], "holds at lab scale"),
    ],
)
def test_intervals_decide_only_where_all_lie_on_one_side(judge, intervals, verdict):
    keys = [f"interval{n}" for n in range(len(intervals))]
    values = {"x": 1.5, "by_seed": [1, 2, 3], **dict(zip(keys, intervals, strict=True))}
    found = judge(values, key="x", compare="above", than=1, intervals=keys, seeds="by_seed")
    assert found.verdict == verdict
    assert "90% interval" in found.here and found.here.endswith(", 3 seeds")


def test_an_interval_on_the_other_side_fails(judge):
    values = {"x": 0.5, "interval": [0.4, 0.9]}
    found = judge(values, key="x", compare="above", than=1, intervals=["interval"])
    assert found.verdict == "fails at lab scale"


@given(number=st.floats(0.1, 10), share=st.floats(0.01, 0.9), compare=st.sampled_from([*claims.OPERATORS]))
def test_the_contrary_claim_has_the_contrary_verdict(tmp_path_factory, number, share, compare):
    folder = tmp_path_factory.mktemp("values")
    bounds = [number * (1 - share), number * (1 + share)]
    about = {"id": "fig", "notebook": None, "parameters": {"confidence": 0.95}, "runs": {}, "files": {}}
    record = {"provenance": about, "values": {"x": number, "interval": bounds}}
    (folder / "fig.json").write_text(json.dumps(record))
    common = {"id": "it", "place": "Section 1", "says": "so", "evidence": "lab scale", "values": "fig"}
    common |= {"key": "x", "than": 1.0, "intervals": ["interval"], "differs": "small", "sources": []}
    contrary = {"above": "at most", "below": "at least", "at least": "below", "at most": "above"}[compare]
    ours, theirs = (
        claims.verdict(claims.Claim(**common, compare=word), {}, folder).verdict
        for word in (compare, contrary)
    )
    opposite = {"holds": "fails", "fails": "holds", "undecided": "undecided"}
    assert theirs.split()[0] == opposite[ours.split()[0]]


@pytest.mark.parametrize(
    "ours, theirs, verdict",
    [
        ([10.0], [12.0], "holds at lab scale"),
        ([12.0], [10.0], "fails at lab scale"),
        ([10.0], [10.1], "undecided at lab scale"),
        ([10.0, 10.0], [12.0, 10.1], "undecided at lab scale"),
        ([12.0, 10.0], [10.0, 10.1], "fails at lab scale"),
    ],
)
def test_a_deviation_makes_an_interval_of_the_quotient(judge, ours, theirs, verdict):
    values = {"x": ours, "y": theirs, "deviation": 0.01, "freedom": 3}
    keys = {"key": "x.*", "than": "y.*", "deviation": "deviation", "freedom": "freedom"}
    found = judge(values, compare="below", **keys)
    assert found.verdict == verdict
    low, high = (float(text) for text in re.search(r"interval (\S+) to ([\d.]+)", found.here).groups())
    half = 3.182446 * 2**0.5 * 0.01  # of Student's t distribution with 3 degrees of freedom
    assert low == pytest.approx(ours[0] / theirs[0] * 2.718281828**-half, rel=6e-3)
    assert high == pytest.approx(ours[0] / theirs[0] * 2.718281828**half, rel=6e-3)


def test_each_of_several_numbers_must_pass(judge):
    keys = {"key": "rows.*.x", "compare": "at least", "than": "rows.*.y"}
    rows = [{"x": 2, "y": 1}, {"x": 3, "y": 3}]
    assert judge({"rows": rows}, **keys).verdict == "holds at lab scale"
    assert judge({"rows": rows + [{"x": 3, "y": 3.1}]}, **keys).verdict == "fails at lab scale"


@pytest.mark.parametrize("values, verdict", [([True, True], "holds"), ([True, False], "contradicted")])
def test_true_is_a_comparison(judge, values, verdict):
    found = judge({"x": values}, key="x.*", compare="true", evidence="recomputed here")
    assert found.verdict == verdict


def test_a_relative_tolerance_is_a_share_of_what_it_is_held_against(judge):
    keys = {"key": "x.*", "compare": "equal", "than": "y.*", "relative": 0.01, "evidence": "mathematics"}
    assert judge({"x": [101, 1.009e-6], "y": [100, 1e-6]}, **keys).verdict == "holds"
    assert judge({"x": [101, 1.011e-6], "y": [100, 1e-6]}, **keys).verdict == "contradicted"


def test_a_number_of_the_paper_that_nothing_is_held_against_has_its_name(judge):
    """Else a gamma of 5 would stand beside a speed-up of 1.7 as if it were the paper's."""
    keys = {"key": "x", "compare": "equal", "evidence": "mathematics", "paper": ["fig.value"]}
    assert judge({"x": 2.0}, tolerance=0, **keys).paper == "2"
    assert judge({"x": 2.0}, than=2, tolerance=0, **keys).paper == "value = 2"


def test_rows_are_found_by_what_they_hold(judge):
    rows = [{"net": "a", "n": 1, "x": 1.0}, {"net": "a", "n": 2, "x": 2.0}, {"net": "b", "n": 2, "x": 3.0}]
    keys = {"compare": "equal", "tolerance": 0, "evidence": "recomputed here"}
    assert judge({"rows": rows}, key="rows.net=a.n=2.x", paper=["fig.value"], **keys).verdict == "holds"
    assert judge({"rows": rows}, key="rows.net=b.x / rows.net=a.n=1.x", than=3, **keys).verdict == "holds"
    assert judge({"rows": rows}, key="rows.-1.x", than=3, **keys).verdict == "holds"
    assert judge({"rows": rows}, key="rows.net=a.x / 1e6", than=1, **keys).here.startswith("1e-06 to 2e-06")


def test_without_evidence_nothing_is_tested():
    untested = [one for one in claims.load() if not one.tested]
    found = claims.verdicts(untested, claims.read_reported(), "/nowhere")
    assert {one.verdict for one in found} == {"not testable here"} and all(one.remark for one in found)


def test_what_a_verdict_rests_on_is_named_with_its_hashes(judge):
    runs = {"lab/a": {"w.safetensors": "ab" * 32}, "lab/b": {}, "lab/c": {"w.safetensors": "ef" * 32}}
    files = {
        "paper/runs/lab/a/run.json": "00" * 32,
        "paper/runs/lab/b/run.json": "cd" * 32,
        "paper/bench/x.json": "12" * 32,
    }
    keys = {"key": "x", "compare": "above", "than": 1, "runs": runs, "files": files}
    found = judge({"x": 2}, **keys, sources=["runs/lab/[ab]/*", "bench/x.json"])
    assert found.sources == {
        "paper/runs/lab/a/w.safetensors": "ab" * 32,
        "paper/runs/lab/b/run.json": "cd" * 32,
        "paper/bench/x.json": "12" * 32,
    }
    assert (
        claims.tell_sources(found) == "lab/a abababab, lab/b (record) cdcdcdcd, paper/bench/x.json 12121212"
    )
    with pytest.raises(ReproError, match=r"claim it: .*fig\.json was made from no file paper/runs/lab/d"):
        judge({"x": 2}, **keys, sources=["runs/lab/d/*"])


def test_notes_show_values(judge):
    values = {"x": 2, "samples": 10_000, "rows": [{"n": 1}, {"n": 3}, {"n": 1}], "name": "H200"}
    note = "{samples|,.0f} on {name}, {rows.*.n}"
    found = judge(values, key="x", compare="above", than=1, differs=note)
    assert found.remark == "10,000 on H200, 1, 3"
    with pytest.raises(ReproError, match="claim it: .* has no 'seeds'"):
        judge(values, key="x", compare="above", than=1, differs="{seeds}")


# Errors ---------------------------------------------------------------------------------------------

ABOVE = {"key": "x", "compare": "above", "than": 1}


@pytest.mark.parametrize(
    "values, keys, message",
    [
        ({"y": 1}, ABOVE, "values/fig.json has no 'x'"),
        ({"xx": 1}, ABOVE, "Did you mean xx"),
        ({"x": None}, ABOVE, "'x' is null, not a finite number"),
        ({"x": float("nan")}, ABOVE, "'x' is NaN, not a finite number"),
        ({"x": float("inf")}, ABOVE, "'x' is Infinity, not a finite number"),
        ({"x": "2"}, ABOVE, "'x' is \"2\", not a finite number"),
        ({"x": True}, ABOVE, "'x' is true, not a finite number"),
        ({"x": [2]}, ABOVE, r"not a finite number; x\.\* would be its entries"),
        ({"x": []}, {**ABOVE, "key": "x.*"}, r"has no '\*' on the way 'x\.\*'"),
        ({"x": []}, {**ABOVE, "key": "x.-1"}, "has no '-1'"),
        ({"x": [2]}, {**ABOVE, "key": "x.1"}, "has no '1'"),
        ({"x": [[2], []]}, {**ABOVE, "key": "x.*.*"}, r"has no '\*' on the way 'x\.\*\.\*'"),
        ({"x": [{"y": 2}, {}]}, {**ABOVE, "key": "x.*.y"}, "has no 'y'"),
        ({"x": [{"n": 1}]}, {**ABOVE, "key": "x.n=2.y"}, "has no 'n=2'"),
        ({"x": [1, 2, 3], "y": [1, 2]}, {**ABOVE, "key": "x.*", "than": "y.*"}, "3 numbers .* against 2"),
        ({"x": 2}, {**ABOVE, "intervals": ["i"]}, "has no 'i'"),
        ({"x": 2, "i": None}, {**ABOVE, "intervals": ["i"]}, "has no '\\*' on the way"),
        ({"x": 2, "i": [2.5, 3]}, {**ABOVE, "intervals": ["i"]}, "'i' is no interval .* that holds 'x'"),
        ({"x": [2, 2], "i": [1, 3]}, {**ABOVE, "key": "x.*", "intervals": ["i"]}, "are of one number"),
        (
            {"x": 2, "d": 0, "f": 2},
            {**ABOVE, "deviation": "d", "freedom": "f"},
            "all numbers must be above 0",
        ),
        ({"x": 2, "d": 1, "f": 0}, {**ABOVE, "deviation": "d", "freedom": "f"}, "must be 1 or more"),
        (
            {"x": 2, "i": [1, 3], "s": [1]},
            {**ABOVE, "intervals": ["i"], "seeds": "s"},
            "no list with an entry",
        ),
        ({"x": 2, "y": 0}, {**ABOVE, "key": "x / y"}, "'y' is 0"),
        ({"x": 1}, {"key": "x", "compare": "true", "evidence": "mathematics"}, "'x' is 1, not true or false"),
        (
            {"x": 1},
            {"key": "x", "compare": "above", "paper": ["fig.valu"]},
            "reported.toml has no 'valu'.*value",
        ),
        (
            {"x": 1},
            {"key": "x", "compare": "above", "paper": ["fig.name"]},
            "reported.toml: 'fig.name' is \"FID\"",
        ),
        ({"x": 1}, {**ABOVE, "paper": ["fig"]}, "'fig' is a table"),
    ],
)
def test_a_value_that_is_missing_or_no_number_is_an_error_by_name(judge, values, keys, message):
    with pytest.raises(ReproError, match=f"claim it: .*{message}"):
        judge(values, **keys)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"comparr": "above"}, "unknown key 'comparr'. Did you mean compare"),
        ({"compare": "abov"}, "compare: Input should be 'equal', 'above'"),
        ({"evidence": "luck"}, "evidence: Input should be 'mathematics'"),
        ({"than": [1]}, "than"),
        ({"key": None}, "its test lacks key"),
        ({"values": None}, "its test lacks values"),
        ({"differs": None}, "needs `differs`"),
        ({"why": "so"}, "`why` is for claims without evidence"),
        ({"evidence": "none"}, "without evidence it can have no values"),
        ({"tolerance": 0.1}, "`equal`, and nothing else"),
        ({"compare": "equal"}, "`equal`, and nothing else"),
        ({"compare": "equal", "tolerance": 0.1, "relative": 0.1}, "needs one of"),
        ({"tolerance": 0.1, "relative": 0.1}, "needs one of"),
        ({"seeds": "s"}, "give these"),
        ({"deviation": "x.*"}, "must be the key of one thing"),
        ({"paper": ["fig.n=1"]}, "must be the key of one thing"),
        ({"compare": "equal", "tolerance": 0.1, "intervals": ["i"]}, "takes no intervals"),
        ({"intervals": ["i"], "deviation": "d", "freedom": "f"}, "not both"),
        ({"deviation": "d"}, "needs its degrees of `freedom`"),
        ({"freedom": "f"}, "and these a deviation"),
        ({"evidence": "mathematics", "intervals": ["i"]}, "its evidence would be `lab scale`"),
        ({"compare": "true"}, "`true` compares with nothing"),
        ({"than": None}, "compared with the paper's number"),
        ({"place": None}, "place: Field required"),
    ],
)
def test_a_claim_that_is_not_sound_is_an_error_by_name(scratch, change, message):
    keys = {
        "place": "Section 1", "says": "so", "evidence": "lab scale", "values": "fig", "key": "x",
        "compare": "above", "than": 1, "differs": "small",
    } | change  # fmt: skip
    path = scratch / "claims.toml"
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in keys.items() if value is not None]
    path.write_text("[it]\n" + "".join(lines))
    with pytest.raises(ReproError, match=rf"claims\.toml, \[it\]: .*{re.escape(message)}"):
        claims.load(path)


def test_an_id_that_is_there_twice_is_an_error(scratch):
    path = scratch / "claims.toml"
    one = '[twice]\nplace = "Section 1"\nsays = "so"\nevidence = "none"\nwhy = "why"\n'
    path.write_text(one)
    assert len(claims.load(path)) == 1
    path.write_text(one + one)
    with pytest.raises(ReproError, match="twice"):
        claims.load(path)


def test_missing_and_foreign_values_are_errors_of_the_command(scratch, capsys):
    assert main(["claims", "--values", str(scratch)]) == 1
    assert re.search(r"error: claim \w+ needs .*sec1_pareto.json, which is missing", capsys.readouterr().err)
    (scratch / "sec1_pareto.json").write_text((VALUES / "fig2_edm.json").read_text())
    assert main(["claims", "--values", str(scratch)]) == 1
    assert "holds no values" in capsys.readouterr().err


# The claims of the supplement -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed():
    """The committed claims."""
    return claims.load()


@pytest.fixture(scope="module")
def found(listed):
    """Their verdicts by the committed values."""
    return {one.id: one for one in claims.verdicts(listed, claims.read_reported(), VALUES)}


def test_every_claim_resolves_and_the_table_is_of_these_values(listed, found):
    committed = json.loads((VALUES / "claims.json").read_text())["values"]
    assert list(found) == [one.id for one in listed] and committed["total"] == len(listed)
    assert {id: one["verdict"] for id, one in committed["claims"].items()} == {
        id: one.verdict for id, one in found.items()
    }, "run: python -m repro render claims"
    assert committed["counts"] == claims.counts([*found.values()])
    assert sum(committed["counts"].values()) == len(listed)


def test_the_command_tells_every_claim(capsys, found):
    assert main(["claims"]) == 0
    text = capsys.readouterr().out
    assert all(f"{one.verdict:24}{one.id}: {one.says}" in text for one in found.values())
    assert main(["claims", "--total"]) == 0
    assert (total := capsys.readouterr().out) == text.splitlines()[-1] + "\n"
    told = {name: int(count) for name, count in re.findall(r"([a-z][a-z ]*) (\d+)", total.partition(": ")[2])}
    verdicts = [one.verdict for one in found.values()]
    assert told == {name: verdicts.count(name) for name in claims.VERDICTS}
    assert main(["claims", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert {id: row["verdict"] for id, row in rows.items()} == {id: one.verdict for id, one in found.items()}
    assert all(
        re.fullmatch("[0-9a-f]{64}", hash) for row in rows.values() for hash in row["sources"].values()
    )


def test_a_verdict_by_intervals_is_that_of_its_notebook(found):
    """Where a notebook says faster, slower or undecided itself, by `compare.speed_up`."""
    words = {
        "faster": "holds at lab scale",
        "slower": "fails at lab scale",
        "undecided": "undecided at lab scale",
    }
    compared = 0
    for one in found.values():
        if one.key and "speed_ups" in one.key:
            values = json.loads((VALUES / f"{one.values}.json").read_text())["values"]
            (verdict,) = claims.look_up(values, re.sub("ratio$", "verdict", one.key), one.id)
            assert one.verdict == words[verdict]
            compared += 1
    assert compared == 3


TURNED = {  # a value, and what it becomes: the other side of what is claimed
    "eq1_direction": ("sec1_pareto", "descent.0.levels_lowered", lambda x: x - 1),
    "eq3_simplex": ("sec1_pareto", "eq_3.apart.sum_apart_from_1", lambda x: 0.01),
    "eq4_vertex": ("sec1_pareto", "eq_4.apart", lambda x: 1e-3),
    "concave": ("sec1_pareto", "concave.in_u.min", lambda x: -0.01),
    "eq7_half": ("sec1_pareto", "eq_7.at_one_half", lambda x: 0.5),
    "v_and_x0": ("sec2_targets", "checked.3.v over x0", lambda x: x * 1.001),
    "vit_small_heads": ("table1_architectures", "vits.ViT-Small.heads_divide", lambda x: not x),
    "like_dit": ("table1_architectures", "like_dit.same.width", lambda x: not x),
    "ablation_unet_flops": ("table1_architectures", "ablation_over_vit_base.flops", lambda x: [0.7, 0.9]),
    "one_fid_of_the_unet": ("table1_architectures", "paper.fid_in_section_3_1", lambda x: 2.14),
    "fig1_eps": (
        "fig1_pixel_ablation", "speed_ups.guided.eps-minsnr5/eps-constant.paired", lambda x: [0.9, x[1]],
    ),
    "fig1_x0": (
        "fig1_pixel_ablation", "speed_ups.guided.x0-minsnr5/x0-constant.paired", lambda x: [1.1, x[1]],
    ),
    "fig8_slower": ("fig8_ugd_cost", "rows.0.ugd_without_gram_matrix_times", lambda x: x / 2),
    "robust_to_samples": ("sec4_4_flagships", "intervals.sampling", lambda x: [x[0], 0.0048]),
    "heun_20_steps_unet": ("sec4_5_samplers", "best.7.Heuns_distance", lambda x: x * 1.2),
}  # fmt: skip


@pytest.mark.parametrize("id", TURNED)
def test_a_changed_value_changes_the_verdict(id, listed, found, scratch):
    file, key, change = TURNED[id]
    record = json.loads((VALUES / f"{file}.json").read_text())
    *way, last = [int(step) if step.isdecimal() else step for step in key.split(".")]
    place = record["values"]
    for step in way:
        place = place[step]
    place[last] = change(place[last])
    (scratch / f"{file}.json").write_text(json.dumps(record))
    (one,) = claims.verdicts([one for one in listed if one.id == id], claims.read_reported(), scratch)
    assert one.verdict != found[id].verdict


def test_no_verdict_is_written_down():
    text = claims.CLAIMS.read_text()
    for word in ("holds", "fails", "contradicted", "undecided", "testable", "verdict"):
        assert not re.search(rf"\b{word}\b", text, re.IGNORECASE), word


def test_the_table_depends_on_all_values_and_comes_last(listed):
    claims.verdicts(claims.load(), claims.read_reported(), VALUES)
    used = {Path(path).name for path in provenance.used_files()}
    assert used == {"claims.toml", "reported.toml", *(f"{one.values}.json" for one in listed if one.values)}
    assert render.ids()[-1] == "claims"


def test_no_notebook_but_its_own_imports_claims():
    """A change of what is claimed would have every figure drawn anew."""
    importing = {
        path.stem
        for path in (provenance.ROOT / "notebooks").glob("*.ipynb")
        if "repro.claims" in provenance.modules_of(notebook.code(path))
    }
    assert importing == {"claims"}


def leaves(value, way=""):
    """Each number and text of nested tables and lists (a list as one), by its key."""
    if not isinstance(value, dict):
        return {way: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in leaves(inner, f"{way}.{name}").items()
    }


def test_every_number_reported_is_in_a_claim(listed):
    named = {f".{part}" for one in listed for key in one.paper for part in key.split(" / ")}
    about = ("place", "data", "backbone", "name")  # in words, what a number is of
    unclaimed = {
        key
        for key in leaves(claims.read_reported())
        if key not in named and key.rpartition(".")[2] not in about
    }
    assert unclaimed == set()


def test_no_number_of_the_paper_is_typed_again(listed):
    """What a claim says has no numbers but 0, those of formulas and places, and those of names."""
    allowed = r"\d+×\d+|\b0\b|(?:Section|Figure|Equation|Tables?) \d(?:[\d.]+| and \d)?|SNR \+ 1"
    for one in listed:
        assert not re.search(r"(?<![\w-])\d", re.sub(allowed, "", one.says)), one.says


SUPPLEMENT = Path(__file__).parents[2] / "shared" / "paper" / "supplement.md"


@pytest.fixture(scope="module")
def supplement():
    """The supplement's text without its references."""
    if not SUPPLEMENT.is_file():
        pytest.skip("the supplement's text is not here: this test needs shared/paper beside the repository")
    return SUPPLEMENT.read_text().split("## References")[0]


def test_every_place_of_the_supplement_has_a_claim(supplement, listed):
    claimed = " ".join(one.place for one in listed)
    equations = set(re.findall(r"(?:\\tag\{|\()(\d)[)}]\s*\$\$", supplement))
    numbered = set("".join(re.findall(r"Equations? [\d, and]+", claimed)))
    assert len(equations) == 8 and equations <= numbered
    captions = re.findall(r"(?m)^(Figure|Table) (\d+):", supplement)
    assert len(captions) == 8
    for kind, number in captions:
        assert re.search(rf"\b{kind} {number}\b", claimed), f"{kind} {number}"
    sections = re.findall(r"(?m)^#+ (\d(?:\.\d)*)\.? ", supplement)
    assert len(sections) == 13
    for number in sections:
        assert re.search(rf"\bSection {re.escape(number)}\b", claimed), f"Section {number}"
    assert "Theorem 1" in claimed


def test_every_number_of_the_supplement_is_reported(supplement):
    text = supplement
    for no_number in (
        r"\$\$.*?\$\$",  # equations, of section 1 and 2
        r"(?m)^#+ [^\n]*",
        r"\[[\d, ]+\]",  # references
        r"<sup>.*?</sup>",
        r"(?:Section|Theorem|Equation|Figures?|Table|Tab\.)\s*\d+(?:-\d+)?",
        r"(?:ImageNet|CelebA|at)[- ]*\$? ?\d+(?: *\\times *\d+)?",  # data sets' names
        r"[_^]\{?\d",
        r"(?:= |\\geq )0\b",
    ):
        text = re.sub(no_number, " ", text, flags=re.DOTALL)
    reported = claims.read_reported()
    known = {float(part) for leaf in leaves(reported).values() if not isinstance(leaf, str)
             for part in (leaf if isinstance(leaf, list) else [leaf])}  # fmt: skip
    known.add(round(reported["fig8_ugd_cost"]["ugd_seconds"] / 60, 6))  # in the text, minutes
    known.add(float(re.search(r"(\d+) GB", reported["fig8_ugd_cost"]["device"])[1]))
    numbers = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([KkMG]?)\b", text)
    assert len(numbers) > 60
    for number, unit in numbers:
        assert float(number) * (1000 if unit in ("K", "k") else 1) in known, number + unit


def test_the_presets_follow_the_reported_settings():
    told, runs = claims.read_reported(), presets.PRESETS
    ablation, adm = runs["paper/imagenet256-unet-ablation"], runs["paper/imagenet64-unet"]
    said = told["sec3_1_architectures"]
    assert ablation.model.channels == said["ablation_base_channels"]
    assert list(ablation.model.multipliers) == said["ablation_multipliers"]
    assert ablation.model.blocks == said["ablation_blocks"] and ablation.model.heads == said["ablation_heads"]
    assert list(ablation.model.attention) == said["ablation_attention"]
    assert adm.train.batch == said["adm_batch"]
    assert adm.train.images == said["adm_iterations"] * said["adm_batch"]
    latents = runs["paper/imagenet256-unet"].data
    assert [latents.resolution, latents.resolution, latents.channels] == said["latent"]
    for kind, betas in (("unet", "unet_betas"), ("vit", "vit_betas")):
        drawn = [run for name, run in runs.items() if name.startswith("paper/") and run.model.kind == kind]
        assert drawn and {run.train.betas for run in drawn} == {tuple(told["sec3_2_training"][betas])}
    steps = {
        "ablation_steps": ("paper/imagenet256-vit-base", "paper/imagenet256-unet-ablation"),
        "imagenet64_steps": ("paper/imagenet64-vit", "paper/imagenet64-unet"),
        "imagenet256_steps": ("paper/imagenet256-vit", "paper/imagenet256-unet"),
    }
    for key, names in steps.items():
        for name in names:
            assert runs[name].sample == config.Sample() or runs[name].sample.sampler == "heun"
            assert runs[name].sample.steps == told["sec3_3_sampling"][key]
    arm, edm = runs["paper/imagenet64-x0-minsnr5"], runs["paper/imagenet64-edm-minsnr"]
    said = told["fig1_pixel_ablation"]
    assert (arm.train.batch, arm.train.images) == (said["batch"], said["iterations"] * said["batch"])
    assert (arm.weight.gamma, arm.evaluate.samples) == (said["gamma"], said["samples"])
    said = told["fig2_edm"]
    assert (edm.min_snr_factor, edm.sample.steps) == (said["gamma"], said["steps"])


def test_the_command_needs_neither_torch_nor_a_gpu():
    code = "import sys; from repro import claims; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=provenance.ROOT)
    assert done.stdout.strip() == "False", done.stderr

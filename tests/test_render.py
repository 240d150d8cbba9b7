"""Rendering: parameters checked before anything starts, nothing half done, nothing made anew in vain."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest

from repro import files, notebook, paper, provenance, render
from repro.files import ReproError

PARAMETERS = """
run = "faces"
rows = 2
guidance = 1.0
steps: int | None = None
recompute = False
sizes = (1, 2)
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("REPRO_PAPER_OUT", "REPRO_RENDER", "REPRO_DATA", "REPRO_RUNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkout(tmp_path):
    """Write a checkout with one notebook, and return its figures.toml: `checkout(*cells, ...)`."""

    def write(*cells, parameters=PARAMETERS, entry="", time_limit=120, tags=("parameters",)):
        book = nbformat.v4.new_notebook()
        book.cells.append(nbformat.v4.new_markdown_cell("# A figure"))
        book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": list(tags)}))
        book.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
        path = tmp_path / "notebooks" / "draw.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(book, path)
        figures = tmp_path / "paper" / "figures.toml"
        head = f"[fig]\nnotebook = 'notebooks/draw.ipynb'\ntime_limit = {time_limit}\n"
        files.write_atomic(figures, f"{head}[fig.parameters]\n{entry}")
        return figures

    return write


def record(figures: Path) -> Path:
    return figures.parent.parent / "build" / "render" / "fig.json"


# Parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rwos": 3}, "draw.ipynb has no parameter 'rwos'. Did you mean rows?"),
        ({"zzz": 3}, "There are: run, rows, guidance, steps, recompute, sizes"),
        ({"rows": "3"}, "parameter rows of draw.ipynb must be int, not '3' .str.; its default is 2"),
        ({"rows": 3.0}, "must be int, not 3.0 .float."),
        ({"rows": True}, "must be int, not True .bool."),
        ({"recompute": 1}, "must be bool .true or false., not 1 .int."),
        ({"steps": "many"}, "must be int or none, not 'many'"),
        ({"run": None}, "must be str, not None"),
        ({"guidance": float("nan")}, "parameter guidance of draw.ipynb cannot be nan"),
        ({"run": object}, "parameter run of draw.ipynb cannot be <class 'object'>"),
        ({"sizes": np.arange(2)}, r"parameter sizes of draw.ipynb cannot be array\(\[0, 1\]\) .ndarray."),
    ],
)
def test_a_bad_parameter_is_an_error_before_anything_starts(checkout, monkeypatch, given, message):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("something was started"))
    figures = checkout()
    with pytest.raises(ReproError, match=message):
        render.render("fig", figures, overrides=given)
    assert not record(figures).parent.exists()


def test_parameters_of_figures_toml_are_checked_too(checkout):
    with pytest.raises(ReproError, match="no parameter 'colls'"):
        render.render("fig", checkout(entry="colls = 3"))


def test_parameters_become_jsons_types(checkout):
    checkout()
    path = checkout().parent.parent / "notebooks" / "draw.ipynb"
    given = {
        "run": Path("a/b"),
        "rows": np.int64(3),
        "guidance": 2,
        "steps": np.int32(4),
        "recompute": np.bool_(True),
        "sizes": (np.float32(0.5), 1),
    }
    values = notebook.check_parameters(path, given)
    assert values == {
        "run": "a/b",
        "rows": 3,
        "guidance": 2.0,
        "steps": 4,
        "recompute": True,
        "sizes": [0.5, 1],
    }
    assert [type(value) for value in values.values()] == [str, int, float, int, bool, list]
    assert notebook.check_parameters(path, {})["sizes"] == [1, 2]


@pytest.mark.parametrize("tags, count", [((), 0), (("parameter",), 0)])
def test_a_notebook_needs_a_parameters_cell(checkout, tags, count):
    with pytest.raises(ReproError, match=f"has {count} cells tagged `parameters`; it needs one"):
        render.render("fig", checkout(tags=tags))


@pytest.mark.parametrize("line", ["import os", "x = os.getpid()", "x: Path = 'a'", "x = y = 1", "x: int"])
def test_parameters_are_literals(checkout, line):
    with pytest.raises(ReproError, match="may only have lines `name = literal`.*not `" + line.split()[0]):
        render.render("fig", checkout(parameters=line))


def test_overrides_of_the_command_line():
    texts = ["rows=4", "guidance=1.5", "recompute=true", "run=celeba64-unet", 'name="8"', "steps=null"]
    texts += ["empty=", "sizes=[1, 2]", "day=2024-01-01", "equation=a=b", "lines=1\nrows = 2", "none=nan"]
    assert render.parse_overrides(texts) == {
        "rows": 4,
        "guidance": 1.5,
        "recompute": True,
        "run": "celeba64-unet",
        "name": "8",
        "steps": None,
        "empty": "",
        "sizes": [1, 2],
        "day": "2024-01-01",
        "equation": "a=b",
        "lines": "1\nrows = 2",
        "none": "nan",
    }
    with pytest.raises(ReproError, match="cannot read the parameter 'rows'; write name=value"):
        render.parse_overrides(["rows"])
    with pytest.raises(ReproError, match="rows is given twice"):
        render.parse_overrides(["rows=1", "rows=2"])


# figures.toml ---------------------------------------------------------------------------------------


def test_unknown_id_lists_the_near_ones(checkout):
    figures = checkout()
    assert render.ids(figures) == ["fig"]
    with pytest.raises(ReproError, match="there is no output 'figg'. Did you mean fig?"):
        render.render("figg", figures)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[fig]\nnotebok = 'x'", "unknown key 'notebok'; known are notebook, parameters, time_limit"),
        ("[fig]\nnotebook = 'x'", "lacks time_limit"),
        ("[fig]\nnotebook = 'x'\ntime_limit = 'long'", "time_limit cannot be 'long'"),
        ("[fig]\nnotebook = 'notebooks/no.ipynb'\ntime_limit = 1", "there is no notebook notebooks/no.ipynb"),
        ("fig = 3", "'fig' must be a table"),
        ("[fig", "is not TOML"),
    ],
)
def test_a_bad_figures_toml_is_explained(checkout, text, message):
    figures = checkout()
    figures.write_text(text)
    with pytest.raises(ReproError, match=message):
        render.render("fig", figures)


def test_the_committed_figures_toml_is_sound():
    for id in render.ids():
        output = render.find(id)
        values = notebook.check_parameters(output.notebook, output.parameters)
        assert values.get("output", id) == id


# What is up to date ---------------------------------------------------------------------------------


@pytest.fixture
def rendered(checkout, tmp_path, monkeypatch, capsys):
    """A rendered output in a checkout of its own, executed by a stand-in; `again()` gives what it prints."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for name, source in {
        "__init__": "",
        "direct": "from repro import indirect",
        "indirect": "x = 1",
        "unrelated": "x = 1",  # to what the notebook imports
    }.items():
        files.write_atomic(tmp_path / "repro" / f"{name}.py", source)
    run = tmp_path / "paper" / "runs" / "lab" / "faces"
    files.write_atomic(run / "weights.safetensors", b"weights")
    files.write_atomic(run / "not-read.json", "{}")
    files.write_atomic(tmp_path / "requirements.lock", "torch==1")
    figures = checkout("from repro import direct")

    def execute(output, parameters, home, build, stem):
        files.write_atomic(home / "figures" / f"{parameters['run']}.png", json.dumps(parameters))
        files.write_atomic(build / "notebooks" / f"{stem}.ipynb", "{}")
        used = {"paper/runs/lab/faces/weights.safetensors": files.sha256(run / "weights.safetensors")}
        name = f"figures/{parameters['run']}.png"
        return used, {name: files.sha256(home / name)}, 0.0

    monkeypatch.setattr(render, "_execute", execute)

    def again(**arguments):
        capsys.readouterr()
        render.render("fig", figures, **arguments)
        return capsys.readouterr().out.splitlines()[0]

    assert again() == "fig: rendering (nothing is rendered yet)"
    assert again() == "fig: up to date"
    return again


def edit_notebook(path: Path, **changes):
    book = nbformat.read(path, 4)
    book.cells[2].update(changes)
    nbformat.write(book, path)


RUN = "paper/runs/lab/faces"


@pytest.mark.parametrize(
    "path, text, reason",
    [
        ("repro/direct.py", "from repro import indirect\nx = 2", "module repro.direct changed"),
        ("repro/indirect.py", "x = 2", "module repro.indirect changed"),
        ("repro/direct.py", "x = 1", "module repro.direct changed; module repro.indirect changed"),
        (f"{RUN}/weights.safetensors", "other", f"{RUN}/weights.safetensors changed"),
        ("requirements.lock", "torch==2", "requirements.lock changed"),
        ("paper/figures/faces.png", "edited", "figures/faces.png is missing or was edited"),
        ("paper/figures/faces.png", None, "figures/faces.png is missing or was edited"),
        ("build/notebooks/fig.ipynb", None, "build/notebooks/fig.ipynb is missing or was edited"),
        ("build/render/fig.json", "{", "nothing is rendered yet"),
    ],
)
def test_what_an_output_depends_on_renders_it_anew(rendered, tmp_path, path, text, reason):
    if text is None:
        (tmp_path / path).unlink()
    else:
        (tmp_path / path).write_text(text)
    assert rendered() == f"fig: rendering ({reason})"
    assert rendered() == "fig: up to date"


def test_a_changed_notebook_entry_or_folder_renders_it_anew(rendered, tmp_path, monkeypatch):
    edit_notebook(tmp_path / "notebooks/draw.ipynb", source="from repro import direct\nx = 1")
    assert rendered() == "fig: rendering (notebooks/draw.ipynb changed)"
    with open(tmp_path / "paper/figures.toml", "a") as file:
        file.write("rows = 3\n")
    assert rendered() == "fig: rendering (parameter rows changed)"
    monkeypatch.setenv("REPRO_RUNS", "/elsewhere")
    assert rendered() == "fig: rendering (environment REPRO_RUNS changed)"
    assert rendered() == "fig: up to date"


def test_a_file_that_was_read_and_is_gone_renders_it_anew(rendered, tmp_path):
    (tmp_path / RUN / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError):  # the stand-in reads it
        rendered()


def test_what_an_output_does_not_depend_on_leaves_it_alone(rendered, tmp_path):
    (tmp_path / "repro/unrelated.py").write_text("x = 2")
    (tmp_path / RUN / "not-read.json").write_text("[]")
    (tmp_path / RUN / "new.json").write_text("[]")
    os.utime(tmp_path / "repro/direct.py", (1, 1))
    with open(tmp_path / "paper/figures.toml", "a") as file:
        file.write("rows = 2  # the default\n[other]\nnotebook = 'other.ipynb'\n")
    # as Jupyter leaves a notebook that was run
    output = nbformat.v4.new_output("stream", text="hi")
    edit_notebook(tmp_path / "notebooks/draw.ipynb", execution_count=3, outputs=[output])
    assert rendered() == "fig: up to date"


def test_parameters_of_the_command_line_and_force(rendered, tmp_path):
    other = {"rows": 5, "run": "mine"}
    assert rendered(overrides=other) == "fig: rendering (nothing is rendered yet)"
    assert json.loads((tmp_path / "paper/figures/mine.png").read_text())["rows"] == 5
    assert rendered(overrides=other) == "fig: up to date"
    assert rendered() == "fig: up to date"  # what was drawn with other parameters is not in its place
    assert rendered(overrides={"rows": 2}) == "fig: up to date"  # the same parameters
    assert (
        rendered(overrides={"rows": 5}) == "fig: rendering (nothing is rendered yet)"
    )  # over the figure itself
    assert rendered() == "fig: rendering (figures/faces.png is missing or was edited)"
    assert rendered(force=True) == "fig: rendering (forced)"


def test_a_scratch_rendering_leaves_the_real_one_as_it_was(rendered, tmp_path):
    scratch = tmp_path / "scratch"
    before = (tmp_path / "build/render/fig.json").read_bytes()
    assert rendered(out=scratch, overrides={"rows": 5}) == "fig: rendering (nothing is rendered yet)"
    assert (scratch / "figures/faces.png").exists() and (scratch / "build/notebooks/fig.ipynb").exists()
    assert (tmp_path / "build/render/fig.json").read_bytes() == before
    assert rendered() == "fig: up to date"


# Execution (each starts a kernel, which takes seconds) ------------------------------------------------


SAVE = """
from repro import paper
%time x = 1
paper.save_values("fig", {"rows": rows, "steps": steps})
"""


def test_executed_notebook_outputs_and_provenance(checkout, tmp_path):
    used = tmp_path / "input.txt"
    used.write_text("input")
    figures = checkout(
        f"from repro import provenance\nprovenance.used({str(used)!r}).read_text()",
        "",
        f"{SAVE}\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\npaper.save_figure(plt.gcf(), 'fig')",
        "import os; print(os.getcwd(), os.environ['PYTHONHASHSEED'])",
        entry="rows = 7",
    )
    executed = render.render("fig", figures, overrides={"steps": 3})
    book = nbformat.read(executed, 4)
    nbformat.validate(book)
    assert f"{tmp_path / 'notebooks'} 0" in book.cells[-1].outputs[0].text
    assert any("image/png" in output.get("data", {}) for output in book.cells[-2].outputs)  # drawn inline

    values = tmp_path / "paper" / "values" / "fig.json"
    assert json.loads(values.read_text())["values"] == {"rows": 7, "steps": 3}
    expected = {"run": "faces", "rows": 7, "guidance": 1.0, "steps": 3, "recompute": False, "sizes": [1, 2]}
    name = provenance.relative(used)
    for path in (values, tmp_path / "paper/figures/fig.png", tmp_path / "paper/figures/fig.pdf"):
        found = paper.read_provenance(path)
        assert found["parameters"] == expected
        assert found["files"] == {name: files.sha256(used)}
        assert found["notebook"]["path"] == "notebooks/draw.ipynb"
    assert book.metadata.repro.parameters == expected
    assert book.metadata.repro.code == found["code"]
    assert book.metadata.repro.files == {name: files.sha256(used)}
    assert book.metadata.repro.seconds > 0
    assert sorted(os.listdir(tmp_path / "build/render")) == [f"{executed.stem}.json", "fig.lock"]

    # another process finds it up to date, and imports nothing heavy to find that out
    code = (
        "import sys\nfrom repro import render\n"
        f"render.render('fig', {str(figures)!r}, overrides={{'steps': 3}})\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'papermill', 'nbformat', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": str(provenance.ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("fig: up to date\n", "")

    used.write_text("another input")
    changes = render._changes(
        json.loads(record(figures).with_name(f"{executed.stem}.json").read_text()),
        {},
        figures.parent,
        executed,
    )
    assert f"{name} changed" in changes


def test_a_failing_cell_changes_no_output(checkout, tmp_path):
    check = "# the check\nraise ValueError(f'images differ by {rows}')"
    figures = checkout(SAVE, check, "print('not reached')")
    old = tmp_path / "paper" / "values" / "fig.json"
    files.write_atomic(old, "as it was")
    files.write_atomic(tmp_path / "build/notebooks/fig.ipynb", "an older one")
    with pytest.raises(ReproError) as error:
        render.render("fig", figures)
    failed = tmp_path / "build/notebooks/fig.failed.ipynb"
    assert str(error.value) == (
        "fig: notebooks/draw.ipynb failed: cell `# the check`: ValueError: images differ by 2. "
        f"The notebook as far as it got: {failed}"
    )
    assert old.read_text() == "as it was"
    assert "images differ by 2" in failed.read_text() and "not reached" in failed.read_text()
    assert os.listdir(tmp_path / "build/notebooks") == ["fig.failed.ipynb"]
    assert os.listdir(tmp_path / "build/render") == ["fig.lock"]


def test_leaving_a_notebook_early_is_a_failure(checkout):
    # papermill takes sys.exit() for success and leaves out the cells after it
    with pytest.raises(ReproError, match="cell `import sys; sys.exit..` left the notebook before its end"):
        render.render("fig", checkout(SAVE, "import sys; sys.exit()", "print(2)"))


# A kernel with a child in a session of its own: what a signal to a process group misses.
HANG = """
import os, pathlib, subprocess, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path("pids.part").write_text(f"{os.getpid()} {os.getppid()} {child.pid}")
os.replace("pids.part", "pids")
time.sleep(600)
"""


def wait_for_pids(root: Path) -> list[psutil.Process]:
    for _ in range(1200):
        if (root / "notebooks" / "pids").exists():
            return [psutil.Process(int(pid)) for pid in (root / "notebooks" / "pids").read_text().split()]
        time.sleep(0.1)
    raise AssertionError("the notebook did not start")


def left(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a dead one that no one has waited for does not."""
    return [p for p in psutil.wait_procs(processes, timeout=30)[1] if p.status() != psutil.STATUS_ZOMBIE]


def test_the_time_limit_ends_the_kernel_and_what_it_started(checkout, tmp_path, monkeypatch):
    figures = checkout(SAVE, HANG, time_limit=77)
    running = []

    class Limited(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is not None:  # let the limit pass as soon as the notebook hangs, on any machine
                assert timeout == 77
                running.extend(wait_for_pids(tmp_path))
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Limited)
    with pytest.raises(ReproError, match="time limit of 77 s in cell `import os, pathlib.* and was ended"):
        render.render("fig", figures)
    assert len(running) == 3 and not left(running)
    assert not (tmp_path / "paper/values").exists()
    assert os.listdir(tmp_path / "build/notebooks") == ["fig.failed.ipynb"]


def test_a_killed_rendering_leaves_nothing_running(checkout, tmp_path):
    figures = checkout(HANG)
    code = f"from repro import render; render.render('fig', {str(figures)!r})"
    environment = os.environ | {"PYTHONPATH": str(provenance.ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    running = wait_for_pids(tmp_path)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not left(running)


def test_two_renderings_at_once_are_one(checkout, tmp_path, capfd):
    figures = checkout("open('count', 'a').write('x')", SAVE)
    # processes, as users have them: in threads of Python 3.11, ast.parse may fail
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=render.render, args=("fig", figures)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    assert [one.exitcode for one in both] == [0, 0]
    assert (tmp_path / "notebooks/count").read_text() == "x"
    printed = capfd.readouterr().out
    assert "another process is rendering it; waiting" in printed and "fig: up to date" in printed

"""README.md: its numbers are those of the recorded files, and the files it names exist."""

import json
import re
import shlex
import subprocess

import cluster
import pytest

from repro import provenance, readme
from repro.__main__ import main
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


def test_what_it_says_is_not_measured_is_not():
    """Sentences that are to go when these numbers come."""
    vit, sampled = (
        readme.value(provenance.ROOT / "paper" / "values" / f"{name}.json", "values")
        for name in ("fig10_imagenet64_vit", "sec4_5_samplers")
    )
    there = [vit["best_of_sweep"]["reported"], vit.get("precisions", [])]
    assert README.read_text().count("not yet measured") == 3 - bool(there[0]) - 2 * bool(there[1])
    assert ("are not measured of the ViT" in README.read_text()) == (
        sampled["unmeasured"]["imagenet64-vit"]["count"] > 0
    )


def test_numbers_follow_the_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"x": [1.26, {"y": 2000}]}))
    text = "<!--= a.json x.0 .1f -->9<!--/--> and <!--= a.json x.1.y 0.001*.2f --><!--/-->"
    expected = "<!--= a.json x.0 .1f -->1.3<!--/--> and <!--= a.json x.1.y 0.001*.2f -->2.00<!--/-->"
    assert readme.refresh(text, tmp_path) == expected


def test_an_entry_is_found_by_its_place_or_by_what_it_has(tmp_path):
    rows = [{"of": "a", "n": n, "y": y} for n, y in ((1, 3.0), (10, 4.0))] + [{"of": "b c", "n": 1, "y": 5.0}]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    for key, expected in {
        "rows.-1.y": "5",
        "rows.of=b_c.y": "5",
        "rows.of=a.n=10.y": "4",
        "rows.of=a.1.y": "4",
    }.items():
        assert f">{expected}<" in readme.refresh(f"<!--= a.json {key} .0f --><!--/-->", tmp_path), key
    for key in ("rows.of=c.y", "rows.off=a.y", "rows.of=a.y", "rows.3.y"):  # of=a: two of them
        with pytest.raises(ReproError, match=f"takes {key} from"):
            readme.refresh(f"<!--= a.json {key} .0f --><!--/-->", tmp_path)


def test_a_missing_key_or_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ReproError, match="no 'x'"):
        readme.refresh("<!--= a.json x .1f --><!--/-->", tmp_path)
    (tmp_path / "null.json").write_text('{"x": null}')
    with pytest.raises(ReproError, match="no 'y'"):
        readme.refresh("<!--= null.json x.y .1f --><!--/-->", tmp_path)
    with pytest.raises(ReproError, match="b.json, which is missing"):
        readme.refresh("<!--= b.json x .1f --><!--/-->", tmp_path)


def test_the_clusters_script_is_bash_and_its_command_one_of_ours(tmp_path, monkeypatch, capsys):
    """Run by bash with the scheduler's commands replaced; what would be started on each node we can parse."""
    started = '#!/bin/bash\nprintf "%q " "$@" > started\n'
    cluster.write_job(tmp_path, scontrol="#!/bin/bash\necho node1; echo node2\n", srun=started)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_GPUS_ON_NODE": "8", **slurm}
    command = ["bash", tmp_path / "job.sh", "paper/imagenet64-edm"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (tmp_path / "srun").write_text("#!/bin/bash\nexit 3\n")
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert failed.returncode == 3
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" >> asked\n[ $1 = show ] && echo node1\n')
    # told twice that the time ends, the second time as the training ends, and that it cannot be queued again
    signals = "kill -USR1 $(cat pid); sleep 1; kill -USR1 $(cat pid)"
    for status in [0, 4] * 5:
        (tmp_path / "asked").unlink(missing_ok=True)
        (tmp_path / "srun").write_text(f"#!/bin/bash\n{signals}; exit {status}\n")
        told = subprocess.run(
            ["bash", "-c", "echo $$ > pid; exec bash job.sh paper/imagenet64-edm"],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert told.returncode == status, told.stderr
        first, *again = (tmp_path / "asked").read_text().splitlines()
        assert first == "show hostnames node[1-2]" and set(again) == {"requeue 7"}
    words = shlex.split((tmp_path / "started").read_text())
    assert words[words.index("--rdzv-endpoint") + 1] == "node1:29500"
    assert words[words.index("--nnodes") + 1] == "2" and words[words.index("--nproc-per-node") + 1] == "8"
    ours = words[words.index("-m", words.index("--max-restarts")) + 2 :]
    assert ours == ["train", "paper/imagenet64-edm", "--out", "runs/paper/imagenet64-edm"]
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert main([*ours, "--dry-run"]) == 0
    assert "16, each" in capsys.readouterr().out

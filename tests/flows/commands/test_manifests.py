"""`pusa check` and `pusa list`."""

import pytest

from flows.commands import main


def test_check_names_every_bad_job(short_manifests, capsys):
    folder, run_dir = short_manifests
    text = (
        (folder / "generate.yaml")
        .read_text()
        .replace("box-first.png", "none.png")
        .replace("given: [0, 2, 5]", "given: [9]")
    )
    (folder / "generate.yaml").write_text(text)
    assert main(["check", str(folder / "generate.yaml"), "--run-dir", str(run_dir)]) == 1
    out, err = capsys.readouterr()
    assert (
        "none.png cannot be read" in out
        and "9 is outside the 6 latent frames" in out
        and "text: text_to_video, ok" in out
    )
    _, counted, picture, given, _ = err.splitlines()
    assert "2 of 8 jobs cannot be made" in counted and "none.png cannot be read" in picture and "9 is outside" in given


@pytest.mark.parametrize(
    "what, names",
    [
        ("tasks", "keyframes"),
        ("backbones", "mochi"),
        ("noise-schedules", "linear_quadratic"),
        ("presets", "exact"),
        ("courses", "release(a, b)"),
    ],
)
def test_list(capsys, what, names):
    assert main(["list", what]) == 0
    assert names in capsys.readouterr().out.splitlines()


def test_check_refuses_weights_that_are_not_there(tmp_path, capsys):
    path = tmp_path / "finetune.yaml"
    path.write_text('kind: finetune\nbase: {weights: "builtin:tny"}\n')
    assert main(["check", str(path)]) == 1
    assert "unknown built-in model 'builtin:tny'" in capsys.readouterr().err


def test_check_reports_the_problems_of_the_valid_jobs_too(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(
        'kind: generate\nmodel: {weights: "builtin:huge"}\njobs:\n'
        "  - {id: a, task: text_to_video, width: 70}\n  - {id: b, task: text_to_video, sede: 3}\n"
        "  - {id: c, task: completion, video: none.mp4, given: [99, 0]}\n  - {id: a, task: text_to_video}\n"
        "  - {id: d, task: keyframes, frames: {99: {image: none.png}}}\n"
    )
    assert main(["check", str(tmp_path / "m.yaml")]) == 1
    out, err = capsys.readouterr()
    assert "width 70 is not a multiple" in out and "given 99 is outside" in out
    assert "position 99 is outside" in out and "none.png cannot be read" in out
    assert "did you mean 'seed'" in err and "one of builtin:tiny" in err and "3 of 3 jobs cannot be made" in err

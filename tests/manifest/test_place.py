"""`place` says where the work is done. Whatever is wrong with it is said in one sentence."""

import pytest

from pusa.errors import ManifestError
from pusa.manifest.loading import load_manifest
from pusa.manifest.place import Gpus, Processes, RayCluster

JOBS = "jobs: [{id: a, task: text_to_video}]"


def place_of(tmp_path, text: str, kind: str = "generate"):
    path = tmp_path / "m.yaml"
    path.write_text(f'kind: {kind}\nmodel: {{weights: "builtin:tiny"}}\nplace: {text}\n{JOBS * (kind == "generate")}\n')
    return load_manifest(path, tmp_path).place


@pytest.mark.parametrize("kind", ["generate", "precompute"])
def test_the_places(tmp_path, kind):
    assert place_of(tmp_path, "local", kind) == "local"
    assert place_of(tmp_path, "{gpus: [0, 2]}", kind) == Gpus(gpus=(0, 2))
    assert place_of(tmp_path, "{processes: 2}", kind) == Processes(processes=2)
    for address in ("auto", "local", "head-1.example:6379", '"[::1]:6379"'):
        assert place_of(tmp_path, f"{{ray: {address}, slots: 16}}", kind) == RayCluster(
            ray=address.strip('"'), slots=16
        )


@pytest.mark.parametrize(
    "text",
    ["gpu", "", "[0]", "3", "{}", "{gpus: []}", "{gpus: [0, 0]}", "{gpus: [-1]}", '{gpus: ["0"]}', "{gpus: 0}",
     "{gpu: [0]}", "{gpus: [true]}", "{processes: 0}", "{processes: 1.0}", "{processes: 300}",
     "{gpus: [0], processes: 1}", "{ray: auto}", "{slots: 2}",
     "{ray: auto, slots: 0}", "{ray: auto, slots: 2000}", '{ray: auto, slots: "2"}', "{ray: 'ray://a:1', slots: 1}",
     "{ray: host, slots: 1}", "{ray: 'a:1\n', slots: 1}", "{ray: 'a:1 b', slots: 1}", "{ray: true, slots: 1}",
     "{ray: auto, slots: 1, gpus: [0]}"],
)  # fmt: skip
def test_any_other_place_is_refused_in_one_sentence(tmp_path, text):
    with pytest.raises(ManifestError) as error:
        place_of(tmp_path, text)
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith("  place: got ") and "expected local, {gpus: [0, 2]}" in line and "{processes: 2}" in line

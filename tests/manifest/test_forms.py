"""Paths of a manifest whose Unicode normal form is not that of the files: NFC, as typed, and NFD, as macOS writes."""

import logging
import unicodedata

import pytest

from pusa.manifest.models import IngestManifest
from tests.manifest.conftest import FREE_NAMES, fill, ids

pytestmark = FREE_NAMES
NFC, NFD = (unicodedata.normalize(form, "été 한") for form in ("NFC", "NFD"))
THIRD = NFD[:2] + NFC[1:]  # the first é in NFD, the other characters in NFC
FORMS = [(NFC, NFD), (NFD, NFC)]


@pytest.mark.parametrize("written, there", FORMS)
def test_a_path_leads_to_the_file_in_another_form_and_is_logged_once(load, tmp_path, caplog, written, there):
    fill(tmp_path, f"{there}/{there}.png", f"{there}/{NFC} other.png")
    job = f"{{id: a, task: image_to_video, image: '{written}/{written}.png', sweep: {{seed: [1, 2, 3]}}}}"
    with caplog.at_level(logging.WARNING):
        assert {job.image for job in load(job)} == {tmp_path / there / f"{there}.png"}
    (line,) = caplog.messages
    assert "is used, which differs only by its Unicode normal form" in line
    assert IngestManifest(source=str(tmp_path / written)).source == str(tmp_path / there)


def test_an_equal_name_comes_first_and_two_others_are_an_error(load, refused, tmp_path):
    job = f"{{id: a, task: image_to_video, image: '{NFC}.png'}}"
    fill(tmp_path, f"{NFD}.png", f"{THIRD}.png")
    (line,) = refused(job)
    assert line.startswith("jobs.0.image: ") and "which differ only by their Unicode normal form" in line
    assert all(ascii(f"/{name}.png")[1:-1] in line for name in (NFC, NFD, THIRD))
    fill(tmp_path, f"{NFC}.png")
    assert load(job)[0].image.name == f"{NFC}.png"


def test_a_path_to_nothing_stays_as_it_is_written(load, tmp_path):
    fill(tmp_path, f"{NFD}.txt", f"{NFD}/a.png")
    (job,) = load(f"{{id: a, task: image_to_video, image: '{NFC}/b.png'}}")
    assert job.image == tmp_path / NFC / "b.png"


@pytest.mark.parametrize("written, there", FORMS)
def test_a_prompt_file_is_found_in_another_form(load, refused, tmp_path, written, there):
    fill(tmp_path, f"{there}.txt")
    job = f"{{id: a, task: text_to_video, prompt_file: '{written}.txt'}}"
    assert load(job)[0].prompt == "some words"
    fill(tmp_path, f"{THIRD}.txt")
    (line,) = refused(job)
    assert "prompt_file" in line and "Unicode normal form" in line


GLOBS = {  # pattern -> the stems that it matches of ete-a and of the name in the other form
    "x/{}*.png": {f"{NFC}-a"}, "*/{}-[ab].png": {f"{NFC}-a"}, "**/{}-?.png": {f"{NFC}-a"}, "{}/*.png": {"plain"},
    "x/[é]*.png": {f"{NFC}-a"}, "x/[!é]*.png": {"ete-a"}, "x/?t?*-a.png": {f"{NFC}-a", "ete-a"}, "x/e*.png": {"ete-a"},
    "x/*.png": {f"{NFC}-a", "ete-a"}, "**/*.png": {f"{NFC}-a", "ete-a", "plain", "hidden"},
}  # fmt: skip


@pytest.mark.parametrize("written, there", FORMS)
@pytest.mark.parametrize("pattern", GLOBS)
def test_a_glob_matches_characters_whatever_their_form(load, tmp_path, pattern, written, there):
    fill(
        tmp_path,
        f"x/{there}-a.png",
        "x/ete-a.png",
        f"{there}/plain.png",
        f"x/.{there}/hidden.png",
        f"y/{there}/hidden.png",
    )
    jobs = load(f"{{id: g, task: image_to_video, image: '{pattern.format(written)}'}}")
    assert {unicodedata.normalize("NFC", job.image.stem) for job in jobs} == GLOBS[pattern]
    assert all(job.image.is_file() for job in jobs)


@pytest.mark.parametrize("written, there", FORMS)
def test_a_name_with_the_characters_of_a_glob_is_no_glob_in_another_form(load, tmp_path, written, there):
    fill(tmp_path, f"{there}[1].png")
    (job,) = load(f"{{id: a, task: image_to_video, image: '{written}[1].png'}}")
    assert (job.id, job.image.name) == ("a", f"{there}[1].png")


def test_files_pair_whatever_their_forms_and_ids_do_not_depend_on_them(load, tmp_path):
    job = "{id: g, task: image_to_video, image: '%s/*.png', prompt_file: '%s/*.txt'}"
    fill(tmp_path, f"1/{NFD}.png", f"1/{NFC}.txt", f"2/{NFC}.png", f"2/{NFC}.txt")
    ((first,), (second,)) = (load(job % (folder, folder)) for folder in "12")
    assert first.id == second.id and first.image.name == f"{NFD}.png" and first.prompt == "some words"


def test_names_and_swept_values_that_differ_only_by_form_are_a_clash(refused, tmp_path):
    fill(tmp_path, f"s/{NFC}.png", f"s/{NFD}.png")
    (line,) = refused("{id: g, task: image_to_video, image: 's/*.png'}")
    assert "'s/*.png' matches files that differ only in their Unicode normal form: " in line
    assert all(ascii(name)[1:-1] in line for name in (NFC, NFD))
    (line,) = refused(f"{{id: g, task: text_to_video, sweep: {{prompt: ['{NFC}', '{NFD}']}}}}")
    assert "make the same part of an id" in line


def test_ids_of_names_in_nfc_are_those_of_earlier_versions(load, tmp_path):
    fill(tmp_path, f"s/{NFC}.png")
    assert ids(load("{id: g, task: image_to_video, image: 's/*.png'}")) == ["g-_t___.ff0c91"]

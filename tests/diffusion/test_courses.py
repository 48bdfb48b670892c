"""Courses and matrices of levels: how they are written, what is refused, and what the sampler makes of them."""

import os
import pickle
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pusa.diffusion.courses import (
    MAX_ROWS,
    ROUNDING,
    is_matrix,
    parse_course,
    read_levels,
    read_matrix,
    release,
    require_fit,
    starts_of,
)
from pusa.diffusion.noise_schedules.linear_quadratic import sigmas
from pusa.diffusion.sampler import Given, Pinned, deciding_levels, denoise, start_state
from pusa.errors import ConditionError

MATRIX = [[1, 0.4], [0.5, 0.4], [0, 0]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schedule", "schedule"),
        (" staircase( 2 )", "staircase(2)"),
        ("release(0.40,.5)".replace(",.", ", 0."), "release(0.4, 0.5)"),
        ("release(1,1)", "release(1, 1)"),
    ],
)
def test_a_course_has_one_spelling(text, expected):
    assert read_levels(text) == expected and read_levels(expected) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("stairs(2)", "unknown levels 'stairs(2)'; expected schedule, staircase(k), release(a, b), a list of rows"),
        ("", "unknown levels"),
        ("schedule(1)", "'schedule(1)' is not written as schedule"),
        ("staircase", "is not written as staircase(k)"),
        ("staircase(1.5)", "k is 1.5; expected a whole number"),
        ("staircase(-1)", "is not written as staircase(k)"),
        ("staircase(999999999)", "k is 1e+09"),
        ("release(0.4)", "is not written as release(a, b)"),
        ("release(0, 0.5)", "a is 0; expected a number above 0, at most 1"),
        ("release(0.4, 1.5)", "b is 1.5"),
        ("release(nan, 1)", "is not written as"),
        ("release(1e0, 1)", "is not written as"),
        ("release(0.4", 'no closing bracket; inside [ ] or { } put a course in quotes: "release(a, b)"'),
        ("release(\u0660, 1)", "is not written as"),
        (5, "got 5; expected schedule"),
        ([1, 0], "got [1, 0]; expected schedule"),
        ([], "got []"),
        ([[1]], "1 rows of 1 levels; expected 2 to 2,001 rows"),
        ([[], []], "2 rows of 0 levels"),
        ([[1, 1], [0]], "row 1 has 1 levels and row 0 has 2"),
        ([[1, 1], [0, "0"]], "row 1, frame 1: the level is '0'; expected 0 to 1"),
        ([[1, True], [0, 0]], "row 0, frame 1: the level is True"),
        ([[1, float("nan")], [0, 0]], "row 0, frame 1: the level is nan"),
        ([[1, float("inf")], [0, 0]], "row 0, frame 1: the level is inf"),
        ([[10**5000, 1], [0, 0]], "row 0, frame 0: the level is a number of thousands of digits"),
        ([[1, 1], [0.5, 0.25], [0.5, 0.5], [0, 0]], "row 2, frame 1: the level rises from 0.25 to 0.5"),
        ([[1, 1], [0, 0.1]], "row 1, frame 1: the last level is 0.1; expected 0"),
        ([[0]] * (MAX_ROWS + 1), "2,002 rows"),
        ([[0] * 200_000] * 2, "2 rows of 200,000 levels"),
    ],
)
def test_what_is_no_course_and_no_matrix_is_refused_with_its_place(value, words):
    with pytest.raises(ValueError) as error:
        read_levels(value)
    assert words in str(error.value) and len(str(error.value)) < 300


@given(st.text(max_size=30) | st.lists(st.lists(st.floats() | st.integers() | st.none(), max_size=3), max_size=4))
def test_anything_else_is_refused_or_read_to_what_reads_the_same(value):
    try:
        read = read_levels(value)
    except ValueError:
        return
    assert read_levels(read) == read


def save(path: Path, array, **options) -> Path:
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, **options)
    return path


@pytest.mark.parametrize("kind", ["<f4", ">f8", "<f2"])
def test_a_file_is_read_as_the_rows_that_it_holds(tmp_path, kind):
    for order in "CF":
        path = save(tmp_path / f"{order}.npy", np.asarray(MATRIX, kind, order=order))
        np.testing.assert_allclose(read_matrix(path), MATRIX, atol=1e-3)
    path = save(path, np.asarray([[1, 1], [0, 0]]))  # it was changed
    assert read_matrix(path) == ((1, 1), (0, 0))


def hostile_files(folder: Path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "evil"),)

    save(folder / "object.npy", np.array([[Evil()]], object))
    (folder / "pickle.npy").write_bytes(pickle.dumps(Evil()))
    with zipfile.ZipFile(folder / "zip.npy", "w") as archive:
        archive.writestr("arr_0.npy", b"")
    good = save(folder / "good.npy", np.asarray(MATRIX)).read_bytes()
    (folder / "torn.npy").write_bytes(good[:-3])
    (folder / "empty.npy").touch()
    (folder / "huge.npy").write_bytes(good.replace(b"(3, 2)", b"(3, 9**9)"[:6]))
    shapes = (
        b"{'descr': '<f8', 'fortran_order': False, 'shape': %s}" % shape for shape in (b"(99999999, 99)", b"(2, -2)")
    )
    for number, header in enumerate((b"(" * 4000, *shapes, b"'''", b"")):
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64
        (folder / f"header{number}.npy").write_bytes(content)
    save(folder / "cube.npy", np.zeros((2, 2, 2)))
    save(folder / "complex.npy", np.zeros((2, 2), complex))
    save(folder / "text.npy", np.zeros((2, 2), "<U3"))
    save(folder / "records.npy", np.zeros((2, 2), [("a", "<f8")]))
    save(folder / "large.npy", np.zeros((2001, 100)))
    save(folder / "nan.npy", np.full((2, 2), np.nan))
    (folder / "folder.npy").mkdir()
    os.mkfifo(folder / "pipe.npy")
    (folder / "loop.npy").symlink_to("loop.npy")
    (folder / "good.npy").unlink()
    return sorted(folder.glob("*.npy"))


def test_hostile_files_are_refused_and_run_nothing(tmp_path):
    paths = hostile_files(tmp_path)
    assert len(paths) == 20
    for path in [*paths, tmp_path / "missing.npy"]:
        with pytest.raises(ValueError) as error:
            read_matrix(path)
        assert str(error.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("levels", "multipliers", "words"),
    [
        (((1.0, 1.0), (0.0, 0.0)), [1, 1, 1], "rows of 2 levels; expected 3"),
        (((1.0, 0.9), (0.0, 0.0)), [1, 1], "row 0, frame 1: the level is 0.9; expected 1, since it is free"),
        (((1.0, 0.9), (0.0, 0.0)), [1, 0.2], "is 0.9; expected 0.2, since its multiplier is 0.2"),
        ("release(0.4, 0.5)", [1, 1], "for given frames, and none is given"),
        ("release(0.4, 0.5)", [0, 0.2], "latent frame 1 has multiplier 0.2; expected 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_frames_is_refused(levels, multipliers, words):
    with pytest.raises(ConditionError) as error:
        require_fit(levels, multipliers)
    assert words in str(error.value)


def test_frames_of_multiplier_0_may_follow_any_course_and_wait_for_nobody():
    require_fit(((0.3, 1.0), (0.2, 1.0), (0.0, 0.0)), [0, 1])
    require_fit(((0.2 + ROUNDING / 2, 1.0), (0.0, 0.0)), [0.2, 1])
    assert starts_of("staircase(2)", [0, 1, 0.5, 0]) == (0, 2, 4, 0)
    assert starts_of("release(1, 1)", [0, 1]) == starts_of("staircase(0)", [0, 1]) == (0, 0)


@pytest.mark.parametrize("steps", [1, 4, 10, 64])
@pytest.mark.parametrize(("a", "b"), [(0.4, 0.5), (1.0, 0.3), (0.8, 1.0), (0.1, 0.01)])
def test_released_frames_fall_from_a_to_0_at_the_share_b_of_the_steps(steps, a, b):
    sigma = sigmas(steps).tolist()
    made = release(sigma, a, b)
    assert made[0] == pytest.approx(a) and len(made) == steps + 1
    for i, level in enumerate(made):
        assert level == (pytest.approx(a * (1 - i / (b * steps)) * sigma[i], abs=1e-9) if i < b * steps - 1e-6 else 0)
    assert all(now >= then for now, then in pairwise(made))
    assert parse_course(f"release({a}, {b})") == ("release", (a, b))
    assert is_matrix(MATRIX) and is_matrix("a.npy") and not is_matrix("release(1, 1)") and not is_matrix(None)


X0, NOISE = torch.randn(2, 12, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_a_pinned_frame_is_at_its_level_before_each_step_and_exact_at_the_end():
    start, m_F = start_state([Given(X0[:, [0, 2]], (0, 2), (0.0, 0.3))], NOISE)
    steps = 6
    matrix = sigmas(steps)[:, None] * m_F
    matrix[:, 0] = torch.tensor(release(sigmas(steps).tolist(), 0.8, 0.5))
    matrix[1, 3] = matrix[0, 3]  # does not move in the first step
    pinned = Pinned(start[None], NOISE[None], (m_F == 0)[None])
    z, seen = pinned.at(start[None], matrix[0]), []

    def wild(z, sigma_BF):
        seen.append((z.clone(), sigma_BF.clone()))
        return torch.randn_like(z)

    states = list(denoise(wild, z, matrix, pinned=pinned))
    for (z, sigma), row in zip(seen, matrix, strict=False):
        assert torch.equal(sigma[0], row)
        torch.testing.assert_close(z[0, :, 0], (1 - row[0]) * X0[:, 0] + row[0] * NOISE[:, 0])
    assert torch.equal(states[-1][1][0, :, 0], X0[:, 0]) and not torch.equal(states[-1][1][0, :, 2], X0[:, 2])
    assert all(torch.equal(x0[0, :, 0], X0[:, 0]) for _, _, x0 in states)
    assert torch.equal(states[0][1][0, :, 3], NOISE[:, 3])
    for first in range(1, steps):  # a later start gives the same frames that the network sees
        (_, later, _) = next(
            iter(denoise(lambda z, sigma: z, states[first - 1][1], matrix, range(first, steps), pinned))
        )
        torch.testing.assert_close(later[0, :, 0], pinned.at(later, matrix[first + 1])[0, :, 0])


def test_the_frames_that_a_step_denoises_decide_which_transformer_makes_it():
    levels = torch.tensor([[0.9, 1.0, 1.0], [0.9, 0.6, 1.0], [0.9, 0.6, 1.0], [0.0, 0.3, 0.5], [0.0, 0.0, 0.0]])
    own = deciding_levels(levels, torch.tensor([True, False, False]))
    assert own.amax(1).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])
    own = deciding_levels(levels, torch.tensor([True, False, True]))
    assert own[0].tolist() == [0, 1, 0] and own[1].max() == 1  # in step 1 nothing is denoised: the highest level of all
    assert own[2].amax() == pytest.approx(0.6)

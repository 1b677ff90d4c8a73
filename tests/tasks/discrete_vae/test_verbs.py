from __future__ import annotations

import pytest
import torch
from matplotlib.image import imread

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.discrete_vae.images import ImageData
from gfnem.tasks.discrete_vae.verbs import generate, reconstruct
from tests.tasks.discrete_vae.tiny import images, make_model, make_policy


@pytest.fixture
def em() -> EM:
    data = ImageData(images(4), images(4), images(20), "binary")
    return EM(make_model(), GFlowNetPosterior(make_policy()), data, m_steps=1)


def test_generate_writes_the_pictures_and_says_where(em, tmp_path):
    one, many = str(tmp_path / "one.png"), str(tmp_path / "many.png")
    assert list(generate(em, 16, one)) == [f"16 images drawn from the model: {one}"]
    list(generate(em, 20, many))
    # Twenty images take two lines of sixteen.
    assert imread(many).shape[0] > 1.5 * imread(one).shape[0]
    assert imread(many).shape[1] == imread(one).shape[1]


def test_generate_draws_what_the_seed_says(em, tmp_path):
    pictures = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        list(generate(em, 8, str(tmp_path / "samples.png")))
        pictures.append((tmp_path / "samples.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_reconstruct_shows_the_first_test_images(em, tmp_path):
    file = str(tmp_path / "reconstructions.png")
    (line,) = reconstruct(em, file)
    assert line == f"the first test images and their reconstructions: {file}"
    # An image of 0.55 inches lies 0.25 from the left, under a margin and a title.
    x, y = round(150 * (0.25 + 0.55 / 8)), round(150 * (0.25 + 0.26 + 0.55 / 8))
    corner = imread(file)[y, x, :3].tolist()
    assert corner == [float(em.data.test.pixels[0, 0, 0, 0])] * 3


def test_pictures_that_cannot_be_made_are_refused(em, tmp_path):
    with pytest.raises(UserError, match="n is 0; it must be at least 1"):
        list(generate(em, 0))
    with pytest.raises(UserError, match="n is 1001; a picture holds 1000 images at most"):
        list(generate(em, 1001))
    missing = tmp_path / "missing" / "samples.png"
    with pytest.raises(UserError, match=f"file={missing} cannot be written: No such file"):
        list(generate(em, 1, str(missing)))
    with pytest.raises(UserError, match="no known format: end it in .png, .pdf or .svg"):
        list(reconstruct(em, str(tmp_path / "samples.txt")))

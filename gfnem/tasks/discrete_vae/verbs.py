"""What the command line does with a trained discrete VAE: `gfnem generate`, `gfnem reconstruct`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.files import user_path
from gfnem.tasks.discrete_vae.evaluate import prior_samples, reconstructions
from gfnem.tasks.discrete_vae.images import ImageData
from gfnem.tasks.discrete_vae.model import DiscreteVAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 1_000  # images in a picture


def generate(em: EM, n: int = 16, file: str = "samples.png") -> Iterator[str]:
    """Write a picture of images drawn from the model, and say where it is.

    Args:
        n: how many images, 1,000 at most.
        file: the picture; its name says the format, as in .png, .pdf or .svg.

    Raises:
        UserError: n is out of its range, or the file cannot be written.
    """
    if n < 1:
        raise UserError(f"n is {n}; it must be at least 1")
    if n > MOST:
        raise UserError(f"n is {n}; a picture holds {MOST} images at most")
    _save(prior_samples(_model(em), n), file)
    yield f"{n} images drawn from the model: {file}"


def reconstruct(em: EM, file: str = "reconstructions.png") -> Iterator[str]:
    """Write a picture of test images and what their codes keep of them, and say where it is.

    Args:
        file: the picture; its name says the format, as in .png, .pdf or .svg.

    Raises:
        UserError: the file cannot be written.
    """
    assert isinstance(em.data, ImageData)
    _save(reconstructions(_model(em), em.posterior, em.data.test), file)
    yield f"the first test images and their reconstructions: {file}"


def _model(em: EM) -> DiscreteVAE:
    assert isinstance(em.model, DiscreteVAE)
    return em.model


def _save(figure: Figure, file: str) -> None:
    try:
        figure.savefig(user_path(file), dpi=150)
    except OSError as error:
        raise UserError(f"file={file} cannot be written: {error.strerror}") from None
    except ValueError:
        # Of all that matplotlib could complain of, only the format is not ours.
        raise UserError(f"file={file} has no known format: end it in .png, .pdf or .svg") from None

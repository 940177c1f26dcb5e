"""Every published family of checkpoints, opened from its folder, predicts as torch does."""

import families
import numpy as np
import pytest
import torch
from tiny_model import quick_compile  # noqa: F401

from jaxpercept import PerceptionPipeline
from jaxpercept.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compile")

KNOWN = {name: build for name, build in families.FAMILIES.items() if name != "stable_diffusion"}


@pytest.fixture(scope="module", params=sorted(KNOWN))
def pair(request, tmp_path_factory):
    """A checkpoint on disk with torch's answer, and the same opened here."""
    seed = int(np.random.default_rng().integers(2**31))
    print("seed", seed)
    family = KNOWN[request.param](tmp_path_factory.mktemp("family") / "checkpoint", seed)
    return family, open_family(family)


def open_family(family, **options):
    named = {"task": family.task} if family.needs_task else {}
    if family.method == "e2e_ft" and family.modules["unet"].config.in_channels == 4:
        named["family"] = "e2e_ft"
    return PerceptionPipeline.from_pretrained(
        family.folder, base=family.base_folder, **named, **options
    )


def noise_for(family, pipe, rng, size, resolution, members):
    """Noise in diffusers' layout, for a model that starts from it."""
    if not pipe.perception.recipe.draws_noise:
        return None
    factor = pipe.perception.model.downscale
    long = resolution or max(size)
    cells = [-(-(edge * long // max(size)) // factor) for edge in size]
    channels = family.modules["unet"].config.out_channels
    return rng.standard_normal((members, channels, *cells), np.float32)


@pytest.mark.parametrize(
    ("size", "resolution"), [((48, 64), 64), ((37, 51), 0), ((45, 29), 32)], ids=str
)
def test_prediction_is_that_of_torch(pair, rng, size, resolution):
    family, pipe = pair
    image = rng.random((*size, 3), np.float32)
    # The old index says neither steps nor resolution.
    options = family.settings | {"processing_resolution": resolution}
    noise = noise_for(family, pipe, rng, size, resolution, 1)
    wanted = dict(options)
    if noise is not None:
        wanted["latents"] = torch.from_numpy(noise)
    if family.method.startswith("lotus"):
        wanted["padded"] = True
    theirs = family.predict(image, **wanted)
    ours = pipe(image, latents=noise, **options)
    # E2E-FT's scripts stretch depth to [0, 1], which an affine-invariant map has no need of.
    expected = theirs.raw if family.method == "e2e_ft" else theirs.prediction
    expected = theirs.prediction if expected is None else expected
    np.testing.assert_allclose(ours.prediction, expected, atol=1e-4)

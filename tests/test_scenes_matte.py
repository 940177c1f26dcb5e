"""Scenes with a matte: opacity explains the picture, and is the share of each pixel covered."""

import numpy as np
import pytest
from scipy import ndimage
from test_scenes import first_hit, rays, reference_depth
from test_scenes_subjects import Renderer, indices, main_thing

from jaxpercept.data import scenes
from jaxpercept.data.scenes import matting
from jaxpercept.data.scenes.casting import view_of
from jaxpercept.data.scenes.palette import Draws
from jaxpercept.data.scenes.plan import Matter, Strands
from jaxpercept.data.scenes.raster import View, to_camera


def matte_of(index, **options):
    """(layout, parts, matte) from the parts that `render` is made of."""
    draws = Draws(0, index)
    layout = scenes.compose(draws, subject="matte")
    parts = layout.builder.finish(1 + len(layout.recess_walls))
    view = view_of(layout.camera, options.get("height", 96), options.get("width", 128))
    with np.errstate(invalid="ignore"):
        return (
            layout,
            parts,
            matting.composite(layout, parts, to_camera(parts.solids, view), view, draws),
        )


def test_alpha_explains_the_picture_exactly(rng):
    for number in indices(rng, 10):
        *_, matte = matte_of(number)
        scene = scenes.render(number, subject="matte")
        np.testing.assert_array_equal(scene["alpha"], matte.alpha)
        alpha, front, back = (
            part.astype(np.float64) for part in (matte.alpha, matte.foreground, matte.background)
        )
        mixed = alpha * front + (1 - alpha) * back
        assert np.abs(scene["rgb"] - mixed).max() < 0.501
        np.testing.assert_array_equal(
            scene["rgb"][alpha[:, :, 0] == 0], matte.background[alpha[:, :, 0] == 0]
        )
        assert ((alpha > 0) & (alpha < 1)).mean() > 0.005


def test_opacity_of_opaque_things_is_the_share_of_the_pixel_they_cover(rng):
    render, points, found, errors = Renderer(subject="matte"), 300, 0, []
    for number in indices(rng, 200):
        matter = scenes.compose(Draws(0, number), subject="matte").subject.matter
        if matter.soft or len(matter.strands.root):
            continue
        scene, (layout, parts, _) = render(number), main_thing(render, number)
        alpha = scene["alpha"][:, :, 0]
        pixels = rng.permutation(np.argwhere((alpha > 0) & (alpha < 1)))[:12]
        rows, columns = (np.repeat(part, points) + rng.uniform(-0.5, 0.5, points * len(pixels))
                         for part in pixels.T)  # fmt: skip
        origin, direction = rays(scene, layout, rows, columns)
        own = np.min([first_hit(origin, direction, k, parts)
                      for k in range(matter.first, len(parts.instance))], axis=0)  # fmt: skip
        share = np.isfinite(own).reshape(-1, points).mean(1)
        errors.extend(share - alpha[tuple(pixels.T)])
        found += 1
        if found == 5:
            break
    assert found
    # Sixteen points a pixel are at most this far off at an edge.
    assert np.abs(errors).mean() < 0.07
    assert np.abs(np.mean(errors)) < 0.03
    assert np.abs(errors).max() < 0.3


def test_away_from_the_subject_the_scene_is_as_without_it(rng):
    render = Renderer(subject="matte")
    wrong = 0
    for number in indices(rng, 6):
        scene, (layout, parts, main) = render(number), main_thing(render, number)
        matter = layout.subject.matter
        assert (parts.instance[matter.first :] == main).all()
        assert (parts.instance[: matter.first] != main).all()
        few = parts._replace(instance=parts.instance[: matter.first])
        for where, of_main in ((scene["alpha"] < 0.5, False), (scene["alpha"] >= 0.5, True)):
            pixels = rng.permutation(np.argwhere(where[:, :, 0]))[:100]
            truth = reference_depth(scene, layout, few, *pixels.T)
            error = np.abs(scene["depth"][(*pixels.T, 0)] - truth) / truth > 2e-4
            assert ((scene["instance"][tuple(pixels.T)] == main) == of_main).all()
            wrong += 0 if of_main else int(error.sum())
    assert wrong <= 3


def test_alpha_of_a_coarse_picture_is_the_mean_of_the_fine_one(rng):
    for number in indices(rng, 4):
        coarse = scenes.render(number, height=48, width=64, subject="matte")["alpha"]
        fine = scenes.render(number, height=192, width=256, subject="matte")["alpha"]
        mean = fine.reshape(48, 4, 64, 4).mean((1, 3))
        # The rim of smoke and the hairs of a fiftieth of a pixel are less exact.
        assert np.abs(mean - coarse[:, :, 0]).mean() < 0.03


def test_a_strand_covers_its_area_and_has_no_gaps(rng):
    view = View(np.array([0.0, 5.0, 0.0]), np.eye(3), np.zeros(400, np.float32),
                np.zeros(300, np.float32), (400.0, 400.0), (200.0, 150.0))  # fmt: skip
    ends = rng.uniform(-0.3, 0.3, (2, 3)) + np.array([0, 5, 1.5])
    ends[:, 2] = 1.5
    ends[1, 0] = ends[0, 0] + 0.3
    length = np.linalg.norm(ends[1] - ends[0]) * 400 / 1.5
    for radius in (0.02, 0.0005):
        levels = np.zeros((300, 400), np.uint8)
        strand = Strands(ends[:1], ends.mean(0)[None], ends[1:], np.array([radius]))
        matting.draw_strands(levels, strand, view)
        _, count = ndimage.label(levels, np.ones((3, 3)))
        assert count == 1
        wide = 2 * radius * 400 / 1.5 * (1 - matting.TAPER / 2)
        # The narrow one's levels are rounded to sixteenths.
        assert levels.sum() / matting.FULL == pytest.approx(
            length * wide, rel=0.12 if radius > 0.01 else 0.4
        )
        assert levels.any(0).sum() == pytest.approx(0.3 * 400 / 1.5, abs=2 * wide + 3)


def test_glass_is_opaquer_at_its_rim_and_smoke_vanishes_there():
    facing = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(48, 0)
    none = Strands(*(np.zeros((0, 3)),) * 3, np.zeros(0))
    opacities = {}
    for kind in ("glass", "cloud", "veil"):
        matter = Matter(0, 0, [(kind, 0.4)], none)
        number = np.zeros(facing.shape, np.int32)
        opacities[kind] = matting._opacity(matter, number, facing, facing.shape).mean(0)
    assert (np.diff(opacities["glass"]) < 0).all()
    assert opacities["glass"][-1] == pytest.approx(0.4)
    assert opacities["glass"][0] < 1
    assert (np.diff(opacities["cloud"]) > 0).all()
    assert opacities["cloud"][0] == 0
    np.testing.assert_allclose(opacities["veil"], 0.4, rtol=1e-6)


@pytest.mark.parametrize("slope", [1, 1e6], ids=["soft", "hard"])
@pytest.mark.parametrize("height", [40, 100])
def test_trimap_is_the_dilation_of_what_is_between(rng, height, slope):
    alpha = ndimage.gaussian_filter(rng.standard_normal((height, 130)), 7)
    alpha = np.clip(alpha / alpha.std() * slope, 0, 1).astype(np.float32)
    found = matting.trimap(alpha[:, :, None])
    assert found.dtype == np.uint8
    reach = max(1, round(height / 50))
    grow = lambda mask: ndimage.binary_dilation(mask, np.ones((2 * reach + 1,) * 2))  # noqa: E731
    unknown = grow((alpha > 0) & (alpha < 1)) | (grow(alpha == 0) & grow(alpha == 1))
    expected = np.where(unknown, 128, np.where(alpha == 1, 255, 0))
    np.testing.assert_array_equal(found[:, :, 0], expected)
    assert (expected == 128).any()
    assert (expected == 0).any()

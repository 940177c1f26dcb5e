"""Scenes with a person: keypoints, their visibility, sides, and plausible poses."""

import numpy as np
import pytest
from scipy import ndimage
from test_scenes import reference_depth
from test_scenes_subjects import Renderer, indices, main_thing

from jaxpercept.data import scenes
from jaxpercept.data.joints import KEYPOINTS
from jaxpercept.data.scenes.figure import SIDES, draw_pose
from jaxpercept.data.scenes.palette import Draws


def camera_points(layout, points):
    camera = layout.camera
    axes = np.array([camera.right, camera.up, camera.forward])
    return (points - np.array(camera.position)) @ axes.T


@pytest.mark.parametrize("furnished", [False, True])
def test_keypoints_are_the_projected_joints_and_visibility_is_that_of_a_ray(furnished, rng):
    render = Renderer(subject="person", furnished=furnished)
    levels = []
    for number in indices(rng, 12):
        scene, (layout, parts, _) = render(number), main_thing(render, number)
        joints, found = layout.subject.joints, scene["keypoints"]
        x, y, z = camera_points(layout, joints[:, :3]).T
        fx, fy, cx, cy = scene["intrinsics"].astype(np.float64)
        place = np.stack([fx * x / z + cx, cy - fy * y / z], 1)
        inside = ((place >= 0) & (place < [128, 96])).all(1) & (z > 0)
        near_edge = (np.abs(place) < 1e-3).any(1) | (np.abs(place - [128, 96]) < 1e-3).any(1)
        np.testing.assert_array_equal((found[:, 2] > 0)[~near_edge], inside[~near_edge])
        assert (found[found[:, 2] == 0] == 0).all()
        kept = found[:, 2] > 0
        np.testing.assert_allclose(found[kept, :2], place[kept], atol=2e-3)
        columns, rows = np.floor(found[kept, :2]).astype(int).T
        seen = reference_depth(scene, layout, parts, rows, columns)
        margin = seen - (z - joints[:, 3])[kept]
        clear = np.abs(margin) > 1e-3
        np.testing.assert_array_equal(found[kept, 2][clear], np.where(margin >= 0, 2, 1)[clear])
        levels.extend(found[:, 2].tolist())
    assert {1.0, 2.0} <= set(levels)


def test_visible_keypoints_lie_on_the_person(rng):
    on = []
    for number in indices(rng, 20):
        scene = scenes.render(number, subject="person")
        *_, main = main_thing(Renderer(subject="person"), number)
        mask = ndimage.binary_dilation(scene["instance"] == main)
        left, top, right, bottom = scene["box"].astype(int)
        expected = np.zeros_like(mask)
        expected[top:bottom, left:right] = True
        mine = scene["instance"] == main
        assert not (mine & ~expected).any()
        assert mine[top].any() and mine[bottom - 1].any()  # noqa: PT018
        assert mine[:, left].any() and mine[:, right - 1].any()  # noqa: PT018
        x, y, _ = scene["keypoints"][scene["keypoints"][:, 2] == 2].astype(int).T
        on.extend(mask[y, x])
    assert np.mean(on) > 0.97


def test_left_and_right_are_the_persons_own(rng):
    """By the face, which looks ahead, and by the colours of the trousers."""
    name = {keypoint: number for number, keypoint in enumerate(KEYPOINTS)}
    warmer = []
    for number in indices(rng, 40):
        scene = scenes.render(number, subject="person")
        layout, *_ = main_thing(Renderer(subject="person"), number)
        joints = layout.subject.joints[:, :3]
        ahead = joints[name["nose"]] - joints[[name["left_ear"], name["right_ear"]]].mean(0)
        # The world has x right, y up and z ahead.
        right = np.cross([0.0, 1.0, 0.0], ahead)
        assert right @ (joints[name["right_ear"]] - joints[name["left_ear"]]) > 0
        assert right @ (joints[name["right_shoulder"]] - joints[name["left_shoulder"]]) > 0
        eyes = scene["keypoints"][[name["left_eye"], name["right_eye"]]]
        away = camera_points(layout, np.array([ahead + layout.camera.position]))[0, 2]
        if (eyes[:, 2] == 2).all() and away < -0.05:  # they face us
            assert eyes[0, 0] > eyes[1, 0]
        knees = scene["keypoints"][[name["left_knee"], name["right_knee"]]]
        if (knees[:, 2] == 2).all():
            x, y, _ = knees.astype(int).T
            red, _, blue = scene["rgb"][y, x].astype(float).T
            warmer.append((red - blue)[0] > (red - blue)[1])
    assert len(warmer) > 5
    assert np.mean(warmer) > 0.85


def test_poses_are_plausible(rng):
    postures = set()
    for number in rng.integers(0, 2**31, 200).tolist():
        pose = draw_pose(Draws(0, number))
        postures.add(pose.posture)
        at = {name: np.array(point) for name, point in pose.joints.items()}
        assert min(point[1] for point in at.values()) > 0.07
        assert min(at["left_ankle"][1], at["right_ankle"][1]) == pytest.approx(0.085 * pose.size)
        assert 1.0 < pose.height < 2.3
        assert (pose.seat > 0.2) == (pose.posture == "sitting")
        for side, sign in SIDES.items():
            hip, knee, ankle = (at[f"{side}_{part}"] for part in ("hip", "knee", "ankle"))
            shoulder, elbow, wrist = (at[f"{side}_{n}"] for n in ("shoulder", "elbow", "wrist"))
            for a, b, length in ((hip, knee, 0.43), (knee, ankle, 0.41), (shoulder, elbow, 0.285),
                                 (elbow, wrist, 0.25)):  # fmt: skip
                assert np.linalg.norm(a - b) == pytest.approx(length * pose.size, rel=1e-9)
            thigh, shin = knee - hip, ankle - knee
            # Knees bend backwards: the shin is turned from the thigh towards the person's back.
            assert thigh[1] * shin[2] - thigh[2] * shin[1] > -1e-9
            assert sign * hip[0] > 0
            assert sign * shoulder[0] > 0
        assert at["nose"][1] > at["neck"][1]
    assert postures == {"standing", "walking", "sitting"}


def test_keypoints_scale_with_the_picture(rng):
    index = int(rng.integers(0, 2**31))
    small = scenes.render(index, height=48, width=64, subject="person")["keypoints"]
    large = scenes.render(index, height=192, width=256, subject="person")["keypoints"]
    np.testing.assert_allclose(large[:, :2], 4 * small[:, :2], atol=1e-3)
    # A pixel may see past the thin limb that hides a joint.
    assert (large[:, 2] == small[:, 2]).sum() >= 12

"""A person's joints, as COCO numbers and names them."""

KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
    "left_knee", "right_knee", "left_ankle", "right_ankle",
)  # fmt: skip
"""Left and right are the person's own."""

FLIP_PAIRS = tuple((left, left + 1) for left in range(1, 17, 2))
"""Joints that a mirror exchanges."""

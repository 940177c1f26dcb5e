"""What training does to a record, as a config says it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpercept.errors import UserError

_RESIZES = ("antialias", "nearest")


def _is_range(scale: tuple) -> bool:
    return len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1


@dataclasses.dataclass(frozen=True)
class Augment:
    """What training does to a record. The defaults are the papers' recipe: a flip, nothing else.

    Attributes:
      flip: probability of a horizontal flip.
      scale: range of the crop's area, as a fraction of the largest crop of the target's aspect.
      aspect: largest factor by which the crop's width/height may deviate from the target's; the
        resize then stretches by it.
      fit: "crop" keeps proportions (the crop has the target's aspect, its position is random),
        "center" does so with the crop in the middle, "stretch" takes the image's own aspect.
      rotation: largest in-plane rotation in degrees; corners without data are cropped away.
      photometric: probability that the colour changes below are applied to an image.
      brightness, contrast, saturation: factors are drawn from 1 +- these.
      hue: largest rotation of the hue, in turns (0.5 is the opposite colour).
      gamma: exponents are drawn log-uniformly from [1/(1+gamma), 1+gamma].
      blur: largest standard deviation of a Gaussian blur, in pixels of the target resolution.
      noise: largest standard deviation of pixel noise, in 8-bit levels.
      haze: probability that an image with depth is put into fog, of which its caption then tells.
      depth_blur, depth_error: what makes the ground truth worse, not the image: see
        `degrade.degrade_depth`; the blur in pixels of the target resolution.
      rgb_resize: "antialias" (area-weighted linear filter) or "nearest" (what GenPercept and
        Marigold do in training, for exact comparisons).
      alpha_resize: the same for masks and mattes ("antialias" is what GenPercept does).
    """

    flip: float = 0.5
    scale: tuple[float, float] = (1.0, 1.0)
    aspect: float = 1.0
    fit: str = "crop"
    rotation: float = 0.0
    photometric: float = 0.8
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    haze: float = 0.0
    depth_blur: float = 0.0
    depth_error: float = 0.0
    rgb_resize: str = "antialias"
    alpha_resize: str = "antialias"

    def __post_init__(self):
        for field, ok, rule in (
            ("flip", 0 <= self.flip <= 1, "a probability"),
            ("photometric", 0 <= self.photometric <= 1, "a probability"),
            ("scale", _is_range(self.scale), "two numbers 0 < low <= high <= 1"),
            ("aspect", self.aspect >= 1, "at least 1"),
            ("fit", self.fit in ("crop", "center", "stretch"), "'crop', 'center' or 'stretch'"),
            ("rotation", 0 <= self.rotation <= 45, "between 0 and 45 degrees"),
            ("brightness", 0 <= self.brightness < 1, "between 0 and 1"),
            ("contrast", 0 <= self.contrast < 1, "between 0 and 1"),
            ("saturation", 0 <= self.saturation <= 1, "between 0 and 1"),
            ("hue", 0 <= self.hue <= 0.5, "between 0 and 0.5 turns"),
            ("gamma", self.gamma >= 0, "at least 0"),
            ("blur", self.blur >= 0, "at least 0"),
            ("noise", self.noise >= 0, "at least 0"),
            ("haze", 0 <= self.haze <= 1, "a probability"),
            ("depth_blur", self.depth_blur >= 0, "at least 0"),
            ("depth_error", self.depth_error >= 0, "at least 0"),
            ("rgb_resize", self.rgb_resize in _RESIZES, "'antialias' or 'nearest'"),
            ("alpha_resize", self.alpha_resize in _RESIZES, "'antialias' or 'nearest'"),
        ):
            if not ok:
                raise UserError(f"augment.{field} must be {rule}, got {getattr(self, field)!r}.")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Augment":
        """Raises a UserError that names an unknown key or a value out of range."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in sorted(set(config) - known):
            raise UserError(f"Unknown key augment.{key}; known are {', '.join(sorted(known))}.")
        values = dict(config)
        for key, value in values.items():
            try:
                if key == "scale":
                    values[key] = tuple(float(bound) for bound in value)
                elif key not in ("fit", "rgb_resize", "alpha_resize"):
                    values[key] = float(value)
            except (TypeError, ValueError) as error:
                raise UserError(f"augment.{key} must be a number, got {value!r}.") from error
        return cls(**values)


# No augmentation at all: the largest centred crop of the target's aspect, resized.
NO_AUGMENT = Augment(flip=0.0, photometric=0.0, fit="center")

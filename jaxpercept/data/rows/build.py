"""The pieces rows are made of."""

import dataclasses
import functools
from typing import Any

from jaxpercept.data.layouts import Layout, open_layouts
from jaxpercept.data.listings import Lists, Tree
from jaxpercept.data.readers import NormalsReader
from jaxpercept.data.row import TARGETS


def files(*layouts: Layout) -> dict[str, Any]:
    """The fields of a row whose files lie in one of these layouts."""
    expected: dict[str, int] = {}
    for layout in layouts:
        expected = dict(layout.expected) | expected
    splits = dict.fromkeys(split for layout in layouts for split in layout.splits)
    return {
        "open_source": functools.partial(open_layouts, layouts=layouts),
        "splits": tuple(sorted(splits, key=lambda split: split != "train")),
        "provides": frozenset().union(*(layout.fields for layout in layouts)) & set(TARGETS),
        "expected": expected,
    }


def lists(*names: str, **lists: str) -> Lists:
    """One list per split; its lines are `rgb depth` unless `names` says otherwise."""
    return Lists(splits=lists, names=names or ("rgb", "depth"))


def counted(layout: Layout, **expected: int) -> Layout:
    """The layout with the number of examples of each split as published."""
    return dataclasses.replace(layout, expected=expected)


def dsine(
    pattern: str, *, suffix: str = "png", expected: int | None = None, **folders: str
) -> Tree:
    """DSINE's data: FOLDER/NAME_img.png with NAME_normal.png."""
    return Tree(
        splits={split: (folder + pattern,) for split, folder in folders.items()},
        partners={"normals": (r"_img\.\w+$", f"_normal.{suffix}")},
        readers={"normals": NormalsReader("left_up_back")},
        expected={} if expected is None else dict.fromkeys(folders, expected),
    )


def beside(images: str, *, suffix: str = "png", **folders: str) -> dict[str, tuple[str, str]]:
    """Partners in a folder beside that of the images, under the same name."""
    return {
        field: (rf"(^|/){images}/(.+)\.\w+$", rf"\g<1>{folder}/\g<2>.{suffix}")
        for field, folder in folders.items()
    }


def either(root: str, **patterns: str) -> list[dict[str, tuple[str, ...]]]:
    """The splits' patterns below the data folder and below `root` in it, as archives unpack."""
    return [
        {split: tuple(prefix + p for p in pattern.split()) for split, pattern in patterns.items()}
        for prefix in ("", f"{root}/")
    ]

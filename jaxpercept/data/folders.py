"""Data of one's own: one sub-folder per field, files paired by their names; or lists of files."""

from collections.abc import Mapping
from pathlib import Path

from jaxpercept.data.layouts import Meaning, Request, open_layouts
from jaxpercept.data.listings import COMPANIONS, Lists, adapted
from jaxpercept.data.readers import DEPTH_SUFFIXES, RGB_SUFFIXES
from jaxpercept.data.sources import MASKS, FileSource, existing_folder
from jaxpercept.errors import UserError

_VECTOR_SUFFIXES = frozenset({".png", ".npy", ".exr"})
_MASK_SUFFIXES = RGB_SUFFIXES | {".npy"}
_SUFFIXES = {
    "rgb": RGB_SUFFIXES,
    "depth": DEPTH_SUFFIXES,
    "normals": _VECTOR_SUFFIXES,
    "alpha": RGB_SUFFIXES,
    "trimap": RGB_SUFFIXES,
    "classes": RGB_SUFFIXES,
    **dict.fromkeys(MASKS, _MASK_SUFFIXES),
}
FOLDER_TARGETS = ("depth", "normals", "alpha", "classes")


def open_folder(
    request: Request, *, normals_axes: str | None = None, first_class: int = 0
) -> FileSource:
    """`rgb/NAME.*` with `FIELD/NAME.*` for every target, and `mask/`, `trimap/` where they are.

    NAME may contain sub-folders. Examples are ordered by name. For the options see `open_layouts`.

    Raises:
      UserError: a folder is missing or empty, or a file has no partner.
    """
    folder = existing_folder(request.data_dir)
    fields = ["rgb", *request.targets]
    for target in request.targets:
        companions = _SUFFIXES.keys() & set(COMPANIONS.get(target, ()))
        fields += sorted(c for c in companions if (folder / c).is_dir())
    files = {field: _files_by_stem(folder / field, _SUFFIXES[field]) for field in fields}
    for field in fields[1:]:
        _require_partners(folder, field, files[field], files["rgb"])
    names = sorted(files["rgb"])
    columns = {field: [files[field][name] for name in names] for field in fields}
    return FileSource(folder, names, columns, adapted({}, Meaning(normals_axes, first_class)))


def open_list(
    request: Request,
    *,
    lists: Mapping[str, str],
    list_file: str | None = None,
    columns: str = "rgb depth",
    normals_axes: str | None = None,
    first_class: int = 0,
) -> FileSource:
    """Lists of one's own, whose words `columns` names.

    Raises:
      UserError: the columns lack an image or a wanted target, or a file is missing.
    """
    names = tuple(columns.split())
    for field in ("rgb", *request.targets):
        if field not in names:
            raise UserError(
                f"The columns {columns!r} of dataset {request.name} have no {field}; name it "
                "where the lines have it."
            )
    layout = Lists(splits=lists, names=names)
    file = list_file or lists[request.split]  # a missing list is named, not the layout
    return open_layouts(
        request,
        layouts=(layout,),
        list_file=file,
        normals_axes=normals_axes,
        first_class=first_class,
    )


def _files_by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, str]:
    """Relative path of every data file below `folder`, by its name without the suffix."""
    if not folder.is_dir():
        raise UserError(f"The folder {folder} is missing; put the {folder.name} files there.")
    files: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in files:
            raise UserError(f"{folder} has two files named {stem}; keep one of them.")
        files[stem] = str(path.relative_to(folder.parent))
    if not files:
        raise UserError(
            f"The folder {folder} holds no file that ends in {', '.join(sorted(suffixes))}."
        )
    return files


def _require_partners(
    folder: Path, field: str, files: Mapping[str, str], rgb: Mapping[str, str]
) -> None:
    for name in sorted(rgb.keys() - files.keys())[:1]:
        raise UserError(
            f"{folder / rgb[name]} has no {field}; add {folder / field / name}.* or remove it."
        )
    for name in sorted(files.keys() - rgb.keys())[:1]:
        raise UserError(
            f"{folder / files[name]} has no image; add {folder / 'rgb' / name}.* or remove it."
        )

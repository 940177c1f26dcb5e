"""Images a second that one core decodes and augments, beside a torch DataLoader that does the same.

    python benchmarks/input.py                        # JPEG and 16-bit PNG of 480 x 640, and scenes
    taskset -c 0 python benchmarks/input.py --workers 0

What is read: a folder (`rgb/NAME.jpg`, `depth/NAME.png`), the same folder prepared as ArrayRecord,
the same records without the JPEG and PNG ("decoded before"), and procedural scenes. What is done:
decode, a random flip, the quantiles of the valid depth, resize where the size differs, batch. The
torch side is Marigold's: Pillow, torch.quantile, interpolation of tensors; its DataLoader collates.
`--workers N` gives both N processes; 0 means this one, without threads on either side.

Memory is what all worker processes hold (PSS, so that shared pages count once), and the bytes of
the batches that may wait decoded: two for each worker and two here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import common
import grain
import numpy as np
from PIL import Image

from jaxpercept.data import scenes
from jaxpercept.data.pipeline import make_train_dataset
from jaxpercept.data.stages import prefetched
from jaxpercept.preparation.pipeline import prepare

HEIGHT, WIDTH = 480, 640


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--images", type=int, default=64, help="images that are written and read")
    p.add_argument("--batch", type=int, default=8, help="images of a batch")
    p.add_argument("--batches", type=int, default=12, help="batches of a measurement")
    p.add_argument("--workers", type=int, default=0, help="processes that decode")
    p.add_argument("--repeats", type=int, default=5, help="measurements of each row, in turns")
    p.add_argument("--size", default=f"{HEIGHT}x{WIDTH}", help="HEIGHTxWIDTH that is trained on")
    args = p.parse_args()
    size = tuple(int(side) for side in args.size.split("x"))

    with tempfile.TemporaryDirectory() as root:
        folder = write_folder(Path(root) / "folder", args.images)
        prepare("folder", folder, root, name="records", shard_size=args.images)
        records = str(Path(root) / "records")
        mixtures = {
            "folder": [("folder", 1.0, {"data_dir": str(folder)})],
            "ArrayRecord": [("folder", 1.0, {"data_dir": records})],
            "scenes": [("scenes", 1.0, {})],
        }
        rows: dict[tuple[str, str], Callable[[], Iterator[Any]]] = {}
        for name, mixture in mixtures.items():
            rows[name, "jaxpercept"] = lambda mixture=mixture: own_batches(mixture, size, args)
            source = scene_source(size) if name == "scenes" else FolderFiles(folder)
            if name != "ArrayRecord":
                rows[name, "torch"] = lambda source=source: torch_batches(source, size, args)
        times, memory = measure(rows, args)

    print(f"\n{HEIGHT} x {WIDTH} to {args.size}, batches of {args.batch}, {args.workers} workers")
    table = []
    for name in mixtures:
        ours = times[name, "jaxpercept"]
        theirs = times.get((name, "torch")) or times["folder", "torch"]
        per_image = args.batch * args.batches / max(args.workers, 1)
        table.append(
            {
                "": name,
                "jaxpercept, images/s a core": rates(ours, per_image),
                "torch": rates(theirs, per_image) if (name, "torch") in times else "as folder",
                "ratio of the times": f"{min(ours) / min(theirs):.2f} / "
                f"{median(ours) / median(theirs):.2f}",
                "MiB of the workers": f"{memory[name, 'jaxpercept'] / 2**20:.0f} / "
                f"{memory.get((name, 'torch'), memory['folder', 'torch']) / 2**20:.0f}",
            }
        )
    common.print_table(table)


def rates(times: list[float], images: float) -> str:
    return f"{images / min(times):.1f} / {images / median(times):.1f}"


# ---- the data ------------------------------------------------------------------------------------


def write_folder(root: Path, count: int) -> Path:
    for name in ("rgb", "depth"):
        (root / name).mkdir(parents=True)
    for number in range(count):
        scene = scenes.render(number, height=HEIGHT, width=WIDTH)
        Image.fromarray(scene["rgb"]).save(root / f"rgb/{number:04d}.jpg", quality=92)
        depth = (scene["depth"][..., 0] * 1000).astype(np.uint16)
        Image.fromarray(depth).save(root / f"depth/{number:04d}.png")
    return root


# ---- this package --------------------------------------------------------------------------------


def own_batches(mixture: list, size: tuple[int, int], args: argparse.Namespace) -> Iterator[Any]:
    data = make_train_dataset(mixture, resolution=size, batch_size=args.batch, seed=0)
    if args.workers:
        return iter(prefetched(data.batches, args.workers))
    # Without the thread that decodes ahead in training.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(data.batches.to_iter_dataset(options))


# ---- torch ---------------------------------------------------------------------------------------


class FolderFiles:
    """Pictures and maps of the folder, as Marigold's loaders read them."""

    def __init__(self, root: Path):
        self.pairs = [
            (str(path), str(root / "depth" / f"{path.stem}.png"))
            for path in sorted((root / "rgb").iterdir())
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, depth = self.pairs[index]
        with Image.open(image) as file:
            rgb = np.asarray(file.convert("RGB"))
        with Image.open(depth) as file:
            metres = np.asarray(file).astype(np.float32) / 1000
        return rgb, metres


def scene_source(size: tuple[int, int]) -> Any:
    class Scenes:
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            scene = scenes.render(index, height=size[0], width=size[1])
            return scene["rgb"], scene["depth"][..., 0]

    return Scenes()


def torch_batches(source: Any, size: tuple[int, int], args: argparse.Namespace) -> Iterator[Any]:
    import torch
    from torch.nn.functional import interpolate
    from torch.utils.data import DataLoader, Dataset

    class Examples(Dataset):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> dict[str, Any]:
            rgb, metres = source[index]
            rgb = torch.from_numpy(rgb.copy()).permute(2, 0, 1)
            depth = torch.from_numpy(metres.copy())[None]
            if torch.rand(()) < 0.5:
                rgb, depth = rgb.flip(-1), depth.flip(-1)
            valid = (depth > 1e-5) & (depth < 65)
            quantiles = torch.quantile(depth[valid], torch.tensor([0.02, 0.98]))
            if rgb.shape[1:] != size:
                resized = interpolate(rgb[None].float(), size, mode="bilinear", antialias=True)
                rgb = resized[0].round().to(torch.uint8)
                depth = interpolate(depth[None], size, mode="nearest-exact")[0]
                valid = interpolate(valid[None].float(), size, mode="nearest-exact")[0] > 0
            return {"rgb": rgb, "depth": depth, "valid": valid, "range": quantiles, "index": index}

    torch.set_num_threads(1)
    sampler = torch.utils.data.RandomSampler(
        Examples(), replacement=True, num_samples=args.batch * (args.batches + 4)
    )
    return iter(DataLoader(Examples(), args.batch, sampler=sampler, num_workers=args.workers))


# ---- measuring -----------------------------------------------------------------------------------


def measure(rows: dict, args: argparse.Namespace) -> tuple[dict, dict]:
    """Seconds of each row's measurements, and the memory of its processes."""
    times: dict[Any, list[float]] = {row: [] for row in rows}
    memory: dict[Any, int] = {}
    for _ in range(args.repeats):
        for row, batches in rows.items():
            iterator = batches()
            for _ in range(2):
                next(iterator)
            began = time.perf_counter()
            for _ in range(args.batches):
                next(iterator)
            times[row].append(time.perf_counter() - began)
            memory[row] = max(memory.get(row, 0), children_pss())
            if hasattr(iterator, "close"):
                iterator.close()
            del iterator
    return times, memory


def children_pss() -> int:
    """Bytes that the child processes hold, shared ones divided among those that share them."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent != os.getpid():
                continue
            lines = (path / "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, ValueError, IndexError):
            continue
    return total


if __name__ == "__main__":
    main()

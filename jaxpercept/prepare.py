r"""Prepare a dataset for training on many hosts: raw files into sharded ArrayRecord.

    python -m jaxpercept.prepare --dataset=nyuv2 --from=nyuv2 --to=prepared
    python -m jaxpercept.prepare --dataset=hypersim --from=hypersim --to=prepared \
        --splits=train,val --workers=16
    python -m jaxpercept.prepare --dataset=scenes --to=prepared --limit=10000

writes prepared/NAME/1.0.0/ in the layout of TensorFlow Datasets. Train and evaluate on it
as on the files themselves, with --data_dir=prepared; tfds.data_source(NAME,
data_dir="prepared") reads it, too. The records are those of the files, to the bit.

Apache Beam does the work: on this machine in --workers processes, or on any runner that --beam
names, whose workers must see both folders. Run the same command again after an interruption: what
is finished stays. Every example is validated; report/index.html shows what was taken, and what was
rejected and why. Splits can be added later. `pip install 'jaxpercept[prepare]'` brings Beam.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from jaxpercept import cli
from jaxpercept.preparation.pipeline import prepare

FLAGS = flags.FlagValues()
flags.DEFINE_string("dataset", None, "One of those in docs/data.md.", flag_values=FLAGS)
flags.DEFINE_string("from", None, "Folder of the files as they are published.", flag_values=FLAGS)
flags.DEFINE_string("to", None, "Folder that gets NAME/VERSION/.", flag_values=FLAGS)
flags.DEFINE_list("splits", [], "Default: all that --from has.", flag_values=FLAGS)
flags.DEFINE_list(
    "targets",
    None,
    "What the records have: depth, normals, alpha, classes, ...; default: all that --from has.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "options",
    None,
    "KEY=VALUE,... of the dataset, such as crop, list_file, columns, normals_axes, depth_scale.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "resolution", "480x640", "HEIGHTxWIDTH of datasets that are rendered.", flag_values=FLAGS
)
flags.DEFINE_list(
    "store",
    None,
    "FIELD=STORAGE,...: another one than the smallest exact one; normals=vectors16 halves normals, "
    "whose direction then is off by up to 0.03 degrees.",
    flag_values=FLAGS,
)
flags.DEFINE_string("name", None, "In TFDS; default: that of the dataset.", flag_values=FLAGS)
flags.DEFINE_string("version", "1.0.0", "Of what is written.", flag_values=FLAGS)
flags.DEFINE_integer("shard_size", 256, "Examples of a shard.", flag_values=FLAGS)
flags.DEFINE_integer(
    "limit", 0, "Only the first so many examples of a split; 0: all.", flag_values=FLAGS
)
flags.DEFINE_integer("workers", 1, "Processes on this machine.", flag_values=FLAGS)
flags.DEFINE_string(
    "beam",
    "",
    "Options of Beam instead, such as '--runner=FlinkRunner --flink_master=HOST:8081'.",
    flag_values=FLAGS,
)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("dataset", "to")


def main() -> None:
    """The command."""
    values = {name: FLAGS[name].value for name in OWN_FLAGS}
    folder = prepare(
        values["dataset"],
        values["from"],
        values["to"],
        splits=values["splits"],
        targets=values["targets"],
        options=cli.key_values("options", values["options"] or ()),
        resolution=cli.height_and_width("resolution", values["resolution"]),
        store=cli.key_values("store", values["store"] or ()),
        name=values["name"],
        version=values["version"],
        shard_size=values["shard_size"],
        limit=values["limit"],
        workers=values["workers"],
        beam=values["beam"],
        progress=True,
    )
    print(f"{folder}: see {Path(folder, 'report', 'index.html')}")


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)

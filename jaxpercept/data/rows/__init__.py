"""The table of datasets: one row says where the examples are and what their numbers mean.

Facts of the rows (units, valid ranges, crops, split sizes) are those of the Marigold and GenPercept
loaders, which agree, or of the data set's own publication. To add a dataset, add a row to one of
these modules; if its files are named by a list or by a pattern, that is all. docs/data.md shows the
whole table.
"""

from jaxpercept.data.row import Dataset
from jaxpercept.data.rows import geometry, own, referring, semantics

__all__ = ["DATASETS"]

DATASETS: dict[str, Dataset] = {
    row.name: row for row in (*own.ROWS, *geometry.ROWS, *semantics.ROWS, *referring.ROWS)
}

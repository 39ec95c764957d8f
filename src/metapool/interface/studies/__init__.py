"""Studies: questions about pools and methods, each answered by a table and a figure (``metapool study NAME``)."""

from collections.abc import Mapping

from metapool.interface.studies.gradients import Gradients
from metapool.interface.studies.study import Study
from metapool.interface.studies.theorems import Theorems

STUDIES: Mapping[str, type[Study]] = {"gradients": Gradients, "theorems": Theorems}
"""Every study by its name."""

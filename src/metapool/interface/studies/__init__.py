"""Studies: questions about pools and methods, each answered by a table and a figure (``metapool study NAME``)."""

from collections.abc import Mapping

from metapool.interface.studies.effects import Effects
from metapool.interface.studies.gain import Gain
from metapool.interface.studies.gradients import Gradients
from metapool.interface.studies.matters import Matters
from metapool.interface.studies.study import Study
from metapool.interface.studies.theorems import Theorems

STUDIES: Mapping[str, type[Study]] = {
    "gain": Gain,
    "gradients": Gradients,
    "theorems": Theorems,
    "matters": Matters,
    "effects": Effects,
}
"""Every study by its name."""

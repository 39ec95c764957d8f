"""Studies: questions about pools and methods, each answered by a table and a figure (``metapool study NAME``)."""

from collections.abc import Mapping

from metapool.interface.studies.study import Study

STUDIES: Mapping[str, type[Study]] = {}
"""Every study by its name."""

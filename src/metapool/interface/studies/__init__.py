"""Studies: questions about pools and methods, each answered by a table and a figure (``metapool study NAME``)."""

from collections.abc import Mapping

from metapool.interface.studies.cka import CKAStudy
from metapool.interface.studies.embeddings import EmbeddingsStudy
from metapool.interface.studies.fisher import FisherStudy
from metapool.interface.studies.recoveries import RecoveriesStudy
from metapool.interface.studies.study import Study

STUDIES: Mapping[str, type[Study]] = {
    "cka": CKAStudy,
    "fisher": FisherStudy,
    "embeddings": EmbeddingsStudy,
    "recoveries": RecoveriesStudy,
}
"""Every study by its name."""

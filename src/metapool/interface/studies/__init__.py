"""Studies: questions about pools and methods, each answered by a table and a figure (``metapool study NAME``)."""

from collections.abc import Mapping

from metapool.interface.studies.cka import CKAStudy
from metapool.interface.studies.effects import EffectsStudy
from metapool.interface.studies.embeddings import EmbeddingsStudy
from metapool.interface.studies.fisher import FisherStudy
from metapool.interface.studies.gain import GainStudy
from metapool.interface.studies.gradients import GradientsStudy
from metapool.interface.studies.matters import MattersStudy
from metapool.interface.studies.recoveries import RecoveriesStudy
from metapool.interface.studies.study import Study
from metapool.interface.studies.theorems import TheoremsStudy

STUDIES: Mapping[str, type[Study]] = {
    "cka": CKAStudy,
    "gain": GainStudy,
    "fisher": FisherStudy,
    "gradients": GradientsStudy,
    "theorems": TheoremsStudy,
    "matters": MattersStudy,
    "effects": EffectsStudy,
    "embeddings": EmbeddingsStudy,
    "recoveries": RecoveriesStudy,
}
"""Every study by its name, figures of the paper first."""

"""metapool: from a pool of trained classifiers, without their data, to one small few-shot learner."""

from importlib.metadata import version

__version__ = version("metapool")

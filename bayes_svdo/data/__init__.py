"""Data sets by name: from scikit-learn, from a folder of yours, or downloaded and checked.

>>> from bayes_svdo.data import load
>>> load("digits")
DataSet('digits', 1437 train, 360 test, inputs (1, 8, 8), 10 classes)
"""

from bayes_svdo.data.dataset import DataSet
from bayes_svdo.data.errors import CorruptDataError, DataNotFoundError
from bayes_svdo.data.registry import available, load

__all__ = ["CorruptDataError", "DataNotFoundError", "DataSet", "available", "load"]

"""All the listed mutants."""

from listed_kernels import KERNELS
from listed_python import PYTHON

LISTED = (*KERNELS, *PYTHON)

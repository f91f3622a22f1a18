"""All the listed mutants."""

from listed_concat import CONCAT
from listed_kernels import KERNELS
from listed_python import PYTHON

LISTED = (*KERNELS, *CONCAT, *PYTHON)

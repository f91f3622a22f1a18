"""All the listed mutants."""

from listed_concat import CONCAT
from listed_kernels import KERNELS
from listed_location import LOCATION
from listed_location_aware import LOCATION_AWARE
from listed_python import PYTHON
from listed_target import TARGET

LISTED = (*KERNELS, *CONCAT, *LOCATION, *LOCATION_AWARE, *PYTHON, *TARGET)

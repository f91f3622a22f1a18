"""Predicted time of every op in the registry on chips that are not there: `python -m bench.model --help`."""

"""Predicted time of the registry's cases: `python -m bench.model --help`."""

import sys

if "--emulate" in sys.argv:  # in a process whose kernels are the emulator's
    import ptxemu.launch  # noqa: F401  # before Triton

    from .emulated import emulate

    emulate()
else:
    from .table import main

    sys.exit(main())

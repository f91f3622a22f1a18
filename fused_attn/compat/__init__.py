"""Models of other libraries on this package's ops, by one call: `replace_attention(model)`.

A file a library, named as the package that is imported: `fused_attn.compat.torch_geometric`. It is imported only
where a model holds a module of that library. docs/compat.md says how to add one.
"""

from ._replace import replace_attention, restore_attention
from ._report import Replaced, Report, Skipped

__all__ = ["Replaced", "Report", "Skipped", "replace_attention", "restore_attention"]

"""What `fused_attn.compat` replaces, beside the libraries' own; a file a library, with its `CASES`."""

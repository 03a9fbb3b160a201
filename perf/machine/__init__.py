"""The machine: its ranks, its versions, the commit of this checkout."""
